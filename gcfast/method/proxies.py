"""Contrasted class proxies: what a class has that the others have not, one vector a class.

With x the activations of an image averaged over its places, r = x / |x|, and m_k the mean r of
class k, the proxy of class c is a_c = m_c - mean_k m_k: every channel, with either sign. An image
whose nearest row is of class c has the map relu(sum_i w_i A_i) with w = a_c - q (q . a_c) / 2,
where q is the image's own r.

Subtracting q (q . a_c) whole would be the tangent of the norm: what every object shares with its
class would be explained away, and an object that fills the image with it. Without it the map shows
what all objects share. Half of it was the best of the two on photographs (beyond the paper).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Directions are rounded to multiples of 2^-30, half a float32's own rounding at 2^-6 and less above
# it, so that sums of up to 2^23 of them are exact in float64: in any order, and also backwards.
STEPS = 2.0**30
ROWS_AT_ONCE = 8192


class Classes(NamedTuple):
    """The rows of each class, added up.

    Rows whose activations are zero have no direction: they are neither in the sums nor counted.
    """

    labels: Tensor  # [K] int64, rising
    sums: Tensor  # [K, C] float64, of the rows' directions
    counts: Tensor  # [K] int64

    @classmethod
    def of(cls, directions: Tensor, labels: Tensor) -> Classes:
        """Add up rows.

        Args:
            directions: [N, C] float32 on the CPU, of :func:`directions`.
            labels: [N] int64.
        """
        known, places = torch.unique(labels, return_inverse=True)
        sums = torch.zeros((len(known), directions.shape[1]), dtype=torch.float64)
        counts = torch.zeros(len(known), dtype=torch.int64)
        for start in range(0, len(labels), ROWS_AT_ONCE):
            rows = directions[start : start + ROWS_AT_ONCE]
            place = places[start : start + ROWS_AT_ONCE]
            sums.index_add_(0, place, rows.double().mul_(STEPS).round_().div_(STEPS))
            counts.index_add_(0, place, (rows != 0).any(1).long())
        return cls(known, sums, counts)

    def plus(self, other: Classes) -> Classes:
        """Return the classes of the rows of both."""
        together = Classes(*(torch.cat(pair) for pair in zip(self, other, strict=True)))
        return together.renamed(together.labels)

    def minus(self, other: Classes) -> Classes:
        """Return the classes without the rows of some of them, which have to be theirs."""
        return self.plus(Classes(other.labels, -other.sums, -other.counts))

    def only(self, labels: Tensor) -> Classes:
        """Return the classes that are among these labels [n]."""
        kept = torch.isin(self.labels, labels)
        return Classes(*(column[kept] for column in self))

    def renamed(self, labels: Tensor) -> Classes:
        """Return the classes under other labels [K]; those of one label become one."""
        known, places = torch.unique(labels, return_inverse=True)
        sums = self.sums.new_zeros((len(known), self.sums.shape[1]))
        counts = torch.zeros_like(known)
        return Classes(
            known, sums.index_add_(0, places, self.sums), counts.index_add_(0, places, self.counts)
        )

    def proxies(self) -> Tensor:
        """Return m_c - mean_k m_k of each class, [K, C] float32; 0 for a class of zero rows."""
        means = self.sums / self.counts.clamp(min=1)[:, None]
        seen = self.counts > 0
        contrasted = means - means[seen].mean(0)
        return torch.where(seen[:, None], contrasted, 0.0).float()


class Proxies(NamedTuple):
    """The proxies of a database on one device; nothing here waits for it."""

    labels: Tensor  # [K] int64, rising
    vectors: Tensor  # [K + 1, C] float32: the last one, of no class, is zero
    rows: Tensor | None = None  # [N + 1] int64: the place of each row's class, and that of no row

    @classmethod
    def of(cls, classes: Classes, device: torch.device) -> Proxies:
        """Make them on a device."""
        vectors = F.pad(classes.proxies(), (0, 0, 0, 1))
        return cls(classes.labels.to(device), vectors.to(device))

    def of_rows(self, labels: Tensor) -> Proxies:
        """Return the same with the labels [N] of the rows looked up once."""
        return self._replace(rows=F.pad(self.places(labels), (0, 1), value=len(self.labels)))

    def places(self, labels: Tensor) -> Tensor:
        """Return where the classes of labels are among the vectors, in the labels' shape."""
        places = torch.searchsorted(self.labels, labels.contiguous())
        known = self.labels[places.clamp(max=len(self.labels) - 1)] == labels
        return torch.where(known, places, len(self.labels))

    def mixed(self, places: Tensor, shares: Tensor | None = None) -> Tensor:
        """Return what explains each image, [B, C] float32.

        Args:
            places: [B, K] int64, of its neighbors' classes.
            shares: [B, K] floating point, what each of them weighs; None: there is one.
        """
        if shares is None:
            return self.vectors[places[:, 0]]
        return (self.vectors[places] * shares[..., None]).sum(1)


def directions(pooled: Tensor) -> Tensor:
    """Return pooled activations [B, C] as unit vectors in float32; zeros stay zeros."""
    return F.normalize(pooled.float(), dim=1)


def proxy_weights(activations: Tensor, proxies: Tensor) -> Tensor:
    """Return the weights [B, C] float32 of images' channels.

    Args:
        activations: [B, C, H, W].
        proxies: [B, C] float32, what each image is explained by.
    """
    own = directions(activations.float().mean((2, 3)))
    shared = (own * proxies).sum(1, keepdim=True)
    return torch.addcmul(proxies, own, shared, value=-0.5)
