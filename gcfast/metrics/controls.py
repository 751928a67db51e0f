"""The random controls of the tables, drawn for each image on its own.

A draw is a function of the seed and of the image's number among the test images, so that the same
images give the same table in batches of any size. The generator is the one that draws triplets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import reference

STREAM_CHANNELS, STREAM_ROWS = 2, 3  # of the generator; 0 and 1 draw triplets and partners


def random_channels(images: Tensor, channels: int, count: int, seed: int) -> Tensor:
    """Draw different channels for each image, every set equally likely.

    Args:
        images: [B] int64, numbers of the images.
        channels: C.
        count: how many to draw, at most C.
        seed: 0 to 2^63 - 1.

    Returns:
        [B, count] int64, on the CPU.
    """
    number = images.cpu()[:, None]
    mask = 0xFFFFFFFF
    places = torch.arange(channels)[None]
    counter = (places, number & mask, (number >> 32) & mask, STREAM_CHANNELS)
    low, high, _, _ = reference.philox(counter, seed)
    keys = ((high >> 1) << 32) | low  # 63 bits: ties, which would favor lower channels, are rare
    return keys.argsort(dim=1, stable=True)[:, :count]


def random_rows(images: Tensor, rows: int, seed: int) -> Tensor:
    """Draw a row for each image, uniform over the database.

    Args:
        images: [B] int64, numbers of the images.
        rows: N.
        seed: 0 to 2^63 - 1.

    Returns:
        [B] int64, on the CPU.
    """
    number = images.cpu()
    counts = torch.full_like(number, rows)
    return reference.uniform_ranks(number, 1, counts, seed, STREAM_ROWS)[:, 0]
