"""How near a vector is to a class of the database and to all other classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TABLE_CHUNK = 2**16  # rows that are compared at once
SMALLEST = 2e-4  # squared distance, of unit vectors: below it two rows count as equally near


class Nearest(NamedTuple):
    """The nearest row of one class and the nearest of any other, for each query."""

    own: Tensor  # [B] float32, squared L2; +inf where the class has no row
    own_row: Tensor  # [B] int64, -1 where there is none
    other: Tensor  # [B] float32; +inf where there is no other class
    other_row: Tensor  # [B] int64, -1 where there is none

    @property
    def log_ratio(self) -> Tensor:
        """log(other / own) [B]: how much nearer the class is than any other; 0 where neither is."""
        own, other = (d.clamp(SMALLEST, torch.finfo(torch.float32).max).log() for d in self[::2])
        return other - own


def nearest_by_class(queries: Tensor, table: Tensor, labels: Tensor, classes: Tensor) -> Nearest:
    """Find, for each query, the nearest row of a class and the nearest row of all the others.

    One pass over the table, O(B N D); nothing waits for the device. Ties go to the lower row.

    Args:
        queries: [B, D] floating point.
        table: [N, D] floating point, the database's rows on the same device.
        labels: [N] int64, of the rows.
        classes: [B] int64, the class of each query.
    """
    queries = queries.float()
    # For own and other, the smallest |row|² − 2 q·row so far and the row of it.
    least = queries.new_full((2, len(queries)), torch.inf)
    rows = torch.full_like(least, -1, dtype=torch.int64)
    for start in range(0, len(table), TABLE_CHUNK):
        part = table[start : start + TABLE_CHUNK].float()
        # [B, chunk]: |q|², equal for all rows of a query, is added at the end.
        beyond = part.square().sum(1) - 2 * (queries @ part.T)
        is_own = labels[start : start + TABLE_CHUNK] == classes[:, None]
        for kind, there in enumerate((is_own, ~is_own)):
            found, at = beyond.masked_fill(~there, torch.inf).min(1)
            nearer = found < least[kind]
            rows[kind] = torch.where(nearer, at + start, rows[kind])
            least[kind] = torch.where(nearer, found, least[kind])
    distances = (least + queries.square().sum(1)).clamp(min=0)
    return Nearest(distances[0], rows[0], distances[1], rows[1])
