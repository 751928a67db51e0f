"""The logistic confidence."""

from __future__ import annotations

import pytest
import torch

from gcfast.explain.confidence import Confidence


def test_it_finds_the_function_that_drew_the_images() -> None:
    ratios = torch.randn(20_000)
    right = torch.rand(20_000) < torch.sigmoid(-0.4 + 2.0 * ratios)
    fitted = Confidence.fit(ratios, right)
    assert (fitted.offset, fitted.slope) == pytest.approx((-0.4, 2.0), abs=0.08)
    assert (fitted.images, fitted.right) == (20_000, int(right.sum()))
    given = fitted(torch.tensor([-30.0, 0.2, 30.0]))
    assert given[1].item() == pytest.approx(0.5, abs=0.02)
    assert (given[0].item(), given[2].item()) == pytest.approx((0, 1), abs=1e-6)
    # Calibrated: right on average, over the images it was fitted to.
    assert float(fitted(ratios).mean()) == pytest.approx(float(right.float().mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("ratios", "right"),
    [
        (torch.arange(-10.0, 10.0), torch.arange(-10.0, 10.0) > 0),
        (torch.arange(20.0), torch.ones(20, dtype=torch.bool)),
        (torch.full((20,), 3.0), torch.arange(20) < 5),
        (torch.arange(20.0) * 50, torch.arange(20) > 3),
    ],
    ids=["separable", "all right", "one ratio", "far apart"],
)
def test_hard_sets_give_finite_numbers(ratios: torch.Tensor, right: torch.Tensor) -> None:
    fitted = Confidence.fit(ratios, right)
    assert abs(fitted.offset) < 100
    assert abs(fitted.slope) < 100
    share = float(right.float().mean())
    assert float(fitted(ratios).mean()) == pytest.approx(share, abs=0.06)


def test_it_is_kept_and_read() -> None:
    fitted = Confidence.fit(torch.randn(30), torch.rand(30) < 0.5)
    assert Confidence.from_dict(fitted.to_dict()) == fitted
    with pytest.raises(ValueError, match="must be finite"):
        Confidence.from_dict(fitted.to_dict() | {"slope": float("nan")})
    with pytest.raises(ValueError, match="`ratios` must be of at least 10 images, got 9"):
        Confidence.fit(torch.randn(9), torch.rand(9) < 0.5)
