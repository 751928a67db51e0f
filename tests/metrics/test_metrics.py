"""Scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gcfast.metrics import (
    box_masks,
    box_score,
    cosine,
    flat_maps,
    mask_box,
    mask_score,
    part_score,
    pointing_game,
    region_sums,
    spearman,
    two_object_scores,
)


def test_mask_score_is_the_share_inside() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1, 0], [0, 0]]])
    masks = torch.tensor([[[True, False], [False, True]]] * 3)
    assert mask_score(maps, masks).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert mask_score(maps.half(), masks).dtype == torch.float32


def test_the_box_of_a_mask_by_hand() -> None:
    mask = np.zeros((5, 7), dtype=bool)
    with pytest.raises(ValueError, match="`mask` must hold at least one pixel, got none"):
        mask_box(mask)
    mask[2, 3] = mask[3, 5] = True
    assert mask_box(mask) == (3, 2, 6, 4)
    assert box_masks(torch.tensor([mask_box(mask)]), 5, 7).sum() == 6


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


def test_part_score_of_the_picture_and_of_the_object() -> None:
    maps = torch.tensor([[[4.0, 2.0], [1.0, 1.0]]])
    parts = torch.tensor([[[False, True], [False, False]]])
    objects = torch.tensor([[[False, True], [True, True]]])
    assert part_score(maps, parts).item() == pytest.approx(2 / 8)
    assert part_score(maps, parts, objects).item() == pytest.approx(2 / 4)
    with pytest.raises(TypeError, match="`objects` must have dtype bool"):
        part_score(maps, parts, objects.float())


def test_flat_maps_are_those_of_zeros() -> None:
    maps = torch.zeros(3, 2, 2)
    maps[1, 0, 1], maps[2] = 0.1, 1.0
    assert flat_maps(maps).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinity in row 2"):
        flat_maps(maps.index_fill(0, torch.tensor(2), float("nan")))


def test_two_objects_by_hand() -> None:
    masks = torch.zeros(5, 2, 2, 4, dtype=torch.bool)
    masks[:, 0, :, :1] = True  # two pixels
    masks[:, 1, :, 2:] = True  # four pixels
    maps = torch.tensor([[0.6, 1.0, 0.3, 0.3], [0.6, 1.0, 0.3, 0.3]]).repeat(5, 1, 1)
    maps[3], maps[4] = 0, 1
    share, right = two_object_scores(maps, masks, torch.tensor([0, 1, -1, 0, 1]))
    # 1.2 on the first object, 1.2 on the second: equal heat, twice as hot on the first.
    assert share.tolist()[:2] == pytest.approx([0.5, 0.5])
    assert right.tolist()[:2] == [1.0, 0.0]
    assert share[2].isnan()
    assert right[2].isnan()
    assert (share[3], right[3]) == (0.0, 0.0)  # a flat map
    assert (share[4], right[4]) == (pytest.approx(4 / 6), 0.0)  # a tie is a miss
    with pytest.raises(ValueError, match=r"`masks` must not be empty, got no pixel in rows \[1\]"):
        two_object_scores(
            maps, masks & (torch.arange(5) != 1).view(-1, 1, 1, 1), torch.zeros(5, dtype=torch.long)
        )


@pytest.mark.parametrize(
    ("low", "high"), [((7, 7), (32, 32)), ((1, 1), (5, 9)), ((3, 5), (17, 11))], ids=str
)
def test_region_sums_are_those_of_the_upsampled_maps(
    low: tuple[int, int], high: tuple[int, int]
) -> None:
    maps, masks = torch.rand(2, 3, *low), torch.rand(2, 4, *high) > 0.6
    large = F.interpolate(maps.double(), size=high, mode="bilinear", align_corners=False)
    sums = region_sums(maps, masks)
    wanted = torch.where(masks[:, None], large[:, :, None], 0.0).sum((3, 4))
    torch.testing.assert_close(sums.inside, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.total, large.sum((2, 3)))
    assert torch.equal(sums.areas, masks.sum((2, 3)))
    scores = [[mask_score(large[:, v], masks[:, n]) for n in range(4)] for v in range(3)]
    wanted = torch.stack([torch.stack(s, 1) for s in scores], 1)
    torch.testing.assert_close(sums.shares(), wanted, rtol=1e-5, atol=1e-6)


def test_region_sums_of_flat_and_bad_maps() -> None:
    masks = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert region_sums(torch.zeros(1, 2, 2, 2), masks).shares().tolist() == [[[0.0], [0.0]]]
    maps = torch.full((1, 2, 2, 2), float("nan"))
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinity in row 0"):
        region_sums(maps, masks)
    with pytest.raises(TypeError, match="`masks` must have dtype bool, got float32"):
        region_sums(maps, masks.float())


def test_pointing_game_by_hand() -> None:
    maps = torch.zeros(5, 9, 9)
    masks = torch.zeros(5, 9, 9, dtype=torch.bool)
    masks[:, 4, 4] = True
    maps[0, 4, 4] = 1  # on it
    maps[1, 1, 8] = 1  # (3, 4) away: 5 pixels
    maps[2, 4, 4] = maps[2, 0, 0] = 1  # a tie
    maps[4, 0, 0] = 1  # 5.7 pixels away, in a corner
    assert pointing_game(maps, masks, 0).tolist() == [1, 0, 0, 0, 0]
    assert pointing_game(maps, masks, 4).tolist() == [1, 0, 0, 0, 0]
    assert pointing_game(maps, masks, 5).tolist() == [1, 1, 0, 0, 0]
    assert pointing_game(maps, masks).tolist() == [1, 1, 0, 0, 1]
    assert pointing_game(maps, torch.zeros_like(masks)).sum() == 0
    with pytest.raises(ValueError, match="`tolerance` must be at least 0, got -1"):
        pointing_game(maps, masks, -1)
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinity in row 3"):
        pointing_game(maps.index_fill(0, torch.tensor(3), float("inf")), masks)


def test_agreement_by_hand() -> None:
    a = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[0, 0, 0, 0]], [[1, 1, 2, 3]]])
    b = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[1, 2, 3, 4]], [[1, 5, 5, 9]]])
    # 20 / 30; flat; (1 + 5 + 10 + 27) / sqrt(15 * 132)
    assert cosine(a, b).tolist() == pytest.approx([2 / 3, 0, 43 / (15 * 132) ** 0.5])
    # Ranks less 1.5: -1 -1 .5 1.5 and -1.5 0 0 1.5, so (1.5 + 2.25) / 4.5.
    assert spearman(a, b).tolist() == pytest.approx([-1.0, 0.0, 3.75 / 4.5], abs=1e-6)


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.rand(3, 7, 7).mul(20).round(), torch.rand(3, 7, 7)
    wanted = [
        stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)
    ]
    assert spearman(a, b).tolist() == pytest.approx(wanted, abs=1e-6)


def test_agreement_refuses_what_it_cannot_compare() -> None:
    maps = torch.rand(2, 3, 3)
    with pytest.raises(ValueError, match=r"`others` must have shape \[B, H, W\] with W = 3"):
        cosine(maps, maps[:, :, :2])
    bad = maps.index_fill(0, torch.tensor(1), float("nan"))
    with pytest.raises(ValueError, match="`others` must be finite, got NaN or infinity in row 1"):
        spearman(maps, bad)


def test_mask_score_is_quantus_relevance_mass_accuracy() -> None:
    try:
        from quantus import RelevanceMassAccuracy
    except ImportError as error:
        pytest.skip(f"quantus is not installed, or lacks a part of its own: {error}")
    maps, masks = torch.rand(4, 8, 8), torch.rand(4, 8, 8) > 0.5
    metric = RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
    theirs = metric.evaluate_batch(maps[:, None].numpy(), masks[:, None].numpy())
    assert mask_score(maps, masks).tolist() == pytest.approx(list(theirs), abs=1e-6)


def test_shares_refuse_what_gives_no_share() -> None:
    """Signed maps, boxes of another shape, and a match that names no object."""
    maps, masks = torch.ones(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    signed = maps.clone()
    signed[1, 0, 0] = -2.5
    with pytest.raises(ValueError, match=r"`maps` must not be negative, got -2\.5 in row 1"):
        mask_score(signed, masks)
    with pytest.raises(ValueError, match=r"`maps` must have shape \[B, H, W\], got \[4, 4\]"):
        box_score(maps[0], torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"`boxes` must have shape \[B, 4\] with B = 2"):
        box_score(maps, torch.zeros(1, 4))
    two = torch.stack([masks, masks], 1)
    two[:, 0, :2] = two[:, 1, 2:] = False
    with pytest.raises(ValueError, match=r"`match` must lie in \[-1, 2\), got 0 to 2"):
        two_object_scores(maps, two, torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="`match` must have dtype int64, got float32"):
        two_object_scores(maps, two, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="`maps` must not be negative"):
        two_object_scores(signed, two, torch.tensor([0, 1]))
