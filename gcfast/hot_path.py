"""From embeddings and feature maps to heat maps: the part of an explanation that is ours.

Nothing here looks at values, so nothing waits for the device; on a CUDA device an image whose
embedding is not finite gets a map of NaN where on the CPU it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast.explanation import Explanation


class Transferred(NamedTuple):
    """What the nearest rows made of a batch."""

    maps: Tensor  # [B, OH, OW] float32
    embeddings: Tensor  # [B, D] float32
    neighbors: Tensor  # [B, K] int64
    distances: Tensor  # [B, K] float32

    def copied(self) -> Transferred:
        """The same in memory of its own."""
        return Transferred(*(tensor.clone() for tensor in self))

    def explanation(self, labels: Tensor) -> Explanation:
        """With the labels [N] of the table."""
        found = self.neighbors >= 0
        return Explanation(
            maps=self.maps,
            embeddings=self.embeddings,
            neighbors=self.neighbors,
            distances=self.distances,
            labels=torch.where(found, labels[self.neighbors.clamp(min=0)], -1),
            flat=self.maps.abs().amax((1, 2)) == 0,
        )


class Finish(NamedTuple):
    """How maps are finished, checked: the keywords of ``sparse_cam`` that are not tensors."""

    size: tuple[int, int]
    center: float
    relu: bool
    normalize: str | None


def mixing_weights(distances: Tensor, temperature: float) -> Tensor:
    """softmax(-d / tau) over the K neighbours [B, K]; a neighbour at +inf weighs nothing."""
    scale = max(temperature, torch.finfo(torch.float32).tiny)
    # From the nearest on, so that where tau is 0 (a table of twins) that one weighs 1.
    beyond = distances - distances[:, :1]
    return torch.softmax(-beyond / scale, dim=1)


def marked(embeddings: Tensor, neighbors: Tensor, mixing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Neighbours and mixing weights such that an embedding that is not finite gives NaN maps."""
    mark = embeddings.sum(1, keepdim=True) * 0  # [B, 1]: 0, or NaN
    # Some row must be weighed for the NaN to reach the map, whatever the search made of it.
    neighbors = torch.where(mark == 0, neighbors, 0)
    return neighbors, mark.expand(neighbors.shape) + (1.0 if mixing is None else mixing)


def transfer(
    activations: Tensor,
    embeddings: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    finish: Finish,
    *,
    search: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    k: int,
    temperature: float,
    sparse_cam: Callable[..., Tensor],
    marks: bool,
) -> Transferred:
    """Maps from the rows nearest to the embeddings.

    Args:
        activations: [B, C, H, W].
        embeddings: [B, D] float32.
        tables: channels [N, M], weights [N, M], offsets [N].
        finish: how.
        search: (embeddings, k) → (distances [B, K], rows [B, K]).
        k: K.
        temperature: tau, of K > 1.
        sparse_cam: the operation, in one of its forms.
        marks: give an embedding that is not finite a map of NaN, rather than rely on a check.
    """
    distances, neighbors = search(embeddings, k)
    mixing = mixing_weights(distances, temperature) if k > 1 else None
    rows = neighbors
    if marks:
        rows, mixing = marked(embeddings, neighbors, mixing)
    channels, weights, offsets = tables
    maps = sparse_cam(
        activations,
        rows,
        channels,
        weights,
        mixing=mixing,
        offsets=offsets,
        size=finish.size,
        center=finish.center,
        relu=finish.relu,
        normalize=finish.normalize,
    )
    return Transferred(maps, embeddings, neighbors, distances)
