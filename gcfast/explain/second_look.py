"""A second look at an image: what its hot pixels alone are nearest to.

The embedding of a whole image is that of all its objects. The activations averaged over the hot
pixels of a map, through the rest of the model, are nearly that of the one that the map shows. So
they tell whether its class is right, which other class is nearer, and, with the hot pixels left
out, what else there is. Beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.method.tail import Tail, pooled_by
from gcfast.search.classes import nearest_by_class
from gcfast.search.transfer import ExactTransfer
from gcfast.search.transferred import Transferred

HOT = 2  # the power of a map that pixels are weighed by
COLD = 4  # the power of 1 - map, for what else there is
SWITCH = 1.25  # how many times nearer another class must be to replace the map's


@dataclass(frozen=True, eq=False)
class SecondLook:
    """Embeds parts of images, and compares them with the rows.

    Attributes:
        tail: the model from the layer on.
        transfer: the rows, on the model's device.
        requery: whether a class that is nearer to the hot pixels replaces the map's.
    """

    tail: Tail
    transfer: ExactTransfer
    requery: bool

    def again(
        self,
        found: Transferred,
        maps: Tensor,
        activations: Tensor,
        images: Tensor,
        embeddings: Tensor,
        *,
        rates: bool,
        waits: bool,
    ) -> tuple[Transferred, Tensor | None]:
        """Compare the hot pixels with the map's class and with all others.

        Args:
            found: what the embeddings' nearest rows lend.
            maps: [B, H, W] in [0, 1], by ``found``, at the activations' resolution.
            activations: [B, C, H, W].
            images: [B, 3, h, w].
            embeddings: [B, D] of the whole images.
            rates: give the log-ratios that a confidence rests on.
            waits: whether values may be looked at.

        Returns:
            What is found now, and the log-ratios [B] (:attr:`~.classes.Nearest.log_ratio`) of its
            classes or None: with ``requery`` the nearest row to the hot pixels where another class
            than the map's is SWITCH times nearer to them.
        """
        table, labels = self.transfer.search.table, self.transfer.tables.labels
        hot = self.tail(pooled_by(activations, maps**HOT), images)
        rows = found.neighbors[:, 0]
        near = nearest_by_class(hot, table, labels, labels[rows.clamp(min=0)])
        if self.requery:
            switched = near.own >= SWITCH * near.other  # squared distances: as of 1 - cosine
            rows = torch.where(switched, near.other_row, rows)
            beyond = (embeddings - table[rows.clamp(min=0)].float()).square().sum(1)
            distances = torch.where(switched, beyond, found.distances[:, 0])
            found = self.transfer.lent(distances[:, None], rows[:, None])
            if rates and not (waits and not bool(switched.any())):
                near = nearest_by_class(hot, table, labels, labels[rows.clamp(min=0)])
        return found, near.log_ratio if rates else None


def of_the_rest(tail: Tail, maps: list[Tensor], activations: Tensor, images: Tensor) -> Tensor:
    """Embed what no map shows.

    Args:
        tail: the model from the layer on.
        maps: [B, H, W] each, in [0, 1], at the activations' resolution.
        activations: [B, C, H, W].
        images: [B, 3, h, w].

    Returns:
        [B, D] float32.
    """
    cold = torch.stack([(1 - one) ** COLD for one in maps]).prod(0)
    return tail(pooled_by(activations, cold), images)
