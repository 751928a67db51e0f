"""Embeddings and weights in float32 or float16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcfast._checks import require_choice
from gcfast.database import shards
from gcfast.database.manifest import STORAGES
from gcfast.database.shards import Shard, offsets_of

# What the largest weight of a database's first rows is scaled to in float16: that leaves a factor
# of 2^8 above it before infinity, and of 2^22 below it before digits are lost.
LARGEST_AT = 2.0**8
# The largest norm-relative error of a row of weights in float16; 5e-4 is what rounding alone makes.
HALF_TOLERANCE = 2e-3


class Conversion:
    """A database's rows in a storage.

    Args:
        manifest: the database's.
        rows: returns its rows from one number to another, as they are stored.
        storage: "float32" or "float16".

    Attributes:
        changes: whether that is another storage than the database's.
        manifest: the converted database's, without a stored index.

    Raises:
        ValueError: an unknown storage.
    """

    def __init__(
        self, manifest: dict[str, Any], rows: Callable[[int, int], Shard], storage: str
    ) -> None:
        require_choice("storage", storage, STORAGES)
        self.manifest = {key: value for key, value in manifest.items() if key != "index"}
        self.storage = storage
        self.changes = storage != manifest.get("storage", STORAGES[0])
        self._stored = rows
        if self.changes:
            old = manifest.get("weight_scale", 1.0)
            scale = scale_for(rows(0, shards.SHARD_ROWS).weights.float() / old, storage)
            self.manifest |= {"storage": storage, "weight_scale": scale}
            self._factor = scale / old
            self._mean = torch.tensor(manifest["mean_activation"], dtype=torch.float64)

    def rows(self, start: int, stop: int) -> Shard:
        """Return consecutive rows; raises ValueError for one that the storage cannot hold."""
        rows = self._stored(start, stop)
        if not self.changes:
            return rows
        return in_storage(rows, self.storage, self._factor, self._mean, first=start)


def scale_for(weights: Tensor, storage: str) -> float:
    """Return the power of two that a database's weights are multiplied by in a storage.

    Args:
        weights: [n, M] float32, raw, of its first rows.
        storage: "float32" or "float16".
    """
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    if storage == "float32" or largest == 0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** round(math.log2(LARGEST_AT / largest))


def in_storage(rows: Shard, storage: str, scale: float, mean: Tensor, *, first: int = 0) -> Shard:
    """Return rows with embeddings and weights in a storage, and offsets made of those weights.

    Args:
        rows: in any storage.
        storage: "float32" or "float16".
        scale: what weights and offsets are multiplied by.
        mean: [C], the mean activation, for the offsets of rounded weights.
        first: number of the first row, for the error.

    Raises:
        ValueError: weights or embeddings that float16 cannot hold, with the row.
    """
    dtype = torch.float16 if storage == "float16" else torch.float32
    wanted = rows.weights.float() * scale
    weights = wanted.to(dtype)
    embeddings = rows.embeddings.to(dtype)
    if dtype == torch.float16:
        missed = (weights.float() - wanted).norm(dim=1)
        good = missed <= HALF_TOLERANCE * wanted.norm(dim=1)
        good &= torch.isfinite(weights).all(1) & torch.isfinite(embeddings).all(1)
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            why = _why_not(rows.embeddings[row].float(), wanted[row], scale)
            raise ValueError(
                f"`storage` must be 'float32' for these rows, got 'float16', which cannot hold "
                f"row {first + row}: {why}"
            )
    offsets = offsets_of(rows.channels, weights, mean)
    return rows._replace(embeddings=embeddings, weights=weights, offsets=offsets)


def _why_not(embedding: Tensor, wanted: Tensor, scale: float) -> str:
    """Say which value of a row float16 cannot hold; ``wanted`` are its scaled weights."""
    largest = torch.finfo(torch.float16).max
    value = float(embedding[embedding.abs().argmax()])
    if not abs(value) <= largest:
        return f"its embedding has a value of {value:.4g}, above {largest:.5g}"
    value = float(wanted[wanted.abs().argmax()]) / scale
    if not abs(value) <= largest / scale:
        return (
            f"it has a weight of {value:.4g}, above the {largest / scale:.4g} that the scale of "
            "the first rows' weights leaves room for"
        )
    return (
        f"its largest weight is {value:.4g}, so small that in the scale of the first rows' weights "
        "it would lose digits"
    )
