"""Boxes from maps, and how well they fit, by hand."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

import gcfast
from gcfast.evaluation.report import max_box_acc_statistic
from gcfast.metrics import (
    best_box_iou,
    box_iou,
    localisation_accuracy,
    localisation_iou,
    max_box_acc_v2,
    threshold_boxes,
)

pytest.importorskip("scipy", reason="SciPy (gcfast's extra evaluate) is not installed")


def blobs() -> torch.Tensor:
    """A hot blob of 2 x 2 and a mild one of 3 x 4 that touches nothing; [1, 10, 12]."""
    maps = torch.zeros(1, 10, 12)
    maps[0, 1:3, 1:3] = 1.0
    maps[0, 5:8, 6:10] = 0.4
    return maps


def test_boxes_overlap_by_hand() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 0, 0]])
    others = torch.tensor([[2, 2, 6, 6], [0, 0, 4, 2], [9, 9, 10, 10], [0, 0, 0, 0]])
    iou = box_iou(boxes, others)
    assert iou[0].tolist() == pytest.approx([4 / 28, 0.5, 0, 0])
    assert iou[1].tolist() == [0, 0, 0, 0]


def test_the_largest_component_above_the_threshold() -> None:
    boxes = threshold_boxes(blobs(), [0.0, 0.3, 0.4, 0.9])
    # 0.4 is not above 0.4 of the maximum, so there the small one is alone.
    assert boxes.tolist() == [[[6, 5, 10, 8], [6, 5, 10, 8], [1, 1, 3, 3], [1, 1, 3, 3]]]


def test_pixels_that_touch_at_a_corner_are_one() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0] = maps[0, 1, 1] = 1.0
    assert threshold_boxes(maps, [0.5]).tolist() == [[[0, 0, 2, 2]]]


def test_a_flat_map_finds_nothing() -> None:
    assert threshold_boxes(torch.zeros(1, 4, 4), [0.0, 0.5]).tolist() == [[[0] * 4] * 2]
    assert localisation_iou(torch.zeros(1, 4, 4), torch.tensor([[0, 0, 4, 4]]), [0.2]).item() == 0
    assert best_box_iou(torch.ones(1, 4, 4), torch.tensor([[0, 0, 4, 4]]), [0.2]).item() == 0


def test_accuracy_over_thresholds() -> None:
    maps = torch.cat([blobs(), blobs()])
    boxes = torch.tensor([[6, 5, 10, 8], [1, 1, 3, 4]])
    iou = localisation_iou(maps, boxes, [0.2, 0.8])
    assert iou.flatten().tolist() == pytest.approx([1.0, 0.0, 0.0, 4 / 6])
    assert localisation_accuracy(iou).tolist() == [0.5, 0.5]
    assert localisation_accuracy(iou, 0.7).tolist() == [0.5, 0.0]
    several = [torch.tensor([[0, 0, 1, 1], [6, 5, 10, 8]]), torch.tensor([[1, 1, 3, 4]])]
    assert torch.equal(localisation_iou(maps, several, [0.2, 0.8]), iou)


def test_max_box_acc_v2_by_hand() -> None:
    # All components' boxes count: the small blob is found at 0.2 too.
    iou = best_box_iou(blobs(), torch.tensor([[1, 1, 3, 4]]), [0.2, 0.8])
    assert iou.flatten().tolist() == pytest.approx([4 / 6, 4 / 6])
    # One threshold is best for each IoU: 0.3 → 1 (τ 0), 0.5 → 2/3 (τ 1), 0.7 → 1/3 (either).
    iou = torch.tensor([[0.4, 0.6], [0.35, 0.6], [0.9, 0.1]])
    assert max_box_acc_v2(iou) == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)
    with pytest.raises(ValueError, match=r"`iou` must hold images and thresholds, got \[0, 2\]"):
        max_box_acc_v2(iou[:0])


def test_max_box_acc_v2_chooses_its_threshold_anew_in_each_draw() -> None:
    best = torch.rand(12, 5)
    one = max_box_acc_statistic(best, seed=3)
    assert (one.images, one.mean) == (12, max_box_acc_v2(best))
    assert one.deviation != one.deviation
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(10):
        for picks in torch.randint(12, (100, 12), generator=generator):
            values.append(max_box_acc_v2(best[picks]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert (one.low, one.high) == pytest.approx((low, high), abs=1e-6)


def test_v2_stretches_each_map_first() -> None:
    maps = 0.5 + 0.5 * blobs()  # never below half of its maximum
    assert best_box_iou(maps, torch.tensor([[1, 1, 3, 3]]), [0.3]).item() == pytest.approx(1.0)
    assert localisation_iou(maps, torch.tensor([[1, 1, 3, 3]]), [0.3]).item() < 0.1


def test_no_maps() -> None:
    nothing = torch.zeros(0, 4, 4)
    assert threshold_boxes(nothing, [0.2]).shape == (0, 1, 4)
    assert localisation_iou(nothing, torch.zeros(0, 4), [0.2]).shape == (0, 1)
    assert best_box_iou(nothing, [], [0.2]).shape == (0, 1)


def test_bad_input_is_refused_in_words() -> None:
    maps = blobs()
    with pytest.raises(ValueError, match=r"`thresholds` must lie in \[0, 1\), got 1.0"):
        threshold_boxes(maps, [1.0])
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinity in row 0"):
        threshold_boxes(maps * float("nan"), [0.5])
    with pytest.raises(ValueError, match="`boxes` must have B = 1 elements, got 2"):
        localisation_iou(maps, torch.zeros(2, 4), [0.5])
    with pytest.raises(ValueError, match=r"for each image, got \[0, 4\] in row 0"):
        best_box_iou(maps, [torch.zeros(0, 4)], [0.5])


def test_a_missing_scipy_is_named_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **settings: Any) -> Any:
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(gcfast.MissingExtraError, match=r"pip install 'gcfast\[evaluate\]'"):
        threshold_boxes(blobs(), [0.5])


def test_components_against_a_flood_fill() -> None:
    one = torch.rand(1, 12, 13)
    for threshold in (0.3, 0.6, 0.8):
        mask = (one[0] > threshold * one.max()).numpy()
        best, left = (0, None), mask.copy()
        while left.any():
            y, x = np.argwhere(left)[0]
            stack, seen = [(y, x)], []
            left[y, x] = False
            while stack:
                y, x = stack.pop()
                seen.append((y, x))
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        a, b = y + dy, x + dx
                        if 0 <= a < 12 and 0 <= b < 13 and left[a, b]:
                            left[a, b] = False
                            stack.append((a, b))
            ys, xs = zip(*seen, strict=True)
            if len(seen) > best[0]:
                best = (len(seen), [min(xs), min(ys), max(xs) + 1, max(ys) + 1])
        assert threshold_boxes(one, [threshold])[0, 0].tolist() == best[1]
