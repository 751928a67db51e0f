"""The paper's Table 1 with controls: every way of making a map, scored on the same images.

One forward pass over the training images and one over the test images serve all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from gcfast._progress import tracked
from gcfast.database.database import Database
from gcfast.evaluation.ways import (
    MAIN_ROW,
    Query,
    Trained,
    Way,
    Ways,
    low_resolution_maps,
    table_ways,
)
from gcfast.explain.explainer import Explainer
from gcfast.metrics import RegionSums, region_sums

__all__ = [
    "MAIN_ROW",
    "QualityTable",
    "RegionScore",
    "Statistic",
    "quality_table",
    "quality_tables",
]

Score = Callable[[Tensor, Any, list[str]], dict[str, Tensor]]
BOOTSTRAP_DRAWS = 1000
INTERVAL = (0.025, 0.975)


@runtime_checkable
class RegionScore(Protocol):
    """A score that needs only sums over regions, and so no map at full size."""

    def regions(self, truth: Any) -> Tensor:
        """Return the regions to sum over, [B, n, h, w] bool."""

    def scores(self, sums: RegionSums, truth: Any, names: list[str]) -> dict[str, Tensor]:
        """Return scores by name, [B, V] each for the V maps of each image; NaN for none."""


class Statistic(NamedTuple):
    """A score's statistics over the images that have it."""

    images: int
    mean: float
    deviation: float  # of the images, with Bessel's correction
    low: float  # 95 % bootstrap interval of the mean
    high: float


@dataclass
class QualityTable:
    """Scores of each way of making a map.

    Attributes:
        columns: names of the scores.
        scores: row name → column → scores of all test images, [B] float32.
        database: of the row "Grad-CAM, for, top-50".
        extra: the same for further ways, which are not rows of the table.
    """

    columns: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    database: Database | None = None
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, dict[str, float]]]:
        """(name, mean of each score over the images where it is not NaN)."""
        return [
            (name, {column: float(values.nanmean()) for column, values in columns.items()})
            for name, columns in self.scores.items()
        ]

    def cells(self) -> list[list[str]]:
        """Return header and rows as text."""
        return [
            ["", *self.columns],
            *([name, *(f"{means[c]:.3f}" for c in self.columns)] for name, means in self.rows),
        ]

    def statistics(self, *, extra: bool = False, seed: int = 0) -> dict[str, dict[str, Statistic]]:
        """Return row → column → mean, standard deviation and bootstrap interval.

        Args:
            extra: of the further ways instead of the rows.
            seed: of the bootstrap; all rows share the draws, so that they can be compared.
        """
        source = self.extra if extra else self.scores
        names = list(source)
        out: dict[str, dict[str, Statistic]] = {name: {} for name in names}
        for column in self.columns:
            if not names:
                break
            values = torch.stack([source[name][column].double() for name in names], 1)  # [B, V]
            for name, one in zip(names, statistics(values, seed), strict=True):
                out[name][column] = one
        return out

    def __str__(self) -> str:
        """The table, aligned."""
        return aligned(self.cells())


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Align rows of text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for name, *values in cells:
        padded = [name.ljust(widths[0])]
        padded += [v.rjust(w) for v, w in zip(values, widths[1:], strict=True)]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def statistics(values: Tensor, seed: int = 0) -> list[Statistic]:
    """Return the statistics of each column of [B, V], over the images where it is not NaN."""
    kept = values[~values.isnan().all(1)]
    if bool(kept.isnan().any()):  # columns of other images: one by one
        return [statistics(column[:, None], seed)[0] for column in values.unbind(1)]
    B, V = kept.shape
    if B == 0:
        return [Statistic(0, *[math.nan] * 4)] * V
    means = torch.cat([counts @ kept.double() / B for counts in resampled(B, seed)])
    low, high = means.quantile(torch.tensor(INTERVAL, dtype=torch.float64), dim=0)
    deviation = kept.double().std(0) if B > 1 else torch.zeros(V, dtype=torch.float64)
    columns = (kept.double().mean(0), deviation, low, high)
    return [Statistic(B, *map(float, one)) for one in zip(*columns, strict=True)]


def resampled(images: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each image is in each draw of the bootstrap, [100, B] float64 at a time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0, BOOTSTRAP_DRAWS, 100):  # a hundred draws at once: 100 B numbers
        drawn = torch.randint(images, (100, images), generator=generator)
        counts = torch.zeros((100, images), dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def quality_table(
    explainer: Explainer,
    train_loader: Iterable[Any],
    test_batches: Iterable[tuple[Tensor, Any]],
    score: Score | RegionScore,
    *,
    center: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> QualityTable:
    """Make the table of one ``center``; see :func:`quality_tables`."""
    (table,) = quality_tables(
        explainer,
        train_loader,
        test_batches,
        score,
        centers=(center,),
        seed=seed,
        progress=progress,
    )
    return table


def quality_tables(
    explainer: Explainer,
    train_loader: Iterable[Any],
    test_batches: Iterable[tuple[Tensor, Any]],
    score: Score | RegionScore,
    *,
    centers: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
    progress: bool = False,
) -> list[QualityTable]:
    """Score the controls, EmbeddingCAM, and every variant of the method.

    The 17 rows: a uniform map; the sum over all channels; 50 random channels; the weights of a
    random row instead of the nearest; EmbeddingCAM (arXiv:2402.00909) with the mean embedding of
    the nearest row's class as the proxy, all channels; then Grad-CAM and Grad-CAM++, evidence for
    and against, each with one triplet and all channels, 50 triplets and all channels, 50 triplets
    and the top 50 channels, by transfer from the nearest row.

    Args:
        explainer: gives the network, the objective, the margin and the seed; the rows vary the
            other settings. The head must be an affine map of the averaged activations.
        train_loader: as for :meth:`Explainer.build`.
        test_batches: (images [B, 3, h, w] on the model's device, truth) pairs; truth is passed on.
        score: (maps [B, h, w] in [0, 1], truth, class name of each image's nearest row) → scores
            by name, [B] each; NaN for an image without one. Or a :class:`RegionScore`, which is
            several times cheaper.
        centers: how much of the offsets to subtract from every map, the controls' included: one
            table for each.
        seed: of the random controls, whose draws depend on it and on an image's number among the
            test images, not on the batches.
        progress: show bars on stderr.

    Returns:
        The tables, in the order of ``centers``.

    Raises:
        UnsupportedModelError: another head.
        ValueError: as :meth:`Explainer.build`; no test images; fewer than 50 channels.

    Source: paper, Table 1.
    """
    trained = Trained(explainer, train_loader, progress)
    return tables_from(trained, test_batches, score, centers=centers, seed=seed, progress=progress)


Watch = Callable[[Tensor, Any, Query, Sequence[Way], Sequence[Tensor]], None]


def tables_from(
    trained: Trained,
    test_batches: Iterable[tuple[Tensor, Any]],
    score: Score | RegionScore,
    *,
    centers: Sequence[float],
    seed: int = 0,
    progress: bool = False,
    further: Sequence[Ways] = (),
    watch: Watch | None = None,
) -> list[QualityTable]:
    """Make the tables from one pass over the test images.

    Args:
        trained: the training images after their pass.
        test_batches: as for :func:`quality_tables`.
        score: as for :func:`quality_tables`.
        centers: as for :func:`quality_tables`.
        seed: as for :func:`quality_tables`.
        progress: as for :func:`quality_tables`.
        further: more ways to score than the rows; they become ``extra``.
        watch: called with each batch's images, truth, query, ways and maps [B, V, H, W], one for
            each center.
    """
    seen = 0
    collected = [Collected() for _ in centers]
    rows: list[str] = []
    for images, truth in tracked(test_batches, "test images", "batches", show=progress):
        query = trained.query(images)
        names = trained.label_names(query.nearest)
        ways = list(table_ways(trained, query, seen, seed))
        seen += len(images)
        rows = [way.name for way in ways]
        ways += [way for more in further for way in more(trained, query)]
        maps = low_resolution_maps(trained, query, ways, centers)
        keys = [way.name for way in ways]
        if isinstance(score, RegionScore):
            regions = score.regions(truth).to(images.device)
            for low, scores in zip(maps, collected, strict=True):
                scores.add(keys, score.scores(region_sums(low, regions), truth, names))
        else:
            size = (images.shape[2], images.shape[3])
            for v, key in enumerate(keys):
                for low, scores in zip(maps, collected, strict=True):
                    one = score(upsampled(low[:, v : v + 1], size)[:, 0], truth, names)
                    scores.add([key], {column: x[:, None] for column, x in one.items()})
        if watch is not None:
            watch(images, truth, query, ways, maps)
    if not all(scores.parts for scores in collected):
        raise ValueError("`test_batches` must give images, got none")
    return [scores.table(trained.database, rows) for scores in collected]


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [B, V, H, W] at the size (h, w) of the images."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class Collected:
    """Collects scores batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, names: Sequence[str], scores: dict[str, Tensor]) -> None:
        """Add scores [B, V] by column, of V ways."""
        for column, values in scores.items():
            for name, one in zip(names, values.cpu().unbind(1), strict=True):
                self.parts.setdefault(name, {}).setdefault(column, []).append(one)

    def table(self, database: Database, rows: Sequence[str]) -> QualityTable:
        scores = {
            name: {column: torch.cat(values) for column, values in columns.items()}
            for name, columns in self.parts.items()
        }
        return QualityTable(
            columns=list(next(iter(scores.values()))),
            scores={name: scores[name] for name in rows},
            database=database,
            extra={name: values for name, values in scores.items() if name not in rows},
        )
