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
from photographs_data import Backbone, Outputs, Photograph, outputs
from scenes_network import to_input
from torch import Tensor

import gcfast
from gcfast import ops
from gcfast.evaluation.ways import MAIN_ROW, Query, Trained, low_resolution_maps, table_ways

TABLE_ROWS = ("uniform", "channel sum", "random channels", "random neighbor", "EmbeddingCAM")
PROXY = "class proxy"
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


def nearest_there(fold: Fold, embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest row [B] whose class is on the picture, and the nearest row of all [B]."""
    similarity = embeddings @ rows.T
    there = torch.tensor([[label in q.masks for label in fold.labels] for q in fold.queries])
    return similarity.masked_fill(~there, -torch.inf).argmax(1), similarity.argmax(1)


def class_proxies(pooled: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The classes' mean unit vectors [K, C] less the mean of all classes."""
    unit = F.normalize(pooled, dim=1)
    means = torch.stack([unit[labels == k].mean(0) for k in range(classes)])
    return means - means.mean(0)


def proxy_maps(activations: Tensor, proxies: Tensor) -> Tensor:
    """relu(sum_i w_i A_i) [B, H, W] with w = a - q (q . a) / 2, a of [B, C]."""
    q = F.normalize(activations.mean((2, 3)), dim=1)
    weights = proxies - 0.5 * q * (q * proxies).sum(1, keepdim=True)
    return torch.einsum("nc,nchw->nhw", weights, activations).clamp(min=0)


def discriminants(pooled: Tensor, labels: Tensor, classes: int, kept: int = 50) -> Tensor:
    """Each class's mean less that of all by the channels' variance within classes, top-M [K, C]."""
    unit = F.normalize(pooled, dim=1)
    means = torch.stack([unit[labels == k].mean(0) for k in range(classes)])
    within = (unit - means[labels]).square().mean(0)
    weights = (means - unit.mean(0)) / (within + 0.1 * within.mean())
    top, channels = weights.topk(kept, dim=1)
    return torch.zeros_like(weights).scatter_(1, channels, top)


def refined(maps: Tensor, finer: Sequence[Tensor]) -> Tensor:
    """Maps refined by one output after the other."""
    for one in finer:
        maps = ops.refine(maps, one)
    return maps


@dataclass(frozen=True)
class Explained:
    """One fold's queries: what the network made of them, which row explains them, and the maps."""

    fold: Fold
    rows: Tensor  # unit embeddings of the rows, [N, C]
    proxies: Tensor  # [K, C]
    query: Outputs
    nearest: Tensor  # [B], the nearest row of a class on the picture
    first: Tensor  # [B], the nearest row of all
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
    explainer = gcfast.Explainer(network, "head", seed=seed)
    trained = Trained(explainer, Loader(fold), progress=False)
    query = outputs(network, [one.image for one in fold.queries])
    embeddings = F.normalize(query.pooled, dim=1)
    nearest, first = nearest_there(fold, embeddings, trained.table)
    norms = trained.head.project(query.pooled)[1]
    given = Query(query.activations, embeddings, query.pooled, norms, nearest, nearest * 0.0)
    ways = [w for w in table_ways(trained, given, 0, seed) if w.name in (*TABLE_ROWS, MAIN_ROW)]
    plain, centered = low_resolution_maps(trained, given, ways, (0.0, 1.0))
    maps = {way.name: plain[:, v] for v, way in enumerate(ways)}
    for name in ("channel sum", "random channels", MAIN_ROW):
        maps[f"{name}, center=1"] = centered[:, [w.name for w in ways].index(name)]

    pooled, numbers = trained.embedded.pooled, fold.numbers
    assert pooled is not None
    target = numbers[nearest]
    of_class = discriminants(pooled, numbers, len(fold.classes))[target]
    raw = torch.einsum("nc,nchw->nhw", of_class, query.activations)
    offset = (of_class.double() @ trained.mean).float()[:, None, None]
    maps["diagonal discriminant, top-50, center=1"] = (raw - offset).clamp(min=0)
    proxies = class_proxies(pooled, numbers, len(fold.classes))
    maps[PROXY] = proxy_maps(query.activations, proxies[target])
    maps |= {f"{name}, refined": refined(low, query.finer) for name, low in maps.items()}
    return Explained(fold, trained.table, proxies, query, nearest, first, maps)
