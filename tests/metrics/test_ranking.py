"""Average precision and best IoU of a map's pixels."""

import math

import pytest
import torch

from gcfast.metrics import auroc, ranking_scores


def brute_force(heat: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    precision, best = [], 0.0
    for threshold in heat.flatten().tolist():
        taken = heat >= threshold
        best = max(best, float((taken & mask).sum() / (taken | mask).sum()))
    for threshold in heat[mask].tolist():
        taken = heat >= threshold
        precision.append(float((taken & mask).sum() / taken.sum()))
    return sum(precision) / len(precision), best


def test_by_hand() -> None:
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    precision, overlap = ranking_scores(maps, masks)
    # Pixels at ranks 1 and 3: (1/1 + 2/3) / 2; three taken hold both of two, one holds one of two.
    assert precision.tolist() == pytest.approx([5 / 6])
    assert overlap.tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "distinct"])
def test_against_every_threshold(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(levels, (5, 7, 6), generator=generator) / 7
    masks = torch.rand((5, 7, 6), generator=generator) < 0.3
    precision, overlap = ranking_scores(maps, masks)
    wanted = [brute_force(m, k) for m, k in zip(maps, masks, strict=True)]
    assert precision.tolist() == pytest.approx([p for p, _ in wanted], abs=1e-6)
    assert overlap.tolist() == pytest.approx([o for _, o in wanted], abs=1e-6)


def test_squaring_changes_nothing_and_a_flat_map_scores_the_area() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand((3, 8, 8), generator=generator)
    masks = torch.rand((3, 8, 8), generator=generator) < 0.4
    for plain, squared in zip(
        ranking_scores(maps, masks), ranking_scores(maps**2, masks), strict=True
    ):
        assert torch.equal(plain, squared)
    area = masks.float().mean((1, 2))
    for flat in ranking_scores(torch.zeros(3, 8, 8), masks):
        torch.testing.assert_close(flat, area)


def test_empty() -> None:
    precision, overlap = ranking_scores(torch.rand(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    assert math.isnan(precision[0])
    assert math.isnan(overlap[0])
    for none in ranking_scores(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool)):
        assert none.shape == (0,)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="`masks`"):
        ranking_scores(torch.rand(1, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="`masks` must have shape"):
        ranking_scores(torch.rand(1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="`maps`"):
        ranking_scores(torch.full((1, 4, 4), torch.nan), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_auroc_counts_pairs() -> None:
    scores = torch.randint(6, (40,)).float()
    positive = torch.rand(40) < 0.4
    pairs = scores[positive][:, None] - scores[~positive]
    wanted = float(((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean())
    assert auroc(scores, positive) == pytest.approx(wanted)
    assert math.isnan(auroc(scores, torch.ones(40, dtype=torch.bool)))
    with pytest.raises(ValueError, match="`scores` must be numbers, got NaN"):
        auroc(torch.tensor([math.nan]), torch.tensor([True]))
