"""The random controls: what is drawn for an image, and that nothing else has a say in it."""

from __future__ import annotations

import pytest
import torch

from gcfast.metrics.controls import random_channels, random_rows

IMAGES = torch.arange(2000)


def test_an_image_draws_the_same_in_any_batch() -> None:
    channels, rows = random_channels(IMAGES, 60, 50, 3), random_rows(IMAGES, 77, 3)
    for size in (1, 7, 32):
        for part in IMAGES[:96].split(size):
            assert torch.equal(random_channels(part, 60, 50, 3), channels[part])
            assert torch.equal(random_rows(part, 77, 3), rows[part])
    back = torch.arange(95, -1, -1)
    assert torch.equal(random_channels(back, 60, 50, 3), channels[back])


def test_another_seed_and_another_image_draw_otherwise() -> None:
    few = IMAGES[:50]
    channels, rows = random_channels(few, 60, 5, 3), random_rows(few, 10**6, 3)
    assert len(channels.unique(dim=0)) == len(rows.unique()) == 50
    assert not torch.equal(random_channels(few, 60, 5, 4), channels)
    assert not torch.equal(random_rows(few, 10**6, 4), rows)
    # Also beyond 32 bits.
    far = few + 2**32
    assert not torch.equal(random_channels(far, 60, 5, 3), channels)
    assert not torch.equal(random_rows(far, 10**6, 3), rows)


@pytest.mark.parametrize(("channels", "count"), [(12, 5), (12, 12), (1, 1)])
def test_channels_are_different_and_as_likely(channels: int, count: int) -> None:
    drawn = random_channels(IMAGES, channels, count, 0)
    assert drawn.shape == (2000, count)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    seen = drawn.flatten().bincount(minlength=channels) / len(IMAGES)
    # Six standard deviations of a share of 2,000.
    share = count / channels
    assert (seen - share).abs().max() <= 6 * (share * (1 - share) / len(IMAGES)) ** 0.5


def test_rows_are_as_likely() -> None:
    seen = random_rows(IMAGES, 9, 0).bincount(minlength=9) / len(IMAGES)
    assert len(seen) == 9
    assert (seen - 1 / 9).abs().max() <= 6 * (1 / 9 * 8 / 9 / len(IMAGES)) ** 0.5
    assert random_rows(IMAGES[:3], 1, 0).tolist() == [0, 0, 0]
