"""Everything that ``gcfast evaluate`` measures, from one pass over the test images.

The table of seventeen rows and, around its main row (Grad-CAM, evidence for, 50 triplets, top-50):
how the scores depend on M, on T and on the number of k-means centers, which channel is strongest,
how well boxes localise, and how faithful transfer is at which distance. Beyond the paper: class
proxies and refined maps, and what a confidence in the map's class is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gcfast._progress import tracked
from gcfast.database.database import Database
from gcfast.evaluation.beyond import CENTERED_ROW, RANKED_IMAGES, Beyond, Objects
from gcfast.evaluation.datasets import Truth
from gcfast.evaluation.fidelity import FIDELITY_IMAGES, FidelitySample
from gcfast.evaluation.reliability import RatedSample, Reliability
from gcfast.evaluation.table import QualityTable, RegionScore, tables_from, upsampled
from gcfast.evaluation.ways import (
    MAIN_ROW,
    PROXY_ROW,
    ROWS,
    Count,
    Query,
    Trained,
    Way,
    channel_ways,
    database_ways,
    triplet_ways,
)
from gcfast.explain.calibration import Fidelity
from gcfast.explain.explainer import Explainer
from gcfast.metrics import (
    RegionSums,
    best_box_iou,
    flat_maps,
    localisation_iou,
    pointing_game,
)

PAPER_ROW = "Grad-CAM, against, top-50"
CHANNEL_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
TRIPLET_COUNTS: tuple[Count, ...] = (1, 2, 5, 10, 20, 50, 100, 200, "all")
CENTER_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
THRESHOLDS = tuple(i / 10 for i in range(1, 10))
LOCALISED = (MAIN_ROW, PAPER_ROW, "EmbeddingCAM", "channel sum")

Compress = Callable[[Database, int], Database]


class AnnotationScore:
    """Score the heat inside the boxes and masks of :class:`gcfast.evaluation.datasets.Truth`."""

    def regions(self, truth: Truth) -> Tensor:
        """Return the boxes and, if there are any, the masks, [B, 1 or 2, S, S] bool."""
        parts = [truth.box_mask] if truth.masks is None else [truth.box_mask, truth.masks]
        return torch.stack(parts, 1)

    def scores(self, sums: RegionSums, truth: Truth, _names: list[str]) -> dict[str, Tensor]:
        """Return the columns "box" and, if there are masks, "mask"."""
        shares = sums.shares().unbind(2)
        columns = ["box"] if truth.masks is None else ["box", "mask"]
        return dict(zip(columns, shares, strict=True))


@dataclass
class Localisation:
    """How well the boxes and the maxima of some rows' maps fit, at the size of the images.

    Attributes:
        thresholds: K shares of the maximum.
        iou: row → [B, K] float32.
        pointing: row → [B] float32.
        best: row → [B, 100] float32, what :func:`gcfast.metrics.max_box_acc_v2` takes; empty unless
            ``thorough``.
    """

    thresholds: tuple[float, ...]
    iou: dict[str, Tensor] = field(default_factory=dict)
    pointing: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        tables: ``center`` → table; ``extra`` of the first has the sweeps, named ``M=…, for``,
            ``M=…, against``, ``T=…`` and ``K=…``.
        localisation: of the rows in LOCALISED and the main row with center=1; of all rows if
            ``thorough``.
        fidelity: of a sample of the images; None if none has a partner of its class.
        top_channels: [C] int64, how many rows of the main database have the channel first.
        channel_counts: the M of the sweep.
        triplet_counts: its T.
        center_counts: its numbers of k-means centers; empty without ``compress``.
        images: how many were scored.
        flat: how many of them have a flat map in the main row.
        beyond: the rows of :mod:`gcfast.evaluation.beyond`, without centering but for the one that
            says so.
        reliability: of the confidence in the class of the main row's and the proxy's map; empty
            without enough images of the database's classes.
    """

    tables: dict[float, QualityTable]
    localisation: Localisation
    fidelity: Fidelity | None
    top_channels: Tensor
    channel_counts: tuple[int, ...]
    triplet_counts: tuple[Count, ...]
    center_counts: tuple[int, ...]
    images: int
    flat: int
    beyond: QualityTable
    reliability: dict[str, Reliability]


def evaluate(
    explainer: Explainer,
    train_loader: Iterable[Any],
    test_batches: Iterable[tuple[Tensor, Any]],
    score: RegionScore,
    *,
    labels: Callable[[Any], Sequence[str] | None],
    localised: Callable[[Any], tuple[Sequence[Tensor], Tensor] | None],
    objects: Objects | None = None,
    ranked: int | None = RANKED_IMAGES,
    compress: Compress | None = None,
    center_counts: Sequence[int] = CENTER_COUNTS,
    triplet_counts: Sequence[Count] = TRIPLET_COUNTS,
    total: int | None = None,
    seed: int = 0,
    thorough: bool = False,
    check: Callable[[Trained], None] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure everything.

    Args:
        explainer: as for :func:`gcfast.evaluation.table.quality_tables`.
        train_loader: as for :func:`gcfast.evaluation.table.quality_tables`.
        test_batches: as for :func:`gcfast.evaluation.table.quality_tables`.
        score: gives the columns.
        labels: truth → class names of the batch, or None not to use them.
        localised: truth → true boxes (B of [n, 4]) and masks [B, h, w] of the objects, or None.
        objects: (truth, class name of each image's nearest row) → masks [B, h, w] of what a map
            should show, of which the table beyond the paper has average precision and best IoU;
            None without masks.
        ranked: of how many images, spread as the fidelity's; None for all. They take longer than
            everything else.
        compress: (database, number of centers) → the database compressed by k-means; None leaves
            that sweep out.
        center_counts: its numbers of centers; those above the number of rows are left out.
        triplet_counts: T of that sweep.
        total: images in ``test_batches``, over which the fidelity's sample is spread; None takes
            the first ones.
        seed: of the random controls.
        thorough: localise the maps of all rows, and measure MaxBoxAccV2 of those that are always
            localised. It takes several times as long as everything else: half a second for an image
            of 224 x 224.
        check: called after the pass over the training images, to stop early.
        progress: show bars on stderr.

    Raises:
        UnsupportedModelError, ValueError: as :func:`gcfast.evaluation.table.quality_tables`.
    """
    trained = Trained(explainer, train_loader, progress)
    if check is not None:
        check(trained)
    C = len(trained.mean)
    channels = (*(m for m in CHANNEL_COUNTS if m < C), C)
    centers = tuple(n for n in center_counts if n <= len(trained.database)) if compress else ()
    databases = {}
    for n in tracked(centers, "k-means", "databases", show=progress):
        assert compress is not None
        databases[f"K={n}"] = compress(trained.database, n)
    beyond = Beyond(trained, score, objects, step=_step(total, ranked), most=ranked)
    watch = _Watch(trained, beyond, labels, localised, total, thorough)
    plain, centered = tables_from(
        trained,
        test_batches,
        score,
        centers=(0.0, 1.0),
        seed=seed,
        progress=progress,
        further=(
            channel_ways(channels, "for"),
            channel_ways(channels, "against"),
            triplet_ways(triplet_counts),
            database_ways(databases),
        ),
        watch=watch,
    )
    return Evaluation(
        tables={0.0: plain, 1.0: centered},
        localisation=watch.localisation(),
        fidelity=watch.sample.fidelity(),
        top_channels=trained.database.channels[:, 0].bincount(minlength=C),
        channel_counts=channels,
        triplet_counts=tuple(triplet_counts),
        center_counts=centers,
        images=watch.images,
        flat=watch.flat,
        beyond=beyond.table(),
        reliability={name: one for name, rated in watch.rated.items() if (one := rated.checked())},
    )


def _step(total: int | None, most: int | None) -> int:
    """Every how many images one is sampled, for so many of all."""
    return 1 if total is None or most is None else max(1, math.ceil(total / most))


class _Watch:
    """Measures in each batch what sums over regions cannot."""

    def __init__(
        self,
        trained: Trained,
        beyond: Beyond,
        labels: Callable[[Any], Sequence[str] | None],
        localised: Callable[[Any], tuple[Sequence[Tensor], Tensor] | None],
        total: int | None,
        thorough: bool,
    ) -> None:
        self.labels, self.localised, self.thorough = labels, localised, thorough
        self.beyond = beyond
        self.images = self.flat = 0
        self.iou: dict[str, list[Tensor]] = {}
        self.pointing: dict[str, list[Tensor]] = {}
        self.best: dict[str, list[Tensor]] = {}
        self.sample = FidelitySample(trained, _step(total, FIDELITY_IMAGES))
        self.rated = {name: RatedSample(trained) for name in (MAIN_ROW, PROXY_ROW)}

    def __call__(
        self,
        images: Tensor,
        truth: Any,
        query: Query,
        ways: Sequence[Way],
        maps: Sequence[Tensor],
    ) -> None:
        names = [way.name for way in ways]
        main = maps[0][:, names.index(MAIN_ROW)]  # [B, H, W]
        self.flat += int(flat_maps(main).sum())
        plain = self.beyond.add(truth, query, ways)
        size = (images.shape[2], images.shape[3])
        found = self.localised(truth)
        if found is not None:
            rows = [*LOCALISED, *(n for n in names[:ROWS] if n not in LOCALISED and self.thorough)]
            shown = [(name, maps[0][:, names.index(name)]) for name in rows]
            shown.insert(len(LOCALISED), (CENTERED_ROW, maps[1][:, names.index(MAIN_ROW)]))
            for i, (name, low) in enumerate(shown):
                large = upsampled(low[:, None], size)[:, 0]
                iou = localisation_iou(large, found[0], THRESHOLDS)
                self.iou.setdefault(name, []).append(iou.cpu())
                hits = pointing_game(large, found[1].to(large.device))
                self.pointing.setdefault(name, []).append(hits.cpu())
                if self.thorough and i <= len(LOCALISED):
                    self.best.setdefault(name, []).append(best_box_iou(large, found[0]).cpu())
        labels = self.labels(truth)
        if labels is not None:
            control = maps[0][:, names.index("random neighbor")]
            self.sample.add(query, labels, main, control, self.images)
            for name, low in plain.items():
                self.rated[name].add(query, labels, low)
        self.images += len(images)

    def localisation(self) -> Localisation:
        return Localisation(
            THRESHOLDS,
            {name: torch.cat(parts) for name, parts in self.iou.items()},
            {name: torch.cat(parts) for name, parts in self.pointing.items()},
            {name: torch.cat(parts) for name, parts in self.best.items()},
        )
