"""Explanations against the formula by hand, and what becomes of the model."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import LOSSES, Oracle, squared
from networks import (
    CHANNELS,
    DIM,
    OTHER_HEADS,
    Lambda,
    Net,
    common,
    loader,
    other,
    pictures,
)
from torch import Tensor, nn

import gcfast
from gcfast import ops
from gcfast.explain import default as default_module

HEADS = {"closed form": common, "autograd": other}
BOTH = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
METHODS = pytest.mark.parametrize("method", ["gradcam", "gradcam++"])


def ready(model: nn.Module | None = None, count: int = 15, **settings: Any) -> gcfast.Explainer:
    """An explainer with a database."""
    settings.setdefault("channels", 5)
    one = gcfast.Explainer(common() if model is None else model, "backbone", **settings)
    one.build(loader(*pictures(count)))
    return one


def maps_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval().backbone(images)


def finished(cam: Tensor, size: tuple[int, int], normalize: str | None) -> Tensor:
    """[H, W] before the ReLU's result is scaled → [OH, OW]."""
    if normalize == "minmax":
        cam = cam - cam.min()
    if normalize is not None and cam.abs().max() > 0:
        cam = cam / cam.abs().max()
    return F.interpolate(cam[None, None], size, mode="bilinear", align_corners=False)[0, 0]


# --- transfer, by hand


@pytest.mark.parametrize("normalize", ["max", "minmax", None])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("center", [0.0, 0.7], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_explain_batch_equals_the_formula(
    k: int, center: float, relu: bool, normalize: str | None
) -> None:
    one = ready(k=k)
    database = one.database
    assert database is not None
    images, _ = pictures(4, size=(8, 12))
    got = one.explain_batch(images, center=center, relu=relu, normalize=normalize)

    activations = maps_of(one.network.model, images)
    table = database.embeddings
    with torch.no_grad():
        f = F.normalize(one.network.model(images), dim=1)
    tau = torch.cdist(table, table).square().sort(1).values[:, k].mean()
    for b in range(4):
        distances, rows = squared(f[b], table).sort()
        mixing = torch.softmax(-distances[:k] / tau, 0)
        cam = torch.zeros(4, 6)
        for share, row in zip(mixing, rows[:k], strict=True):
            cam += share * sum(
                weight * activations[b, channel]
                for weight, channel in zip(
                    database.weights[row], database.channels[row], strict=True
                )
            )
            cam -= center * share * database.offsets[row]
        cam = cam.clamp(min=0) if relu else cam
        torch.testing.assert_close(
            got[b], finished(cam, (8, 12), normalize), rtol=1e-4, atol=1e-6 * float(cam.abs().max())
        )


@pytest.mark.parametrize(
    ("size", "wanted"), [(None, (8, 8)), (5, (5, 5)), ((3, 20), (3, 20)), ([4, 4], (4, 4))], ids=str
)
def test_sizes(size: Any, wanted: tuple[int, int]) -> None:
    one, (images, _) = ready(), pictures(2)
    assert one.explain_batch(images, size=size).shape == (2, *wanted)
    assert one.explain_labelled(images, [0, 1], size=size).shape == (2, *wanted)


def test_maps_lie_between_0_and_1_and_reach_1_at_low_resolution() -> None:
    one, (images, _) = ready(), pictures(6)
    maps = one.explain_batch(images, size=(4, 4))
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(6))


def test_details_are_what_the_maps_rest_on() -> None:
    one = ready(k=2)
    database = one.database
    assert database is not None
    images, _ = pictures(4)
    why = one.explain_batch(images, details=True)
    torch.testing.assert_close(why.maps, one.explain_batch(images))
    with torch.no_grad():
        f = F.normalize(one.network.model.eval()(images), dim=1)
    torch.testing.assert_close(why.embeddings, f)
    distances, rows = torch.cdist(f, database.embeddings).square().sort(1)
    assert why.neighbors.tolist() == rows[:, :2].tolist()
    torch.testing.assert_close(why.distances, distances[:, :2], rtol=1e-3, atol=1e-5)
    assert torch.equal(why.labels, database.labels[rows[:, :2]])
    assert why.flat.tolist() == [False] * 4


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_labels_by_name(index: str) -> None:
    """Of a database with names, and with fewer rows than neighbors through an index."""
    if index != "exact":
        pytest.importorskip("faiss")
    images, labels = pictures(6)
    names = [("wren", "tit", "owl")[label] for label in labels]
    one = gcfast.Explainer(common(), "backbone", channels=5, k=7, index=index)
    one.build([(images, names)])
    why = one.explain_batch(images, details=True)
    assert [row[0] for row in why.label_names] == names
    assert [len(row) for row in why.label_names] == [why.labels.shape[1]] * 6
    for row, of in zip(why.neighbors.tolist(), why.label_names, strict=True):
        assert of == [names[r] if r >= 0 else "" for r in row]


def test_labels_without_names_are_their_numbers() -> None:
    one, (images, _) = ready(), pictures(4)
    why = one.explain_batch(images, details=True)
    assert why.label_names == [[str(label)] for label in why.labels[:, 0].tolist()]


def test_a_training_image_finds_its_own_row() -> None:
    images, labels = pictures(9)
    one = gcfast.Explainer(common(), "backbone", channels=5)
    one.build(loader(images, labels))
    why = one.explain_batch(images, details=True)
    assert why.neighbors[:, 0].tolist() == list(range(9))


def test_more_neighbours_than_rows() -> None:
    one, (images, _) = ready(count=4, k=6), pictures(2)
    why = one.explain_batch(images, details=True)
    assert why.neighbors[:, 4:].tolist() == [[-1, -1]] * 2
    assert why.labels[:, 4:].tolist() == [[-1, -1]] * 2
    assert torch.isinf(why.distances[:, 4:]).all()
    assert torch.isfinite(why.maps).all()
    assert not why.flat.any()


def test_a_table_of_twins_is_mixed_by_its_nearest() -> None:
    images, labels = pictures(6)
    twins = images[:1].expand(6, -1, -1, -1)
    one = gcfast.Explainer(
        common(), "backbone", channels=5, k=3, objective=lambda *given: given[0].sum(1) ** 2 + 1
    )
    one.build([(twins, labels)])
    why = one.explain_batch(images, details=True, normalize=None, relu=False)
    assert why.maps.abs().amax((1, 2)).min() > 0


def test_a_flat_map_is_zeros_and_says_so() -> None:
    one, (images, _) = ready(evidence="for"), pictures(3)
    assert one.database is not None
    one.database.weights.fill_(-1.0)
    why = one.explain_batch(images, details=True)
    assert why.flat.tolist() == [True] * 3
    assert torch.equal(why.maps, torch.zeros(3, 8, 8))


@pytest.mark.parametrize("details", [False, True])
def test_no_images(details: bool) -> None:
    one = ready(k=2)
    got = one.explain_batch(torch.zeros(0, 3, 8, 6), details=details)
    if details:
        assert got.embeddings.shape == (0, DIM)
        assert got.neighbors.shape == got.distances.shape == got.labels.shape == (0, 2)
        assert got.flat.shape == (0,)
        got = got.maps
    assert got.shape == (0, 8, 6)
    assert one.explain_labelled(torch.zeros(0, 3, 8, 6), []).shape == (0, 8, 6)
    empty = torch.zeros(0, 3, 8, 6)
    assert [m.shape for m in one.explain_triplet(empty, empty, empty)] == [(0, 8, 6)] * 3


def test_one_image_is_explained_as_in_a_batch() -> None:
    one, (images, labels) = ready(triplets=3), pictures(5)
    maps = one.explain_batch(images)
    own = one.explain_labelled(images, labels)
    for b in range(5):
        torch.testing.assert_close(
            one.explain_batch(images[b : b + 1])[0], maps[b], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            one.explain_labelled(images[b : b + 1], labels[b : b + 1])[0],
            own[b],
            rtol=1e-3,
            atol=1e-4,
        )


# --- the image's own triplets


@METHODS
@BOTH
def test_explain_labelled_equals_autograd_over_every_pair(make: Any, method: str) -> None:
    model = make()
    one = ready(
        model,
        count=8,
        triplets="all",
        method=method,
        objective=gcfast.DistanceDifference(),
    )
    database = one.database
    assert database is not None
    images, labels = pictures(2)
    got = one.explain_labelled(images, labels, normalize=None, relu=False)
    oracle = Oracle(model, "backbone")
    table = database.embeddings
    for b in range(2):
        pairs = [
            (table[p], table[n])
            for p in (database.labels == labels[b]).nonzero()
            for n in (database.labels != labels[b]).nonzero()
        ]
        weights = oracle.weights(
            images[b],
            [(p[0], n[0]) for p, n in pairs],
            LOSSES["DistanceDifference"],
            method,
            "for",
        )
        top = weights.topk(5)
        cam = (top.values[:, None, None] * oracle.maps(images[b])[top.indices]).sum(0)
        wanted = finished(cam, (8, 8), None)
        assert float((got[b] - wanted).norm() / wanted.norm()) < 1e-4


def test_a_training_image_is_explained_as_by_its_own_row_but_for_itself() -> None:
    images, labels = pictures(12)
    settings = {"channels": "all", "triplets": "all", "objective": gcfast.DistanceDifference()}
    one = gcfast.Explainer(common(), "backbone", **settings)
    database = one.build([(images, labels)])
    own = one.explain_labelled(images, labels, normalize=None, relu=False, size=(4, 4))
    transferred = one.explain_batch(images, normalize=None, relu=False, size=(4, 4))
    # As its own positive (distance 0, no pull) the image dilutes the mean of the others: among 4
    # positives instead of 3 the pull is mean(f_n) - (3 mean(f_p) + f_a) / 4, so the cotangents
    # differ by the image's own share alone.
    f = database.embeddings
    for row in range(12):
        same = labels == labels[row]
        same[row] = False
        away = 2 * (f[labels != labels[row]].mean(0) - f[same].mean(0))
        diluted = 2 * (f[labels != labels[row]].mean(0) - (3 * f[same].mean(0) + f[row]) / 4)

        def cam(cotangent: Tensor, row: int = row) -> Tensor:
            leaf = maps_of(one.network.model, images[row : row + 1]).requires_grad_()
            out = F.normalize(one.network.model.head(leaf), dim=1)
            (gradient,) = torch.autograd.grad(out, leaf, -cotangent[None])
            return (gradient.mean((2, 3))[..., None, None] * leaf.detach()).sum(1)[0]

        torch.testing.assert_close(transferred[row], cam(away), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(own[row], cam(diluted), rtol=1e-3, atol=1e-5)


def test_explain_labelled_takes_names() -> None:
    images, labels = pictures(9)
    names = [("robin", "wren", "tit")[i] for i in labels]
    one = gcfast.Explainer(common(), "backbone", channels=5)
    one.build([(images, names)])
    torch.testing.assert_close(
        one.explain_labelled(images, names), one.explain_labelled(images, labels)
    )
    with pytest.raises(ValueError, match="`labels` must be classes of the database, got 'owl'"):
        one.explain_labelled(images[:2], ["wren", "owl"])
    with pytest.raises(ValueError, match="`labels` must have B = 2 elements, got 1"):
        one.explain_labelled(images[:2], ["wren"])


def test_a_label_that_no_row_has_gives_zeros() -> None:
    one, (images, _) = ready(), pictures(2)
    assert torch.equal(one.explain_labelled(images, [99, 99]), torch.zeros(2, 8, 8))


# --- one given triplet


@METHODS
@pytest.mark.parametrize("evidence", ["for", "against"])
@BOTH
def test_explain_triplet_equals_autograd_for_all_three(
    make: Any, evidence: str, method: str
) -> None:
    model = make()
    one = gcfast.Explainer(
        model,
        "backbone",
        channels="all",
        method=method,
        evidence=evidence,
        objective=gcfast.DistanceDifference(),
    )
    images, _ = pictures(3, size=(8, 10))
    got = one.explain_triplet(*(i[None] for i in images), normalize=None, relu=False)
    oracle = Oracle(model, "backbone")
    runs = [oracle.run(image) for image in images]
    loss = LOSSES["DistanceDifference"](*(f for _, f in runs))
    sign = -1 if evidence == "for" else 1
    for (activations, _), maps in zip(runs, got, strict=True):
        (gradient,) = torch.autograd.grad(loss, activations, retain_graph=True)
        weights = ops.grad_weights(
            sign * gradient[None], activations=activations.detach(), method=method
        )[0]
        cam = (weights[:, None, None] * activations[0].detach()).sum(0)
        wanted = finished(cam, (8, 10), None)
        assert float((maps[0] - wanted).norm() / wanted.norm()) < 1e-4


def test_a_solved_triplet_is_explained_without_its_hinge_or_gives_zeros() -> None:
    a, p, n = (i[None] for i in pictures(3)[0])
    solved = {"objective": gcfast.TripletLoss(-10.0), "channels": 5}
    kept = gcfast.Explainer(common(), "backbone", **solved).explain_triplet(a, p, n)
    assert kept.anchor.max() > 0
    skipped = gcfast.Explainer(common(), "backbone", on_no_triplet="skip", **solved)
    assert all(maps.abs().max() == 0 for maps in skipped.explain_triplet(a, p, n))


def test_a_pair_objective_leaves_the_third_image_alone() -> None:
    a, p, n = (i[None] for i in pictures(3)[0])
    one = gcfast.Explainer(
        common(), "backbone", channels=5, objective=gcfast.PairDistance("positive")
    )
    maps = one.explain_triplet(a, p, n)
    assert maps.negative.abs().max() == 0
    assert maps.anchor.max() > 0


def test_explain_triplet_refuses_other_counts_and_a_center_without_database() -> None:
    one, (x, _) = gcfast.Explainer(common(), "backbone", channels=5), pictures(4)
    with pytest.raises(ValueError, match="must have the same B, got 2, 2, 1"):
        one.explain_triplet(x[:2], x[:2], x[:1])
    with pytest.raises(gcfast.NoDatabaseError, match="`center` must be 0 without a database"):
        one.explain_triplet(x[:2], x[:2], x[2:], center=1.0)
    with pytest.raises(TypeError, match=r"`positive` must be a torch.Tensor, got list"):
        one.explain_triplet(x, [x], x)  # type: ignore[arg-type]


def test_center_subtracts_the_mean_response_of_the_images_own_weights() -> None:
    one, (images, labels) = ready(channels="all"), pictures(3)
    assert one.database is not None
    raw = {"normalize": None, "relu": False, "size": (4, 4)}
    plain = one.explain_labelled(images, labels, **raw)
    centered = one.explain_labelled(images, labels, center=1.0, **raw)
    shift = (plain - centered).flatten(1)
    assert (shift - shift[:, :1]).abs().max() < 1e-6
    assert shift.abs().min() > 0


# --- the model is left as it was


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_model_is_untouched(head: str, training: bool) -> None:
    model = other() if head == "mlp" else common(norm=True)
    model.train(training)
    model.head[1].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: value.requires_grad for name, value in model.named_parameters()}
    strides = {name: value.stride() for name, value in model.named_parameters()}
    names = set(vars(model))
    images, labels = pictures(6)
    one = gcfast.Explainer(model, channels=5, method="gradcam++")
    one.build(loader(images, labels))
    one.explain_batch(images)
    one.explain_labelled(images, labels)
    one.explain_triplet(images[:2], images[2:4], images[4:])
    one.explain_toward(images, torch.ones(DIM))
    one.explain_pair(images[:3], images[3:], correspondence=True)
    with pytest.raises(RuntimeError):
        one.explain_batch(torch.randn(2, 5, 8, 8))
    assert set(vars(model)) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, value in model.named_parameters():
        assert value.grad is None
        assert value.requires_grad == grads[name]
        assert value.stride() == strides[name]
    for module in model.modules():
        assert module.training is training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@BOTH
def test_everything_works_under_inference_mode(make: Any) -> None:
    model, (images, labels) = make(), pictures(6)
    plain = gcfast.Explainer(model, channels=5, objective=LOSSES["DistanceDifference"])
    one = gcfast.Explainer(model, channels=5, objective=LOSSES["DistanceDifference"])

    def run(explainer: gcfast.Explainer) -> list[Any]:
        x = images.clone()
        explainer.build(loader(x, labels))
        return [
            explainer.explain_batch(x),
            explainer.explain_labelled(x, labels),
            *explainer.explain_triplet(x[:2], x[2:4], x[4:]),
            explainer.explain_toward(x, torch.ones(DIM)),
            *explainer.explain_pair(x[:3], x[3:], correspondence=True),
        ]

    wanted = run(plain)
    with torch.inference_mode():
        got = run(one)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.clone(), b)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_in_other_precisions(make: Any, dtype: torch.dtype) -> None:
    model = make()
    images, labels = pictures(9)
    settings = {"channels": "all", "objective": gcfast.DistanceDifference()}
    wanted = gcfast.Explainer(model, "backbone", **settings)
    wanted.build(loader(images, labels))
    maps = wanted.explain_batch(images)
    one = gcfast.Explainer(model.to(dtype), "backbone", **settings)
    database = one.build(loader(images, labels))
    assert database.embeddings.dtype == database.weights.dtype == torch.float32
    assert database.manifest["closed_form"] is (make is common)
    got = one.explain_batch(images.to(dtype))
    assert got.dtype == torch.float32
    assert (got - maps).abs().mean() < {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 1e-4)
    with pytest.raises(TypeError, match=r"`images` must have the model's dtype, .*, got float32"):
        one.explain_batch(images)


def test_autocast_is_for_the_model_and_not_for_our_sums() -> None:
    model, (images, labels) = common(), pictures(24)
    images = images[:1] + 0.1 * images  # so close that bfloat16 cannot tell the rows apart
    one = gcfast.Explainer(model, "backbone", channels=5, k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        database = one.build(loader(images, labels))
        why = one.explain_batch(images, details=True)
        assert one.network.embed(images).output.dtype == torch.bfloat16
    assert database.manifest["closed_form"]
    assert why.neighbors[:, 0].tolist() == list(range(24))
    assert why.maps.dtype == torch.float32


def test_the_models_own_error_comes_through_and_the_next_call_works() -> None:
    one, (images, _) = ready(), pictures(2)
    wanted = one.explain_batch(images)
    with pytest.raises(RuntimeError, match="expected input"):
        one.explain_batch(torch.randn(2, 4, 8, 8))
    torch.testing.assert_close(one.explain_batch(images), wanted)


def test_a_model_without_parameters() -> None:
    model = nn.Sequential(Lambda(lambda x: torch.cat([x, -x], 1)), Lambda(lambda x: x.mean((2, 3))))
    one = gcfast.Explainer(model, "0", channels=3)
    images, labels = pictures(6)
    assert one.build([(images, labels)]).manifest["closed_form"]
    assert one.explain_batch(images.double()).shape == (6, 8, 8)


def test_embeddings_of_zero_are_no_trouble() -> None:
    factor = 1.0
    one = gcfast.Explainer(
        Net(Lambda(lambda maps: factor * maps.mean((2, 3)))), "backbone", channels=5
    )
    images, labels = pictures(6)
    one.build([(images, labels)])  # a build of zeros is refused
    factor = 0.0
    why = one.explain_batch(images, details=True)
    assert torch.equal(why.embeddings, torch.zeros(6, CHANNELS))
    assert torch.isfinite(why.maps).all()


def test_memory_is_flat() -> None:
    one, (images, labels) = ready(other()), pictures(2)

    def work(times: int) -> None:
        for _ in range(times):
            one.explain_batch(images)
            one.explain_labelled(images, labels)

    work(5)
    tracemalloc.start()
    try:
        work(5)
        before = tracemalloc.get_traced_memory()[0]
        work(50)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000, f"{grown} bytes in 50 calls"


# --- bad input


def test_explaining_before_there_is_a_database(monkeypatch: Any) -> None:
    one, (images, _) = gcfast.Explainer(common(), channels=5), pictures(2)
    with pytest.raises(gcfast.NoDatabaseError, match=r"call build\(loader\), or gcfast.load"):
        one.explain_batch(images)
    with pytest.raises(gcfast.NoDatabaseError, match=r"call build\(loader\), or gcfast.load"):
        one.explain_labelled(images, [0, 1])
    monkeypatch.setattr(default_module, "_default", None)
    with pytest.raises(gcfast.NoDatabaseError, match=r"call gcfast.load first"):
        gcfast.explain_batch(images)


BAD_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "numpy": (lambda x: x.numpy(), TypeError, "`images` must be a torch.Tensor, got ndarray"),
    "rank": (lambda x: x[0], ValueError, r"shape \[B, 3, h, w\], got \[3, 8, 8\]"),
    "uint8": (lambda x: x.byte(), TypeError, "must be floating point, .* got uint8"),
    "float64": (lambda x: x.double(), TypeError, "model's dtype, float32, got float64"),
    "float16": (lambda x: x.half(), TypeError, "model's dtype, float32, got float16"),
    "device": (lambda x: x.to("meta"), ValueError, "on the model's device, cpu, got meta"),
    "nan": (
        lambda x: x.index_fill(0, torch.tensor(1), float("nan")),
        ValueError,
        "`images` must be finite, got NaN or infinity in row 1$",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_in_words(name: str) -> None:
    change, error, words = BAD_IMAGES[name]
    one, (images, _) = ready(), pictures(3)
    with pytest.raises(error, match=words):
        one.explain_batch(change(images))
    with pytest.raises(error, match=words):
        one.explain_labelled(change(images), [0] * len(change(images)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"normalize": "sum"}, ValueError, "`normalize` must be one of 'max', 'minmax', None"),
        ({"center": float("nan")}, ValueError, "`center` must be finite, got nan"),
        ({"center": None}, TypeError, "`center` must be a number, got None"),
        ({"size": 0}, ValueError, "`size` must be at least 1, got 0"),
        ({"size": (4, 4, 4)}, TypeError, r"`size` must be \(OH, OW\) or one int"),
        ({"size": 1.5}, TypeError, r"`size` must be \(OH, OW\) or one int for both, got 1.5"),
        ({"size": (4, 2.5)}, TypeError, "`size` must be an int, got 2.5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_in_words(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    one, (images, labels) = ready(), pictures(2)
    for call in (
        lambda: one.explain_batch(images, **options),
        lambda: one.explain_labelled(images, labels, **options),
        lambda: one.explain_triplet(images, images, images, **options),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"method": "cam"}, ValueError, "`method` must be one of 'gradcam', 'gradcam\\+\\+'"),
        ({"evidence": "both"}, ValueError, "`evidence` must be one of 'for', 'against'"),
        ({"triplets": 0}, ValueError, "`triplets` must be at least 1, got 0"),
        ({"triplets": "many"}, TypeError, "`triplets` must be an int or \"all\", got 'many'"),
        ({"channels": True}, TypeError, '`channels` must be an int or "all", got True'),
        ({"k": 0}, ValueError, "`k` must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "`seed` must be from 0 to"),
        ({"l2_normalize": 1}, TypeError, "`l2_normalize` must be a bool, got 1"),
        ({"on_no_triplet": "stop"}, ValueError, "`on_no_triplet` must be one of 'hardest', 'skip'"),
        ({"objective": gcfast.TripletLoss}, TypeError, "`objective` must be an Objective such as"),
        ({"database": "birds"}, TypeError, "`database` must be a gcfast.Database, got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_in_words(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        gcfast.Explainer(common(), "backbone", **settings)


def test_the_papers_settings_are_accepted() -> None:
    one = gcfast.Explainer(common(), "backbone", **(gcfast.PAPER | {"channels": 5}))
    assert one.settings.evidence == "against"
    assert one.info()["settings"]["objective"] == {"name": "TripletLoss", "margin": 0.2}


def test_info_names_the_layer_and_the_memory_format() -> None:
    class Views(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.backbone(images).view(len(images), -1))

    one = gcfast.Explainer(Views(nn.Linear(16 * CHANNELS, DIM)), channels=5)
    assert one.info()["layer"] is None
    assert one.info()["channels_last"] is True
    one.build(loader(*pictures(6)))
    info = one.info()
    assert info["layer"] == one.layer_name == "backbone"
    assert info["channels_last"] is False
    assert "6 rows" in info["database"]


def test_embeddings_in_a_dict() -> None:
    images, labels = pictures(6)
    model = nn.Sequential(common(), Lambda(lambda x: {"embedding": x, "other": x[:, :1]}))
    one = gcfast.Explainer(model, "0.backbone", channels=5, output_key="embedding")
    plain = gcfast.Explainer(model[0], "backbone", channels=5)
    assert torch.equal(
        one.build([(images, labels)]).weights, plain.build([(images, labels)]).weights
    )
    torch.testing.assert_close(one.explain_batch(images), plain.explain_batch(images))


def test_every_other_head_explains() -> None:
    images, labels = pictures(6)
    for name, head in OTHER_HEADS.items():
        one = gcfast.Explainer(Net(head(CHANNELS)), "backbone", channels=5)
        one.build([(images, labels)])
        assert torch.isfinite(one.explain_batch(images)).all(), name
