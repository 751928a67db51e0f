"""What build takes, what it refuses, and what it leaves alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import norm_error
from loops import dense
from networks import CHANNELS, DIM, Lambda, Net, Pool, common, loader, other, pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gcfast
from gcfast import _progress, ops
from gcfast.builder import embed as embedding_module
from gcfast.builder import rows as rows_module
from gcfast.builder.build import build
from gcfast.builder.spool import Spool
from gcfast.method.head import AffineHead
from gcfast.method.pairs import PairSource

HEADS = {"closed form": common, "autograd": other}
BOTH = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def explainer(model: nn.Module | None = None, **settings: Any) -> gcfast.Explainer:
    settings.setdefault("channels", 5)
    return gcfast.Explainer(common() if model is None else model, "backbone", **settings)


# --- what is stored


@BOTH
def test_rows_are_in_the_loaders_order_with_embeddings_labels_and_ids(make: Any) -> None:
    model, (images, labels) = make().eval(), pictures(7)
    ids = [f"picture {i}" for i in range(7)]
    database = explainer(model).build(
        [(images[:4], labels[:4], ids[:4]), (images[4:], labels[4:], ids[4:])]
    )
    with torch.no_grad():
        wanted = nn.functional.normalize(model(images), dim=1)
    torch.testing.assert_close(database.embeddings, wanted)
    assert database.labels.tolist() == labels.tolist()
    assert database.ids == ids
    assert database.class_names == []
    assert len(database) == 7
    assert not database.embeddings.requires_grad


@BOTH
def test_top_m_are_the_highest_by_falling_weight(make: Any) -> None:
    model, (images, labels) = make(), pictures(8)
    every = explainer(model, channels="all").build([(images, labels)])
    top = explainer(model, channels=4).build([(images, labels)])
    assert every.weights.shape == (8, CHANNELS)
    assert (every.weights.diff(dim=1) <= 0).all()
    assert every.channels.sort(1).values.tolist() == [list(range(CHANNELS))] * 8
    torch.testing.assert_close(top.weights, every.weights[:, :4])
    assert top.channels.tolist() == every.channels[:, :4].tolist()


@BOTH
def test_offsets_are_the_kept_weights_times_the_mean_activation(make: Any) -> None:
    model, (images, labels) = make(), pictures(8)
    database = explainer(model).build(loader(images, labels, 3))
    with torch.no_grad():
        mean = model.eval().backbone(images).mean((0, 2, 3))
    torch.testing.assert_close(database.mean_activation, mean)
    torch.testing.assert_close(
        database.offsets, (database.weights * mean[database.channels]).sum(1)
    )


def test_the_mean_activation_weighs_pixels_not_batches() -> None:
    model = common().eval()
    small, large = pictures(4, 2)[0], pictures(2, 2, (16, 12))[0]
    database = explainer(model).build([(small, [0, 0, 1, 1]), (large, [0, 1])])
    with torch.no_grad():
        pixels = [model.backbone(x).transpose(0, 1).flatten(1) for x in (small, large)]
    torch.testing.assert_close(database.mean_activation, torch.cat(pixels, 1).mean(1))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_pictures_of_several_sizes_share_a_database(method: str) -> None:
    head = common().head
    batches = [(pictures(4, 2)[0], [0, 0, 1, 1]), (pictures(4, 2, (16, 12))[0], [0, 1, 0, 1])]
    settings = {"channels": "all", "method": method, "triplets": "all"}
    model = Net(head)
    closed = explainer(model, **settings).build(batches)
    assert closed.manifest["closed_form"]
    bent = Net(nn.Sequential(*head, Lambda(lambda x: x + 1e-30 * x.relu())))
    bent.backbone = model.backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_module, "probe", lambda *_: None)
        by_autograd = explainer(bent, **settings).build(batches)
    assert not by_autograd.manifest["closed_form"]
    assert norm_error(dense(by_autograd, CHANNELS), dense(closed, CHANNELS)) < 1e-5


def test_labels_seen_once_are_left_out_and_counted() -> None:
    images, _ = pictures(7)
    database = explainer().build([(images, [4, 9, 4, 7, 4, 9, 2])])
    assert database.labels.tolist() == [4, 9, 4, 4, 9]
    assert database.ids == ["0", "1", "2", "4", "5"]
    assert database.report == {
        "images": 7,
        "rows": 5,
        "skipped_single": 2,
        "skipped_no_triplet": 0,
        "hardest_triplet": 0,
        "estimated_counts": 0,
        "zero_rows": 0,
    }


def test_every_label_seen_once_is_refused() -> None:
    images, _ = pictures(4)
    with pytest.raises(ValueError, match="got none: 4 of 4 labels were seen once"):
        explainer().build([(images, [0, 1, 2, 3])])


@BOTH
def test_a_row_without_valid_triplet_takes_its_hardest_one(make: Any) -> None:
    model, (images, labels) = make(), pictures(8, 2)
    margin = -10.0  # no triplet of unit vectors has a loss above zero
    settings = {"channels": "all", "objective": gcfast.TripletLoss(margin)}
    database = explainer(model, **settings).build([(images, labels)])
    assert database.report["hardest_triplet"] == 8
    assert database.triplet_counts.tolist() == [0] * 8
    drawn = ops.sample_triplets(
        database.embeddings,
        labels,
        torch.arange(8),
        database.embeddings,
        labels,
        triplets=1,
        margin=margin,
    )
    f = database.embeddings
    distances = torch.cdist(f, f)
    for row, (positive, negative) in enumerate(drawn.hardest.tolist()):
        same = labels == labels[row]
        assert distances[row][same].max() == distances[row][positive]
        assert distances[row][~same].min() == distances[row][negative]

    # The one triplet by hand: in the order of the loader no other is nearer or farther.
    def only(row: int) -> Tensor:
        positive, negative = drawn.hardest[row].tolist()
        own = images[[row, positive, negative]]
        one = explainer(model, **(settings | {"objective": gcfast.DistanceDifference()}))
        return dense(one.build([(own, [0, 0, 1])]), CHANNELS)[0]

    assert norm_error(dense(database, CHANNELS)[:2], torch.stack([only(0), only(1)])) < 1e-4
    every = explainer(model, triplets="all", **settings).build([(images, labels)])
    torch.testing.assert_close(every.weights, database.weights)


def test_rows_without_valid_triplet_can_be_left_out() -> None:
    images, labels = pictures(8, 2)
    with pytest.raises(ValueError, match="0 of 8 labels were seen once, 8 images had no valid"):
        explainer(objective=gcfast.TripletLoss(-10.0), on_no_triplet="skip").build(
            [(images, labels)]
        )


def test_skipping_keeps_the_rows_that_have_one() -> None:
    images, labels = pictures(12, 2)
    model = common()
    plain = explainer(model, objective=gcfast.DistanceDifference()).build([(images, labels)])
    f = plain.embeddings
    distances = torch.cdist(f, f).square()
    same = labels[:, None] == labels
    eased = distances.masked_fill(same, torch.inf).amin(1) - (distances * same).amax(1)
    margin = float(eased.sort().values[5:7].mean())  # between the sixth row and the seventh
    database = explainer(model, objective=gcfast.TripletLoss(margin), on_no_triplet="skip").build(
        [(images, labels)]
    )
    kept = (eased < margin).nonzero().flatten()
    assert len(kept) == 6
    assert database.ids == [str(i) for i in kept.tolist()]
    torch.testing.assert_close(database.embeddings, f[kept])
    assert database.report["skipped_no_triplet"] == 6
    assert (database.triplet_counts > 0).all()


# --- what a draw depends on


@BOTH
def test_draws_depend_on_seed_and_row_alone(make: Any) -> None:
    model, (images, labels) = make(), pictures(24)
    settings = {"triplets": 5, "objective": gcfast.DistanceDifference(), "channels": "all"}
    one = explainer(model, seed=3, **settings).build(loader(images, labels, 24))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        two = explainer(model, seed=3, **settings).build(loader(images, labels, 5))
    finally:
        torch.set_num_threads(before)
    other_seed = explainer(model, seed=4, **settings).build([(images, labels)])
    assert norm_error(dense(two, CHANNELS), dense(one, CHANNELS)) < 1e-3
    assert norm_error(dense(other_seed, CHANNELS), dense(one, CHANNELS)) > 1e-2


def test_a_spool_on_the_disk_gives_the_same_database(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    images, labels = pictures(24)
    model = explainer(method="gradcam++")
    one = build(model.network, loader(images, labels), model.settings)
    spilled = []
    close = Spool.close
    monkeypatch.setattr(Spool, "close", lambda self: (spilled.append(self.spilled), close(self)))
    two = build(model.network, loader(images, labels), model.settings, spool_bytes=200)
    assert spilled == [True]
    for field in ("embeddings", "channels", "weights", "offsets", "labels", "triplet_counts"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_the_spool_says_so_and_leaves_nothing(
    tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "_file", full)
    images, labels = pictures(24)
    model = explainer()
    with pytest.raises(OSError, match=r"cannot spool to temporary files, No space left.*TMPDIR"):
        build(model.network, loader(images, labels), model.settings, spool_bytes=200)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_bends_later_is_noticed_and_taken_by_autograd() -> None:
    model = Net(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM)))
    images, labels = pictures(8)
    bent = model.head[1]

    def clamp(x: Tensor) -> Tensor:  # affine until an image is brighter than the probe's ever were
        return torch.where(x.abs().amax(1, keepdim=True) > 1e3, x.clamp(-700, 900), x)

    model.head = nn.Sequential(Pool(), bent, Lambda(clamp))
    bright = images.clone()
    bright[5] *= 1e6
    flat = explainer(model, l2_normalize=False, objective=gcfast.DistanceDifference())
    assert flat.build([(images, labels)]).manifest["closed_form"]
    database = flat.build([(images, labels), (bright, labels)])
    assert not database.manifest["closed_form"]
    assert len(database) == 16


def test_one_row_that_bends_is_seen_in_a_large_batch() -> None:
    head = AffineHead(torch.eye(3), torch.zeros(3), True)
    pooled = torch.rand(4096, 3) + 0.1
    embeddings = head.project(pooled)[0]
    assert head.agrees(pooled, embeddings, torch.float32)
    embeddings[77, 0] += 1e-3
    assert not head.agrees(pooled, embeddings, torch.float32)


def test_a_batch_is_projected_through_the_head_once(monkeypatch: Any) -> None:
    one, given = explainer(), loader(*pictures(40), 4)
    calls: list[int] = []
    real = AffineHead.project
    monkeypatch.setattr(
        AffineHead,
        "project",
        lambda self, pooled: (calls.append(len(pooled)), real(self, pooled))[1],
    )
    one.build(given)
    assert calls == [2, 2] + 10 * [4]  # the probe's two images twice


# --- loaders of every kind


def as_batches(kind: str, images: Tensor, labels: Tensor) -> Any:
    names = ["one", "two", "three"]
    return {
        "list": [(images, labels)],
        "list of lists": [[images, labels]],
        "DataLoader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "numpy labels": [(images, labels.numpy())],
        "numpy int32 labels": [(images, labels.numpy().astype(np.int32))],
        "list of ints": [(images, labels.tolist())],
        "tuple of 0-d tensors": [(images, tuple(labels))],
        "float64 images": [(images.double(), labels)],
        "an empty batch": [(images[:0], labels[:0]), (images, labels), (images[:0], [])],
        "names": [(images, [names[i] for i in labels])],
        "numpy names": [(images, np.array([names[i] for i in labels]))],
        "images with a graph": [(images.clone().requires_grad_(), labels)],
        "channels last": [(images.contiguous(memory_format=torch.channels_last), labels)],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "list of lists",
        "DataLoader",
        "numpy labels",
        "numpy int32 labels",
        "list of ints",
        "tuple of 0-d tensors",
        "float64 images",
        "an empty batch",
        "names",
        "numpy names",
        "images with a graph",
        "channels last",
    ],
)
@BOTH
def test_loaders_of_every_kind_give_the_same_database(make: Any, kind: str) -> None:
    model, (images, labels) = make(), pictures(9)
    wanted = explainer(model).build(as_batches("list", images, labels))
    got = explainer(model).build(as_batches(kind, images, labels))
    assert got.labels.tolist() == wanted.labels.tolist()
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-4, atol=1e-7)
    assert got.class_names == (["one", "two", "three"] if "names" in kind else [])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (torch.tensor([7, 8, 9, 10]), ["7", "8", "9", "10"]),
        (np.array(["a", "b", "c", "d"]), ["a", "b", "c", "d"]),
        ((1, 2, 3, 4), ["1", "2", "3", "4"]),
    ],
    ids=["tensor", "array", "ints"],
)
def test_ids_of_every_kind(ids: Any, wanted: list[str]) -> None:
    images, _ = pictures(4)
    assert explainer().build([(images, [0, 0, 1, 1], ids)]).ids == wanted


def test_a_one_shot_iterator_is_enough_for_the_common_head() -> None:
    images, labels = pictures(9)
    model = common()
    got = explainer(model).build(batch for batch in loader(images, labels))
    assert torch.equal(got.weights, explainer(model).build(loader(images, labels)).weights)


def test_a_one_shot_iterator_is_refused_at_once_where_two_passes_are_needed() -> None:
    given = []

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader(*pictures(20)):
            given.append(batch)
            yield batch

    with pytest.raises(ValueError, match=r"gone through twice, got a one-shot iterator \(gener"):
        explainer(other()).build(once())
    assert len(given) == 1


class Changing:
    """A loader that gives something else the second time."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.passes.pop(0))


@pytest.mark.parametrize("how", ["images", "order", "labels", "ids", "fewer", "more", "none"])
def test_other_images_the_second_time_are_refused(how: str) -> None:
    images, labels = pictures(9)
    ids = [str(i) for i in range(9)]
    first = [(images, labels, ids)]
    again, words = {
        "images": ([(images.roll(3, 0), labels, ids)], "the embedding of row . differs"),
        "order": ([(images.flip(0), labels.flip(0), ids)], "labels differ in rows 0 to 8"),
        "labels": ([(images, labels.roll(1), ids)], "labels differ in rows 0 to 8"),
        "ids": ([(images, labels, ids[::-1])], "ids differ in rows 0 to 8"),
        "fewer": ([(images[:5], labels[:5], ids[:5])], "gave 9 images first and 5 now"),
        "more": (first + first, "gave 9 images first and more now"),
        "none": ([], "gave 9 images first and 0 now"),
    }[how]
    with pytest.raises(ValueError, match=f"same images in the same order .*{words}"):
        explainer(other()).build(Changing(first, again))


BAD_LOADERS: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (lambda _: [], ValueError, "`loader` must give images, got none"),
    "not iterable": (lambda _: 5, TypeError, "must be an iterable of .*, got int"),
    "images alone": (lambda x: [x], ValueError, "got a Tensor as batch 0: a database needs labels"),
    "one-tuple": (lambda x: [(x,)], ValueError, "got a tuple of 1 as batch 0"),
    "four-tuple": (lambda x: [(x, 1, 2, 3)], ValueError, "got a tuple of 4 as batch 0"),
    "dict": (
        lambda x: [{"image": x}],
        ValueError,
        "got a dict with 'image' as batch 0: make tuples",
    ),
    "one class": (lambda x: [(x, [3] * 4)], ValueError, "at least two classes, .* got one"),
    "numpy images": (lambda x: [(x.numpy(), [0, 0, 1, 1])], TypeError, "`images` must be a torch"),
    "one image": (lambda x: [(x[0], 1)], ValueError, r"shape \[B, 3, h, w\], got \[3, 8, 8\]"),
    "uint8": (lambda x: [(x.byte(), [0, 0, 1, 1])], TypeError, "floating point, .* got uint8"),
    "too few labels": (lambda x: [(x, [0, 1])], ValueError, "`labels` must have B = 4 .* got 2"),
    "label floats": (lambda x: [(x, torch.rand(4))], TypeError, "whole numbers or strings"),
    "too few ids": (lambda x: [(x, [0, 0, 1, 1], ["a"])], ValueError, "`ids` must have B = 4"),
    "ids of None": (lambda x: [(x, [0, 0, 1, 1], None)], TypeError, "one id an image, got None"),
    "ids of a string": (lambda x: [(x, [0, 0, 1, 1], "abcd")], TypeError, "one id an image"),
    "mixed labels": (
        lambda x: [(x, [0, 0, 1, 1]), (x, ["a", "b", "a", "b"])],
        TypeError,
        "all numbers or all names, got both: 'a' after int labels",
    ),
}


@pytest.mark.parametrize("name", BAD_LOADERS)
def test_bad_loaders_are_refused_in_words(name: str) -> None:
    make, error, words = BAD_LOADERS[name]
    one = explainer()
    with pytest.raises(error, match=words):
        one.build(make(pictures(4)[0]))
    assert one.database is None


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_in_images_is_refused_with_the_row(make: Any, value: float) -> None:
    images, labels = pictures(9)
    images[7, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"`images` must be finite, got NaN or infinity in row 7$"):
        explainer(make()).build(loader(images, labels))


def test_nan_in_embeddings_is_refused_with_the_rows() -> None:
    images, labels = pictures(9)
    broken = Lambda(lambda x: torch.cat([x[:1], x[1:] * float("nan")]))
    model = nn.Sequential(common(), broken)
    with pytest.raises(
        ValueError, match=r"`embeddings` must be finite, got NaN or infinity in rows 1, 2, 3, 4$"
    ):
        gcfast.Explainer(model, "0.backbone", channels=5).build(loader(images, labels))


def test_more_channels_than_the_layer_has_are_refused_at_the_first_batch() -> None:
    given = iter(loader(*pictures(20)))
    with pytest.raises(ValueError, match="`channels` must be at most the layer's C = 12, got 50"):
        explainer(channels=50).build(given)
    assert len(list(given)) == 3


def test_an_enumeration_that_no_one_would_wait_for_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows_module, "ENUMERATION_LIMIT", 1000)
    for make in (common, other):
        with pytest.raises(ValueError, match=r"'all' would list .* pairs, .* above the limit of"):
            explainer(make(), triplets="all", method="gradcam++").build(loader(*pictures(9)))
        explainer(make(), triplets="all").build(loader(*pictures(9)))


def test_preprocessing_is_kept_or_refused_before_the_work() -> None:
    images, labels = pictures(6)
    kept = {"size": 224, "mean": [0.5, 0.5, 0.5]}
    assert (
        explainer().build([(images, labels)], preprocessing=kept).manifest["preprocessing"] == kept
    )
    given = iter([(images, labels)])
    with pytest.raises(TypeError, match="`preprocessing` must be what JSON can hold"):
        explainer().build(given, preprocessing={"size": images})
    assert len(list(given)) == 1


def test_a_build_that_fails_leaves_the_database_that_was_there() -> None:
    images, labels = pictures(6)
    one = explainer()
    database = one.build([(images, labels)])
    with pytest.raises(ValueError, match="got none"):
        one.build([])
    assert one.database is database


def test_progress_is_shown_when_asked(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "LINE_SECONDS", 0.0)
    explainer().build(loader(*pictures(6)), progress=True)
    assert "embedding" in capsys.readouterr().err
    explainer().build(loader(*pictures(6)))
    assert capsys.readouterr().err == ""


def test_rows_that_are_not_compared_with_all_others_have_estimated_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images, labels = pictures(12)
    one = explainer(objective=gcfast.TripletLoss(5.0), triplets=2)
    exact = one.build(loader(images, labels))
    assert exact.report["estimated_counts"] == 0
    # Tables as small as this one are scanned.
    module = importlib.import_module("gcfast.ops.sample_triplets")
    monkeypatch.setattr(module, "default_tries", lambda _: 4096)
    tried = one.build(loader(images, labels), out=tmp_path / "db")
    assert tried.report["estimated_counts"] == len(tried) == 12
    assert tried.report == one.build(loader(images, labels)).report
    pairs = exact.triplet_counts.double()
    assert (pairs > 2).all()
    assert ((tried.triplet_counts - pairs).abs() <= pairs).all()


def test_triplets_drawn_for_many_rows_are_those_drawn_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = pictures(12)
    one = explainer(objective=gcfast.TripletLoss(5.0), triplets=2)
    wanted = one.build(loader(images, labels))
    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 3)
    for together in (1, 4, 100):
        monkeypatch.setattr(PairSource, "anchors_at_once", lambda *_, n=together: n)
        got = one.build(loader(images, labels))
        assert torch.equal(got.triplet_counts, wanted.triplet_counts)
        torch.testing.assert_close(got.weights, wanted.weights)
