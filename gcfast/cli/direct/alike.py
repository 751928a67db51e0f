"""What two pictures have in common, for a page."""

from __future__ import annotations

import argparse
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import gcfast
from gcfast.cli.direct.drawn import Seen, laid_back, panel
from gcfast.database.database import Database
from gcfast.images.html import Linked, Panel
from gcfast.images.preprocessing import Preprocessing

_MEAN_ROWS = 100_000  # of a large database that its mean embedding is taken from, evenly spread


class Ready(Protocol):
    """An explainer and the device of its model."""

    @property
    def explainer(self) -> gcfast.Explainer: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102


def usual_embedding(database: Database, device: torch.device) -> Tensor:
    """Return the mean of a database's unit embeddings, [D] float32: what its pictures share."""
    step = max(1, -(-len(database) // _MEAN_ROWS))
    return F.normalize(database.embeddings[::step].float(), dim=1).mean(0).to(device)


class Alike(NamedTuple):
    """Two pictures, and the cosine of their embeddings split over the places of either."""

    pictures: tuple[Seen, Seen]
    why: gcfast.PairMaps
    shares: tuple[tuple[float, float], tuple[float, float]]  # as in Linked

    @classmethod
    def of(
        cls, ready: Ready, one: Seen, two: Seen, *, unlike: Tensor | None, linked: bool
    ) -> Alike:
        """Explain a pair; ``linked`` also gives what each place has to do with each other one."""
        query, match = (picture.images.to(ready.device) for picture in (one, two))
        why = ready.explainer.explain_pair(query, match, unlike=unlike, correspondence=linked)
        share_one, share_two = (
            ready.explainer.network.share(parts[:, None], (images.shape[2], images.shape[3]))
            for parts, images in ((why.query_parts, query), (why.match_parts, match))
        )
        return cls((one, two), why, (share_one, share_two))

    def overlays(
        self, preprocessing: Preprocessing, options: argparse.Namespace
    ) -> list[Image.Image]:
        """Lay both maps on their pictures."""
        return [
            laid_back(preprocessing, picture.path, picture.view, maps[0].cpu().numpy(), options)[0]
            for picture, maps in zip(self.pictures, (self.why.query, self.why.match), strict=True)
        ]

    def panels(
        self, preprocessing: Preprocessing, options: argparse.Namespace, captions: tuple[str, str]
    ) -> list[Panel]:
        """Show both maps; one that is flat says so."""
        flat = [not bool(maps.any()) for maps in (self.why.query, self.why.match)]
        return [
            panel(picture, f"{caption}: nothing" if empty else caption)
            for picture, caption, empty in zip(
                self.overlays(preprocessing, options), captions, flat, strict=True
            )
        ]

    def linked(self, panels: tuple[int, int], names: tuple[str, str]) -> Linked | None:
        """Link the pictures place by place, where that was asked for.

        A place answers by how much more it has in common with the other than either has with the
        other picture on average: what all places share would cover that.
        """
        if self.why.correspondence is None:
            return None
        table = self.why.correspondence[0].cpu().numpy().astype(np.float64)
        table = table - table.mean((0, 1), keepdims=True)
        table = table - table.mean((2, 3), keepdims=True)
        return Linked(panels, names, table, self.shares)
