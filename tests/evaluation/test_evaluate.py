"""What is measured around the table: sweeps, k-means, localisation and fidelity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DIM, Net, common, loader, pictures
from torch import Tensor

import gcfast
from gcfast.evaluation.datasets import Truth
from gcfast.evaluation.measure import AnnotationScore, Evaluation, evaluate
from gcfast.evaluation.table import MAIN_ROW
from gcfast.metrics import cosine, flat_maps, pointing_game, spearman
from gcfast.metrics.controls import random_rows

pytest.importorskip("scipy", reason="SciPy (gcfast's extra evaluate) is not installed")

CHANNELS = 52
NAMES = ("a", "b", "c")


def truth(labels: list[str]) -> Truth:
    masks = torch.zeros(len(labels), 8, 8, dtype=torch.bool)
    masks[:, 2:7, 1:5] = True
    boxes = [torch.tensor([[1, 2, 5, 7]])] * len(labels)
    return Truth([str(i) for i in range(len(labels))], labels, boxes, masks, masks)


def measured(
    test_labels: list[str], refine: str | None = None, **settings: Any
) -> tuple[Evaluation, gcfast.Explainer, Tensor, list[Any]]:
    """An evaluation on 24 rows of three classes and two batches of test images."""
    images, labels = pictures(24)
    train = loader(images, [NAMES[i] for i in labels])
    test = pictures(len(test_labels))[0]
    one = gcfast.Explainer(common(CHANNELS), "backbone", refine=refine)
    batches = [(test[:5], truth(test_labels[:5])), (test[5:], truth(test_labels[5:]))]
    found = evaluate(
        one,
        train,
        batches,
        AnnotationScore(),
        labels=lambda t: t.labels,
        localised=lambda t: (t.boxes, t.masks),
        **settings,
    )
    return found, one, test, train


def on_large(maps: Tensor) -> Tensor:
    """Low-resolution maps [B, H, W] where the fidelity compares them."""
    size = (8 * maps.shape[1], 8 * maps.shape[2])
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("refine", [None, "auto"])
def test_fidelity_of_known_classes_is_explain_labelled(refine: str | None) -> None:
    labels = [NAMES[i % 3] for i in range(9)]
    found, one, test, train = measured(labels, refine)
    one.build(train)
    captured = one.network.embed(test, finer=True)
    low = (captured.activations, *captured.finer)[-1].shape[2:]
    assert low == ((4, 4) if refine is None else (8, 8))
    own = on_large(one.explain_labelled(test, labels, size=tuple(low)))
    why = one.explain_batch(test, size=tuple(low), details=True)
    lent = on_large(why.maps)
    fidelity = found.fidelity
    assert fidelity is not None
    torch.testing.assert_close(fidelity.distances, why.distances[:, 0])
    torch.testing.assert_close(fidelity.cosine, cosine(own, lent), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fidelity.spearman, spearman(own, lent), rtol=1e-3, atol=1e-3)
    rows = random_rows(torch.arange(9), 24, 0)  # as the table draws them
    assert one.database is not None
    random = gcfast.ops.sparse_cam(
        captured.activations,
        rows[:, None],
        one.database.channels,
        one.database.weights,
        size=(4, 4),
    )
    for output in captured.finer:
        random = gcfast.ops.refine(random, output)
    assert fidelity.control is not None
    wanted = cosine(own, on_large(random))
    torch.testing.assert_close(fidelity.control, wanted, rtol=1e-4, atol=1e-4)
    flat = flat_maps(own) | flat_maps(lent)
    assert (fidelity.flat, fidelity.unknown) == (int(flat.sum()), 0)


def test_fidelity_of_new_classes_draws_on_the_test_images() -> None:
    """An image's own triplets are those that its row would have in a database of both sets."""
    labels = ["x", "y", "x", "y", "x", "y", "y", "x", "z"]
    found, one, test, train = measured(labels)
    both = gcfast.Explainer(one.network.model, "backbone")
    database = both.build([*train, (test, labels)])
    assert len(database) == 24 + 8  # z has no partner
    activations = one.network.embed(test[:8]).activations
    rows = torch.arange(24, 32)[:, None]
    low = tuple(activations.shape[2:])
    own = gcfast.ops.sparse_cam(activations, rows, database.channels, database.weights, size=low)
    one.build(train)
    lent = one.explain_batch(test[:8], size=low)
    fidelity = found.fidelity
    assert fidelity is not None
    assert (len(fidelity), fidelity.unknown) == (8, 1)
    wanted = cosine(on_large(own), on_large(lent))
    torch.testing.assert_close(fidelity.cosine, wanted, rtol=1e-4, atol=1e-4)


def test_fidelity_is_of_a_spread_sample() -> None:
    found, *_ = measured([NAMES[i % 3] for i in range(9)], total=3 * 256)
    assert found.fidelity is not None
    assert len(found.fidelity) == 3  # images 0, 3 and 6
    assert found.images == 9
    labels = ["x", "y", "z", "u", "v", "w", "t", "s", "r"]
    assert measured(labels)[0].fidelity is None  # nothing has a partner


def test_centres_are_scored_by_what_compresses() -> None:
    calls: list[int] = []

    def compress(database: gcfast.Database, centers: int) -> gcfast.Database:
        """Not k-means: the first rows, which is enough to see whose rows are used."""
        calls.append(centers)
        names = ("embeddings", "channels", "weights", "offsets", "labels", "triplet_counts")
        tensors = {name: getattr(database, name)[:centers] for name in names}
        return gcfast.Database(tensors, database.ids[:centers], database.manifest)

    found, *_ = measured(["a"] * 8, compress=compress, center_counts=(1, 5, 24, 25))
    assert calls == [1, 5, 24]  # there are no 25 rows
    assert found.center_counts == (1, 5, 24)
    plain = found.tables[0.0]
    for column in plain.columns:
        # All the rows are the database itself.
        torch.testing.assert_close(plain.extra["K=24"][column], plain.scores[MAIN_ROW][column])
    assert not torch.allclose(plain.extra["K=1"]["mask"], plain.scores[MAIN_ROW]["mask"])
    assert measured(["a"] * 8)[0].center_counts == ()


def test_sweeps_and_localisation() -> None:
    found, one, test, train = measured(["a"] * 8, triplet_counts=(1, 50, "all"))
    plain = found.tables[0.0]
    assert found.channel_counts == (1, 2, 5, 10, 20, 50, 52)
    assert {"M=1, for", "M=52, against", "T=1", "T=50", "T=all"} <= plain.extra.keys()
    for a, b in (
        ("T=50", MAIN_ROW),
        ("M=50, against", "Grad-CAM, against, top-50"),
        ("M=52, for", "Grad-CAM, for, all channels"),
    ):
        torch.testing.assert_close(plain.extra[a]["mask"], plain.scores[b]["mask"])
    whole = gcfast.Explainer(one.network.model, "backbone", triplets="all")
    whole.build(train)
    maps = whole.explain_batch(test)
    wanted = gcfast.metrics.mask_score(maps, truth(["a"] * 8).masks)
    torch.testing.assert_close(plain.extra["T=all"]["mask"], wanted, rtol=1e-4, atol=1e-5)

    database = one.build(train)
    first = database.channels[:, 0].bincount(minlength=CHANNELS)
    assert torch.equal(found.top_channels, first)
    hits = pointing_game(one.explain_batch(test), truth(["a"] * 8).masks)
    assert torch.equal(found.localisation.pointing[MAIN_ROW], hits)
    assert found.localisation.iou[MAIN_ROW].shape == (8, 9)
    assert found.flat == 0


def test_thorough_localises_every_row_and_measures_max_box_acc() -> None:
    labels = ["a"] * 8
    torch.manual_seed(0)
    quick = measured(labels, triplet_counts=(1,))[0]
    torch.manual_seed(0)  # the same network and pictures
    found, one, test, train = measured(labels, triplet_counts=(1,), thorough=True)
    rows = [*found.tables[0.0].scores, f"{MAIN_ROW}, center=1"]
    assert len(rows) == 18
    assert set(found.localisation.iou) == set(found.localisation.pointing) == set(rows)
    assert list(quick.localisation.best) == []
    for name, iou in quick.localisation.iou.items():
        assert torch.equal(found.localisation.iou[name], iou)
    assert list(found.localisation.best) == list(quick.localisation.iou)
    one.build(train)
    for center, name in ((0.0, MAIN_ROW), (1.0, f"{MAIN_ROW}, center=1")):
        maps = one.explain_batch(test, center=center)
        wanted = gcfast.metrics.best_box_iou(maps, truth(labels).boxes)
        torch.testing.assert_close(found.localisation.best[name], wanted)


def test_all_that_is_measured_shares_one_forward_pass() -> None:
    seen: list[Tensor] = []
    register = torch.nn.modules.module.register_module_forward_pre_hook
    hook = register(
        lambda module, inputs: seen.append(inputs[0]) if isinstance(module, Net) else None
    )
    try:
        test = measured(["a"] * 8, thorough=True)[2]
    finally:
        hook.remove()
    times = [
        sum(bool((other == image).all()) for batch in seen for other in batch) for image in test
    ]
    assert times == [3] + [1] * 7  # the first two more times, to find the layers that refine


def test_prices_are_not_evaluated_as_classes() -> None:
    objective = gcfast.RankLoss(torch.nn.Linear(DIM, 2))
    images, _ = pictures(9)
    one = gcfast.Explainer(common(CHANNELS), "backbone", objective=objective, l2_normalize=False)
    with pytest.raises(ValueError, match=r"`explainer` must have .* over classes .*got RankLoss"):
        evaluate(
            one,
            loader(images, torch.arange(9.0)),
            [(images, truth(["a"] * 9))],
            AnnotationScore(),
            labels=lambda t: t.labels,
            localised=lambda t: (t.boxes, t.masks),
        )


def test_boxes_alone_give_one_column() -> None:
    score = AnnotationScore()
    boxes_only = truth(["a"] * 3)._replace(masks=None)
    assert score.regions(boxes_only).shape == (3, 1, 8, 8)
    sums = gcfast.metrics.region_sums(torch.rand(3, 2, 4, 4), score.regions(boxes_only))
    assert list(score.scores(sums, boxes_only, [])) == ["box"]
