"""The table of seventeen ways to make a map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import common, loader, other, pictures
from torch import Tensor, nn

import gcfast
from gcfast.evaluation.table import MAIN_ROW, quality_table, quality_tables, statistics
from gcfast.evaluation.ways import Trained, from_database, strongest
from gcfast.metrics import RegionSums, mask_score

CHANNELS = 52
ROWS = [
    "uniform",
    "channel sum",
    "random channels",
    "random neighbor",
    "EmbeddingCAM",
    *(
        f"{method}, {evidence}, {what}"
        for method in ("Grad-CAM", "Grad-CAM++")
        for evidence in ("for", "against")
        for what in ("one triplet", "all channels", "top-50")
    ),
]


class Kept:
    """A score that keeps the maps it was given, 17 a batch."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.names: list[list[str]] = []

    def __call__(self, maps: Tensor, truth: Any, names: list[str]) -> dict[str, Tensor]:
        self.maps.append(maps)
        self.names.append(names)
        scores = maps.mean((1, 2))
        return {"mean": scores, "some": torch.where(truth > 0, scores, float("nan"))}


def tabled(center: float = 0.0) -> tuple[Any, gcfast.Explainer, Tensor, Kept]:
    one = gcfast.Explainer(common(CHANNELS), "backbone", channels=50)
    images, labels = pictures(12)
    names = [("a", "b", "c")[i] for i in labels]
    test, kept = pictures(4)[0], Kept()
    truth = torch.tensor([1, 0, 1, 0])
    batches = [(test[:3], truth[:3]), (test[3:], truth[3:])]
    table = quality_table(one, loader(images, names), iter(batches), kept, center=center)
    one.database = gcfast.Explainer(one.network.model, "backbone").build(loader(images, names))
    return table, one, test, kept


class Patches(nn.Module):
    """The mean of patches of 4 x 4, which leave a rest of an image of 18."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 60, 4, 4), nn.LayerNorm(60)
        self.head = nn.Linear(60, 6)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1))


def test_patches_that_do_not_cover_the_images_are_refused() -> None:
    images, labels = pictures(12, size=(18, 18))
    explainer = gcfast.Explainer(Patches())
    explainer.build(loader(images, labels))
    with pytest.raises(gcfast.UnsupportedModelError, match=r"got \[4, 4\] of them for \[18, 18\]"):
        quality_table(explainer, loader(images, labels), [(images, None)], lambda *_: {})


def test_rows_columns_and_means() -> None:
    table, _, _, kept = tabled()
    assert [name for name, _ in table.rows] == ROWS
    assert table.columns == ["mean", "some"]
    assert len(kept.maps) == 2 * 17
    for name, means in table.rows:
        scores = table.scores[name]
        assert scores["mean"].shape == (4,)
        assert means["mean"] == pytest.approx(float(scores["mean"].mean()))
        assert means["some"] == pytest.approx(float(scores["mean"][[0, 2]].mean()))
    text = str(table).splitlines()
    assert len(text) == 18
    assert len({len(line) for line in text}) == 1
    assert table.cells()[1] == ["uniform", "1.000", "1.000"]


def test_several_centres_share_one_pass_and_change_nothing() -> None:
    single = {}
    for center in (0.0, 1.0):
        torch.manual_seed(0)
        single[center] = tabled(center)[0]
    torch.manual_seed(0)
    one = gcfast.Explainer(common(CHANNELS), "backbone", channels=50)
    images, labels = pictures(12)
    names = [("a", "b", "c")[i] for i in labels]
    test, truth = pictures(4)[0], torch.tensor([1, 0, 1, 0])
    batches = iter([(test[:3], truth[:3]), (test[3:], truth[3:])])  # one pass is all it allows
    tables = quality_tables(one, loader(images, names), batches, Kept(), centers=(0.0, 1.0))
    assert len(tables) == 2
    for center, table in zip((0.0, 1.0), tables, strict=True):
        for name in ROWS:
            assert torch.equal(table.scores[name]["mean"], single[center].scores[name]["mean"])
    assert not torch.equal(
        tables[0].scores["channel sum"]["mean"], tables[1].scores["channel sum"]["mean"]
    )


@pytest.mark.parametrize("center", [0.0, 1.0])
def test_the_main_row_is_what_explain_batch_gives(center: float) -> None:
    table, one, test, kept = tabled(center)
    maps = torch.cat([kept.maps[ROWS.index(MAIN_ROW)], kept.maps[17 + ROWS.index(MAIN_ROW)]])
    torch.testing.assert_close(maps, one.explain_batch(test, center=center), rtol=1e-4, atol=1e-5)
    assert one.database is not None
    assert torch.equal(table.database.weights, one.database.weights)
    why = one.explain_batch(test, details=True)
    nearest = [one.database.label_name(label) for label in why.labels[:, 0].tolist()]
    assert kept.names[0] + kept.names[17] == nearest


def test_the_controls_are_what_they_say() -> None:
    _, one, test, kept = tabled()
    with torch.no_grad():
        activations = one.network.model.eval().backbone(test[:3])

    def finished(cam: Tensor) -> Tensor:
        cam = cam.clamp(min=0)
        cam = cam / cam.amax((1, 2), keepdim=True)
        return F.interpolate(cam[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0]

    maps = dict(zip(ROWS, kept.maps[:17], strict=True))
    assert torch.equal(maps["uniform"], torch.ones(3, 8, 8))
    torch.testing.assert_close(maps["channel sum"], finished(activations.sum(1)))

    # EmbeddingCAM by autograd: similarity to the mean embedding of the nearest row's class.
    database = one.database
    assert database is not None
    leaf = activations.clone().requires_grad_()
    f = F.normalize(one.network.model.head(leaf), dim=1)
    labels = one.explain_batch(test[:3], details=True).labels[:, 0]
    proxies = torch.stack([database.embeddings[database.labels == i].mean(0) for i in labels])
    (gradient,) = torch.autograd.grad((f * proxies).sum(), leaf)
    cam = (gradient.mean((2, 3))[..., None, None] * activations).sum(1)
    torch.testing.assert_close(maps["EmbeddingCAM"], finished(cam), rtol=1e-3, atol=1e-4)


def test_the_table_depends_on_the_seed_and_not_on_the_batches() -> None:
    one = gcfast.Explainer(common(CHANNELS), "backbone")
    images, labels = pictures(24)
    test = pictures(11)[0]
    truth = torch.arange(11) % 2

    def scored(sizes: list[int], seed: int = 0) -> dict[str, dict[str, Tensor]]:
        batches = zip(test.split(sizes), truth.split(sizes), strict=True)
        return quality_table(one, loader(images, labels), batches, Halves(), seed=seed).scores

    whole = scored([11])
    for sizes in ([1] * 11, [4, 4, 3], [2, 9]):
        for name, columns in scored(sizes).items():
            for column, values in columns.items():
                torch.testing.assert_close(
                    values, whole[name][column], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
                )
    other = scored([11], seed=1)
    for name, columns in whole.items():
        same = bool(torch.isclose(columns["left"], other[name]["left"], rtol=1e-4).all())
        assert same == (not name.startswith("random")), name


def test_what_cannot_be_tabled_is_refused() -> None:
    images, labels = pictures(9)
    batches = [(images[:2], torch.ones(2))]
    with pytest.raises(gcfast.UnsupportedModelError, match="averages the activations and maps"):
        quality_table(
            gcfast.Explainer(other(CHANNELS), "backbone"), [(images, labels)], batches, Kept()
        )
    one = gcfast.Explainer(common(CHANNELS), "backbone")
    with pytest.raises(ValueError, match="`test_batches` must give images, got none"):
        quality_table(one, [(images, labels)], [], Kept())
    bad = images.index_fill(0, torch.tensor(1), float("nan"))
    with pytest.raises(ValueError, match="`images` must be finite, got NaN or infinity in row 1"):
        quality_table(one, [(images, labels)], [(bad[:2], torch.ones(2))], Kept())
    with pytest.raises(ValueError, match="`channels` must be at most the layer's C = 12, got 50"):
        quality_table(gcfast.Explainer(common(), "backbone"), [(images, labels)], batches, Kept())


class Halves:
    """The share of heat on the left and on the right half, by regions."""

    def regions(self, truth: Tensor) -> Tensor:
        masks = torch.zeros(len(truth), 2, 8, 8, dtype=torch.bool)
        masks[:, 0, :, :4] = masks[:, 1, :, 4:] = True
        return masks

    def scores(self, sums: RegionSums, truth: Tensor, _names: list[str]) -> dict[str, Tensor]:
        left, right = sums.shares().unbind(2)
        return {"left": left, "right": torch.where(truth[:, None] > 0, right, float("nan"))}


def by_maps(maps: Tensor, truth: Tensor, _names: list[str]) -> dict[str, Tensor]:
    masks = Halves().regions(truth)
    right = mask_score(maps, masks[:, 1])
    return {
        "left": mask_score(maps, masks[:, 0]),
        "right": torch.where(truth > 0, right, float("nan")),
    }


def test_regions_and_whole_maps_score_alike() -> None:
    images, labels = pictures(12)
    test, truth = pictures(5)[0], torch.tensor([1, 0, 1, 0, 1])
    batches = [(test[:3], truth[:3]), (test[3:], truth[3:])]
    one = gcfast.Explainer(common(CHANNELS), "backbone", channels=50)
    fast, slow = (
        quality_tables(one, loader(images, labels), batches, score) for score in (Halves(), by_maps)
    )
    for a, b in zip(fast, slow, strict=True):
        assert a.columns == b.columns == ["left", "right"]
        for name in ROWS:
            for column in a.columns:
                torch.testing.assert_close(
                    a.scores[name][column],
                    b.scores[name][column],
                    rtol=1e-5,
                    atol=1e-6,
                    equal_nan=True,
                )


def test_class_proxies_are_not_taken_for_gradients() -> None:
    one = gcfast.Explainer(common(CHANNELS), "backbone", method="proxy")
    with pytest.raises(ValueError, match="of grad-weights to be evaluated, got method='proxy'"):
        Trained(one, loader(*pictures(20)), False)


def test_rows_weights_are_those_of_a_build() -> None:
    """Made for the asked rows alone, dense, they are what the database of the variant holds."""
    images, labels = pictures(20)
    model = common(CHANNELS)
    trained = Trained(gcfast.Explainer(model, "backbone"), loader(images, labels), False)
    rows = torch.tensor([7, 2, 19])
    for triplets in (1, 50, "all"):
        part = trained.cotangents(rows, triplets)
        for method in ("gradcam", "gradcam++"):
            if (method, triplets) == ("gradcam++", "all"):
                continue  # the mean cotangent is not enough there
            for evidence in ("for", "against"):
                one = gcfast.Explainer(
                    model,
                    "backbone",
                    method=method,
                    evidence=evidence,
                    triplets=triplets,
                    channels="all",
                )
                database = one.build(loader(images, labels))
                wanted = from_database(database, rows, CHANNELS, torch.device("cpu"))
                got = trained.weights(rows, part, method, evidence)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
                (top,) = strongest(got, [5])
                channels, values = gcfast.ops.top_m(got, 5)
                again = torch.zeros_like(got).scatter_(1, channels, values)
                assert torch.equal(top, again)


def test_strongest_ties_go_to_the_lower_channel() -> None:
    weights = torch.tensor([[1.0, 3.0, 1.0, 3.0, -1.0]])
    one, three, every = strongest(weights, [1, 3, 5])
    assert one.tolist() == [[0, 3, 0, 0, 0]]
    assert three.tolist() == [[1, 3, 0, 3, 0]]
    assert torch.equal(every, weights)


def test_statistics_by_hand() -> None:
    nan = float("nan")
    values = torch.tensor([[1.0, 0.5], [nan, nan], [3.0, 0.5], [2.0, 0.5]])
    first, second = statistics(values)
    assert (first.images, first.mean, first.deviation) == (3, 2.0, 1.0)
    assert second == (3, 0.5, 0.0, 0.5, 0.5)
    # Columns that other images have are what each is alone.
    apart = torch.stack([values[:, 0], torch.tensor([nan, 4.0, nan, 6.0])], 1)
    assert statistics(apart, seed=2) == [
        *statistics(apart[:, :1], seed=2),
        *statistics(apart[:, 1:], seed=2),
    ]
    assert [(one.images, one.mean) for one in statistics(apart)] == [(3, 2.0), (2, 5.0)]
    (empty,) = statistics(values[1:2, :1])
    assert empty.images == 0
    assert empty.mean != empty.mean


def test_the_bootstrap_interval_covers_what_theory_says() -> None:
    values = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1)).double()
    (one,) = statistics(values, seed=3)
    half = 1.96 * one.deviation / 2000**0.5
    assert one.low == pytest.approx(one.mean - half, abs=0.15 * half)
    assert one.high == pytest.approx(one.mean + half, abs=0.15 * half)
    assert statistics(values, seed=3) == [one]
    assert statistics(values, seed=4) != [one]
