"""What a batch takes from the database: the nearest rows, and how much each weighs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """The rows of a database, whole and on one device."""

    channels: Tensor  # [N, M] int64
    weights: Tensor  # [N, M] floating point
    offsets: Tensor  # [N] floating point
    labels: Tensor  # [N] int64, or float64


class Transferred(NamedTuple):
    """What a batch takes from the database, on the embeddings' device.

    ``rows``, ``channels``, ``weights``, ``offsets`` and ``mixing`` are as ``ops.sparse_cam`` takes
    them: the whole table with each neighbour's row and share, or, through an index, a small table
    of one row an image. Such a row is the neighbour's own for K = 1; for K > 1 it is the mixture of
    all: each of their channels once, with the sum of its weights times the neighbours' shares. Rows
    of cotangents, which have no channels, are never mixed here: the small table is one of all B K
    neighbours.
    """

    neighbors: Tensor  # [B, K] int64, rows of the database; -1: none
    distances: Tensor  # [B, K] float32, squared L2; +inf where there is none
    rows: Tensor  # [B, K or 1] int64, rows of the table below; -1: none
    channels: Tensor  # [N or B, M or more] int64
    weights: Tensor  # the same shape, floating point
    offsets: Tensor  # [N or B] float32
    mixing: Tensor | None  # [B, K]; None: one row, or those found equally
    labels: Tensor | None  # [B, K] of the neighbours, where no table of them is at hand

    @property
    def mixed(self) -> Tensor:
        """What rows of cotangents lend, [B, D] float32: each times its share; 0 where none is."""
        shares = (self.rows >= 0).float()
        if self.mixing is not None:
            shares = torch.where(self.rows >= 0, self.mixing.float(), 0.0)
        return (self.weights[self.rows.clamp(min=0)].float() * shares[..., None]).sum(1)


def mixing_weights(distances: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(-d / tau) over the K neighbours [B, K]; a neighbour at +inf weighs nothing."""
    tiny = torch.finfo(torch.float32).tiny
    scale: float | Tensor
    if isinstance(temperature, Tensor):
        scale = temperature.clamp(min=tiny)
    else:
        scale = max(temperature, tiny)
    # From the nearest on, so that where tau is 0 (a table of twins) that one weighs 1.
    nearer = distances[:, :1] - distances
    return torch.softmax(nearer / scale, dim=1)


def from_tables(
    distances: Tensor, neighbors: Tensor, tables: Tables, temperature: float | Tensor | None
) -> Transferred:
    """What the neighbours [B, K] at ``distances`` lend, tau being ``temperature``.

    One neighbour needs no temperature.
    """
    mixing = None
    if neighbors.shape[1] > 1:
        assert temperature is not None
        mixing = mixing_weights(distances, temperature)
    return Transferred(
        neighbors=neighbors,
        distances=distances,
        rows=neighbors,
        channels=tables.channels,
        weights=tables.weights,
        offsets=tables.offsets,
        mixing=mixing,
        labels=None,
    )
