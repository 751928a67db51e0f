"""The maps that `bench/photographs.py` compares, before they are brought to the picture's size.

Every map is made for one given database row of each query: the nearest of a class that is on the
picture. So all methods explain the same class, and none is scored for having found it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from photographs_data import Backbone, Photograph
from scenes_network import to_input
from torch import Tensor

import gcfast
from gcfast.evaluation.ways import (
    MAIN_ROW,
    PROXY_ROW,
    Query,
    Trained,
    Way,
    low_resolution_maps,
    table_ways,
)

TABLE_ROWS = ("uniform", "channel sum", "random channels", "random neighbor", "EmbeddingCAM")
CENTERED = ("channel sum", "random channels", MAIN_ROW, "diagonal discriminant, top-50")
# What goes into the convolutions of stride 2: the last outputs of 14 x 14 and of 28 x 28, with six
# times the channels of the blocks' outputs that "auto" takes.
EXPANDED = ("back.0._swish@1", "front.8._swish@1")
BATCH = 16


@dataclass(frozen=True)
class Fold:
    """Database rows from the crops of some photographs, and the queries among the others."""

    labels: list[str]  # of the rows
    crops: list[NDArray[np.uint8]]
    queries: list[Photograph]

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    @property
    def numbers(self) -> Tensor:
        """Class numbers of the rows, [N]."""
        return torch.tensor([self.classes.index(label) for label in self.labels])


def folds(photographs: Sequence[Photograph]) -> list[Fold]:
    """Rows from every other photograph, queries from the rest; and the other way round.

    A class with a single crop is left out: no triplet has its row as the anchor. A photograph that
    shows no class of the rows is no query.
    """
    both = []
    for half in (0, 1):
        crops = [crop for one in photographs[half::2] for crop in one.crops]
        times = Counter(label for label, _ in crops)
        crops = [(label, image) for label, image in crops if times[label] > 1]
        labels = [label for label, _ in crops]
        there = set(labels)
        queries = [one for one in photographs[1 - half :: 2] if there & one.masks.keys()]
        both.append(Fold(labels, [image for _, image in crops], queries))
    return both


class Loader:
    """The rows' crops as labelled batches, the same on every pass."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold

    def __len__(self) -> int:
        return -(-len(self.fold.crops) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], list[str]]]:
        for start in range(0, len(self.fold.crops), BATCH):
            part = slice(start, start + BATCH)
            labels = self.fold.labels[part]
            ids = [f"{label}#{start + i}" for i, label in enumerate(labels)]
            yield to_input(np.stack(self.fold.crops[part])), labels, ids


def nearest_there(fold: Fold, embeddings: Tensor, rows: Tensor) -> Tensor:
    """The nearest row [B] whose class is on the picture."""
    there = torch.tensor([[label in q.masks for label in fold.labels] for q in fold.queries])
    return (embeddings @ rows.T).masked_fill(~there, -torch.inf).argmax(1)


def discriminants(pooled: Tensor, labels: Tensor, classes: int, kept: int = 50) -> Tensor:
    """Each class's mean less that of all by the channels' variance within classes, top-M [K, C]."""
    unit = F.normalize(pooled, dim=1)
    means = torch.stack([unit[labels == k].mean(0) for k in range(classes)])
    within = (unit - means[labels]).square().mean(0)
    weights = (means - unit.mean(0)) / (within + 0.1 * within.mean())
    top, channels = weights.topk(kept, dim=1)
    return torch.zeros_like(weights).scatter_(1, channels, top)


def outputs(trained: Trained, images: Sequence[NDArray[np.uint8]]) -> Query:
    """What the network makes of pictures [S, S, 3], the finer outputs included, and their rows."""
    starts = range(0, len(images), BATCH)
    batches = (to_input(np.stack(images[start : start + BATCH])) for start in starts)
    return Query.joined([trained.query(batch) for batch in batches])


@dataclass(frozen=True)
class Explained:
    """One fold's queries: what the network made of them, which row explains them, and the maps."""

    fold: Fold
    trained: Trained
    query: Query
    nearest: Tensor  # [B], the nearest row of a class on the picture; query.nearest is of all
    maps: dict[str, Tensor]  # name to [B, h, w]

    @property
    def target(self) -> Tensor:
        """The number of the class that each map is for, [B]."""
        return self.fold.numbers[self.nearest]

    @property
    def classes(self) -> list[str]:
        """The class that each map is for."""
        return [self.fold.labels[row] for row in self.nearest.tolist()]


def explain(network: Backbone, fold: Fold, seed: int) -> Explained:
    """All maps of a fold: each as it is, and refined."""
    trained = Trained(
        gcfast.Explainer(network, "head", refine="auto", seed=seed), Loader(fold), progress=False
    )
    query = outputs(trained, [one.image for one in fold.queries])
    nearest = nearest_there(fold, query.embeddings, trained.table)
    given = query._replace(nearest=nearest)
    ways = [w for w in table_ways(trained, given, 0, seed) if w.name in (*TABLE_ROWS, MAIN_ROW)]
    names = [way.name for way in ways]
    pooled = trained.embedded.pooled
    assert pooled is not None
    of_class = discriminants(pooled, fold.numbers, len(fold.classes))[fold.numbers[nearest]]
    ways.append(Way("diagonal discriminant, top-50", of_class))
    maps: dict[str, Tensor] = {}
    for words, finer in (("", ()), (", refined", query.finer)):
        given = given._replace(finer=finer)
        plain, centered = low_resolution_maps(trained, given, ways, (0.0, 1.0))
        maps |= {f"{name}{words}": plain[:, v] for v, name in enumerate(names)}
        for v, way in enumerate(ways):
            if way.name in CENTERED:
                maps[f"{way.name}, center=1{words}"] = centered[:, v]
    return Explained(fold, trained, query, nearest, maps | labelled(network, fold, nearest))


def labelled(network: Backbone, fold: Fold, nearest: Tensor) -> dict[str, Tensor]:
    """The maps of the classes' proxies, as a user gets them, at their own resolution."""
    plain = gcfast.Explainer(network, "head", method="proxy")
    database = plain.build(Loader(fold))
    names = [fold.labels[row] for row in nearest.tolist()]
    images = [one.image for one in fold.queries]
    found = {}
    for name, refine, stride in (
        (PROXY_ROW, None, 32),
        (f"{PROXY_ROW}, refined", "auto", 8),
        (f"{PROXY_ROW}, refined by expanded outputs", EXPANDED, 8),
    ):
        one = gcfast.Explainer(network, "head", database, method="proxy", refine=refine)
        maps = []
        for start in range(0, len(names), BATCH):
            part = slice(start, start + BATCH)
            batch = to_input(np.stack(images[part]))
            size = (batch.shape[2] // stride, batch.shape[3] // stride)
            maps.append(one.explain_labelled(batch, names[part], size=size))
        found[name] = torch.cat(maps)
    return found
