"""The table beyond the paper, and what a confidence is worth."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from networks import Pool, common, loader, pictures
from torch import Tensor

import gcfast
from gcfast.evaluation.beyond import CENTERED_ROW, FROM_TABLE, gains
from gcfast.evaluation.datasets import Truth
from gcfast.evaluation.measure import AnnotationScore, Evaluation, evaluate
from gcfast.evaluation.reliability import Reliability
from gcfast.evaluation.report import beyond_text
from gcfast.evaluation.ways import MAIN_ROW, PROXY_ROW
from gcfast.explain.calibration import transfer_fidelity
from gcfast.explain.confidence import MIN_IMAGES, Confidence
from gcfast.metrics import mask_score, ranking_scores

pytest.importorskip("scipy", reason="SciPy (gcfast's extra evaluate) is not installed")

CHANNELS = 52
NAMES = ("a", "b", "c")


class Case:
    """24 rows of three classes, and so many test images in batches of five."""

    def __init__(self, count: int, network: torch.nn.Module | None = None) -> None:
        torch.manual_seed(0)
        images, labels = pictures(24)
        self.train = loader(images, [NAMES[i] for i in labels])
        self.test, numbers = pictures(count)
        self.labels = [NAMES[i] for i in numbers]
        self.masks = torch.zeros(count, 8, 8, dtype=torch.bool)
        self.masks[:, 2:7, 1:5] = True
        self.network = common(CHANNELS) if network is None else network

    def batches(self) -> list[tuple[Tensor, Truth]]:
        found = []
        for start in range(0, len(self.test), 5):
            part = slice(start, start + 5)
            ids, masks = [str(i) for i in range(len(self.test))][part], self.masks[part]
            boxes = [torch.tensor([[1, 2, 5, 7]])] * len(ids)
            truth = Truth(ids, self.labels[part], boxes, masks, masks)
            found.append((self.test[part], truth))
        return found

    def explainer(self, **settings: Any) -> gcfast.Explainer:
        return gcfast.Explainer(self.network, "backbone", **settings)

    def measured(self, refine: str | None = None, **settings: Any) -> Evaluation:
        settings = {"objects": lambda truth, _: truth.masks} | settings
        return evaluate(
            self.explainer(refine=refine),
            self.train,
            self.batches(),
            AnnotationScore(),
            labels=lambda truth: truth.labels,
            localised=lambda _: None,
            triplet_counts=(),
            **settings,
        )


def test_rows_are_what_explainers_give() -> None:
    case = Case(8)
    found = case.measured().beyond
    plain = (*FROM_TABLE, CENTERED_ROW, PROXY_ROW)
    assert list(found.scores) == [n for row in plain for n in (row, f"{row}, refined")]
    assert found.columns == ["box", "mask", "AP", "IoU"]
    for row, settings, center in (
        (PROXY_ROW, {"method": "proxy"}, 0.0),
        (CENTERED_ROW, {}, 1.0),
    ):
        for name, refine in ((row, None), (f"{row}, refined", "auto")):
            one = case.explainer(refine=refine, **settings)
            one.build(case.train)
            maps = one.explain_batch(case.test, center=center)
            wanted = (mask_score(maps, case.masks), *ranking_scores(maps, case.masks))
            for column, values in zip(("mask", "AP", "IoU"), wanted, strict=True):
                torch.testing.assert_close(found.scores[name][column], values, rtol=1e-4, atol=1e-4)
    # A uniform map has nothing that could be refined; the others change.
    area = case.masks.float().mean((1, 2))
    for name in ("uniform", "uniform, refined"):
        torch.testing.assert_close(found.scores[name]["AP"], area)
    for row in plain[1:]:
        a, b = (found.scores[n]["mask"] for n in (row, f"{row}, refined"))
        assert not torch.allclose(a, b)


def test_a_refined_first_table_leaves_the_second_as_it_is() -> None:
    case = Case(2 * MIN_IMAGES)
    plain, fine = case.measured(), case.measured(refine="auto")
    for name, columns in plain.beyond.scores.items():
        for column, values in columns.items():
            torch.testing.assert_close(fine.beyond.scores[name][column], values)
    main, refined = (found.tables[0.0].scores[MAIN_ROW]["mask"] for found in (plain, fine))
    assert not torch.allclose(main, refined)
    for name, one in plain.reliability.items():
        torch.testing.assert_close(fine.reliability[name].stated, one.stated)


def test_gains_are_paired_and_printed() -> None:
    found = Case(8).measured().beyond
    best = found.scores[f"{PROXY_ROW}, refined"]
    compared = gains(found)
    assert list(compared) == [
        f"{PROXY_ROW}, refined less {rival}" for rival in ("EmbeddingCAM, refined", CENTERED_ROW)
    ]
    one = compared[f"{PROXY_ROW}, refined less {CENTERED_ROW}"]["AP"]
    differences = best["AP"] - found.scores[CENTERED_ROW]["AP"]
    assert one.mean == pytest.approx(float(differences.mean()), abs=1e-6)
    assert one.deviation == pytest.approx(float(differences.std()), abs=1e-6)
    assert one.low < one.mean < one.high
    text = beyond_text(found).splitlines()
    assert f"AP {one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" in text[-2]
    assert text[-1] == "AP and IoU are of 8 images"


def test_precision_is_of_a_spread_sample_and_only_with_masks() -> None:
    case = Case(9)
    scores = case.measured(total=9, ranked=3).beyond.scores[PROXY_ROW]
    assert (~scores["AP"].isnan()).nonzero()[:, 0].tolist() == [0, 3, 6]
    assert not scores["mask"].isnan().any()
    every = case.measured(ranked=None).beyond.scores[PROXY_ROW]["AP"]
    torch.testing.assert_close(scores["AP"][[0, 3, 6]], every[[0, 3, 6]])
    assert not every.isnan().any()
    assert case.measured(objects=None).beyond.columns == ["box", "mask"]


def test_where_nothing_is_finer_nothing_is_refined() -> None:
    """The explained layer is the first: there is no output on the way to it."""
    first = torch.nn.Sequential(torch.nn.Conv2d(3, CHANNELS, 3, padding=1), torch.nn.ReLU())
    network = torch.nn.Sequential(
        OrderedDict(backbone=first, pool=Pool(), head=torch.nn.Linear(CHANNELS, 6))
    )
    found = Case(8, network).measured().beyond
    assert list(found.scores) == [*FROM_TABLE, CENTERED_ROW, PROXY_ROW]
    assert list(gains(found)) == [
        f"{PROXY_ROW} less {rival}" for rival in ("EmbeddingCAM", CENTERED_ROW)
    ]


def test_confidence_is_as_calibrate_sees_it() -> None:
    case = Case(2 * MIN_IMAGES + 5)
    found = case.measured()
    assert list(found.reliability) == [MAIN_ROW, PROXY_ROW]
    for name, method in ((MAIN_ROW, "gradcam"), (PROXY_ROW, "proxy")):
        one = case.explainer(method=method)
        one.build(case.train)
        seen = transfer_fidelity(one, loader(case.test, case.labels))
        assert seen.ratios is not None
        assert seen.right is not None
        checked = found.reliability[name]
        fitted = Confidence.fit(seen.ratios[::2], seen.right[::2])
        torch.testing.assert_close(checked.stated, fitted(seen.ratios[1::2]), rtol=1e-4, atol=1e-5)
        assert torch.equal(checked.right, seen.right[1::2])
        torch.testing.assert_close(checked.distances, seen.distances[1::2])
        assert (checked.fitted.images, len(checked.right)) == (13, 12)


def test_no_confidence_of_few_images_or_of_unknown_classes() -> None:
    assert Case(2 * MIN_IMAGES - 1).measured().reliability == {}
    case = Case(2 * MIN_IMAGES + 2)
    case.labels = ["x", "y"] * (MIN_IMAGES + 1)
    assert case.measured().reliability == {}


def test_groups_and_calibration_error() -> None:
    stated = torch.tensor([0.9] * 20 + [0.2] * 20)
    right = torch.tensor([True] * 14 + [False] * 6 + [True] * 8 + [False] * 12)
    one = Reliability(Confidence(0.0, 1.0, 30, 20), stated, right, torch.arange(40.0))
    low, high = one.groups()
    assert (low.images, low.right) == (20, pytest.approx(0.4))
    assert (high.images, high.right) == (20, pytest.approx(0.7))
    assert one.error == pytest.approx((0.2 + 0.2) / 2)
    # 14 of 22 right ones and 12 of 18 wrong ones are where they belong; ties count as halves.
    area = (14 * 12 + 0.5 * (14 * 6 + 8 * 12)) / (22 * 18)
    assert "calibration error 0.200 (of one that is calibrated: " in str(one)
    assert f"right from wrong (AUROC): {area:.3f} by the confidence" in str(one)
    assert "right in 0.550 of 40 images, fitted to the 30 others" in str(one)


def test_a_true_confidence_has_the_error_of_chance() -> None:
    """The mean absolute deviation of a binomial share, E|X / n - p|, for each group."""
    sizes, odds = (20, 20), (0.2, 0.9)
    stated = torch.cat([torch.full((n,), p) for n, p in zip(sizes, odds, strict=True)])
    one = Reliability(Confidence(0.0, 1.0, 30, 20), stated, stated > 0.5, stated)
    wanted = 0.0
    for n, p in zip(sizes, odds, strict=True):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        wanted += sum(c * abs(k / n - p) for k, c in enumerate(chances)) / len(sizes)
    assert one.chance == pytest.approx(wanted, abs=0.004)
