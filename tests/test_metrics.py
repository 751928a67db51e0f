"""Scores by hand."""

from __future__ import annotations

import pytest
import torch

from gcfast.metrics import box_masks, box_score, mask_score


def test_mask_score_is_the_share_inside() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1, 0], [0, 0]]])
    masks = torch.tensor([[[True, False], [False, True]]] * 3)
    assert mask_score(maps, masks).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert mask_score(maps.half(), masks).dtype == torch.float32


def test_box_score_is_half_open() -> None:
    maps = torch.ones(2, 4, 6)
    boxes = torch.tensor([[1, 0, 3, 2], [0, 0, 6, 4]])
    assert box_score(maps, boxes).tolist() == pytest.approx([4 / 24, 1.0])
    mask = box_masks(boxes, 4, 6)[0]
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


@pytest.mark.parametrize("box", [[2, 2, 2, 4], [-9, -9, -1, -1]], ids=["empty", "outside"])
def test_a_box_without_pixels_scores_zero(box: list[int]) -> None:
    assert box_score(torch.ones(1, 4, 4), torch.tensor([box])).item() == 0


def test_small_maps_keep_their_share() -> None:
    maps = torch.full((1, 2, 2), 1e-38)
    masks = torch.tensor([[[True, False], [False, False]]])
    assert mask_score(maps, masks).item() == pytest.approx(0.25)


def test_no_maps() -> None:
    assert mask_score(torch.ones(0, 4, 4), torch.ones(0, 4, 4, dtype=torch.bool)).shape == (0,)
    assert box_score(torch.ones(0, 4, 4), torch.ones(0, 4, dtype=torch.int64)).shape == (0,)


def test_bad_input_is_refused_in_words() -> None:
    maps, masks = torch.ones(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="`masks` must have dtype bool, got float32"):
        mask_score(maps, maps)
    with pytest.raises(ValueError, match=r"`masks` must have shape \[B, H, W\] with W = 4"):
        mask_score(maps, masks[..., :3])
    with pytest.raises(ValueError, match=r"`maps` must have shape \[B, H, W\], got \[4, 4\]"):
        mask_score(maps[0], masks)
    with pytest.raises(ValueError, match="`masks` must be on the device of `maps`, cpu, got meta"):
        mask_score(maps, masks.to("meta"))
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinity in row 1"):
        mask_score(maps.index_fill(0, torch.tensor(1), float("nan")), masks)
    with pytest.raises(ValueError, match=r"`boxes` must have shape \[B, 4\]"):
        box_score(maps, torch.zeros(2, 3, dtype=torch.int64))
