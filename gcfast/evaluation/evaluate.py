"""Everything that `gcfast evaluate` measures, from one pass over the test images.

The table of seventeen rows, and around its main row (Grad-CAM, evidence for, 50 triplets, top-50):
how the scores depend on M, on T and on the number of k-means centres, which channel is strongest,
how well boxes localise, and how faithful transfer is at which distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast.database.database import Database
from gcfast.evaluation.datasets import Truth
from gcfast.evaluation.table import QualityTable, RegionScore, tables_from, upsampled
from gcfast.evaluation.ways import (
    CONTROL_CHANNELS,
    MAIN_ROW,
    ROWS,
    TRIPLETS,
    Count,
    Query,
    Trained,
    Way,
    channel_ways,
    database_ways,
    drawn,
    grad_weights,
    low_resolution_maps,
    strongest,
    triplet_ways,
)
from gcfast.explain.calibration import Fidelity
from gcfast.explain.explainer import Explainer
from gcfast.method.pairs import Anchors, PairSource
from gcfast.metrics import (
    RegionSums,
    best_box_iou,
    cosine,
    flat_maps,
    localisation_iou,
    pointing_game,
    spearman,
)

PAPER_ROW = "Grad-CAM, against, top-50"
CHANNEL_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
TRIPLET_COUNTS: tuple[Count, ...] = (1, 2, 5, 10, 20, 50, 100, 200, "all")
CENTER_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
THRESHOLDS = tuple(i / 10 for i in range(1, 10))
LOCALISED = (MAIN_ROW, PAPER_ROW, "EmbeddingCAM", "channel sum")
FIDELITY_IMAGES = 256

Compress = Callable[[Database, int], Database]


class AnnotationScore:
    """Box and mask score of :class:`gcfast.evaluation.datasets.Truth`: heat inside each."""

    def regions(self, truth: Truth) -> Tensor:
        """[B, 1 or 2, S, S] bool."""
        parts = [truth.box_mask] if truth.masks is None else [truth.box_mask, truth.masks]
        return torch.stack(parts, 1)

    def scores(self, sums: RegionSums, truth: Truth, _names: list[str]) -> dict[str, Tensor]:
        """Columns "box" and, where there are masks, "mask"."""
        shares = sums.shares().unbind(2)
        columns = ["box"] if truth.masks is None else ["box", "mask"]
        return dict(zip(columns, shares, strict=True))


@dataclass
class Localisation:
    """How the boxes and the maxima of some rows' maps fit, at the size of the images.

    Attributes:
        thresholds: K shares of the maximum.
        iou: row → [B, K] float32.
        pointing: row → [B] float32.
        best: row → [B, 100] float32, what :func:`gcfast.metrics.max_box_acc_v2` takes; empty where
            it was not asked for.
    """

    thresholds: tuple[float, ...]
    iou: dict[str, Tensor] = field(default_factory=dict)
    pointing: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        tables: centre → table; ``extra`` of the first holds the sweeps, named ``M=…, for``,
            ``M=…, against``, ``T=…`` and ``K=…``.
        localisation: of the rows in LOCALISED and the main row with center=1; of all rows where
            it was asked for.
        fidelity: of a sample of the images; None where none has a partner of its class.
        top_channels: [C] int64, how many rows of the main database have the channel first.
        channel_counts: the M of the sweep.
        triplet_counts: its T.
        center_counts: its numbers of k-means centres; empty where nothing compresses.
        images: how many were scored.
        flat: how many of them have a flat map in the main row.
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


def evaluate(
    explainer: Explainer,
    train_loader: Iterable[Any],
    test_batches: Iterable[tuple[Tensor, Any]],
    score: RegionScore,
    *,
    labels: Callable[[Any], Sequence[str] | None],
    localised: Callable[[Any], tuple[Sequence[Tensor], Tensor] | None],
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
        labels: truth → class names of the batch, or None where they are not to be used.
        localised: truth → true boxes (B of [n, 4]) and masks [B, h, w] of the objects, or None.
        compress: (database, number of centres) → the database compressed by k-means; None leaves
            that sweep out.
        center_counts: its numbers of centres; those above the number of rows are left out.
        triplet_counts: T of that sweep.
        total: images in ``test_batches``, to spread the sample for the fidelity over; None takes
            the first ones.
        seed: of the random controls.
        thorough: localise the maps of all rows, and measure MaxBoxAccV2 of those that are localised
            in any case. It takes several times as long as everything else: half a second an image
            of 224 x 224.
        check: called once the training images have been through, to stop early.
        progress: show bars on stderr.

    Raises:
        UnsupportedModelError, ValueError: as :func:`gcfast.evaluation.table.quality_tables`.
    """
    trained = Trained(explainer, train_loader, progress)
    if check is not None:
        check(trained)
    C = len(trained.mean)
    channels = (*(m for m in CHANNEL_COUNTS if m < C), C)
    centres = tuple(n for n in center_counts if n <= len(trained.database)) if compress else ()
    databases = {}
    for n in tqdm(centres, desc="k-means", disable=not progress, leave=False):
        assert compress is not None
        databases[f"K={n}"] = compress(trained.database, n)
    watch = _Watch(trained, labels, localised, total, thorough)
    plain, centred = tables_from(
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
        tables={0.0: plain, 1.0: centred},
        localisation=watch.localisation(),
        fidelity=watch.fidelity(),
        top_channels=trained.database.channels[:, 0].bincount(minlength=C),
        channel_counts=channels,
        triplet_counts=tuple(triplet_counts),
        center_counts=centres,
        images=watch.images,
        flat=watch.flat,
    )


class _Watch:
    """Looks at each batch for what sums over regions do not tell."""

    def __init__(
        self,
        trained: Trained,
        labels: Callable[[Any], Sequence[str] | None],
        localised: Callable[[Any], tuple[Sequence[Tensor], Tensor] | None],
        total: int | None,
        thorough: bool,
    ) -> None:
        self.trained, self.labels, self.localised = trained, labels, localised
        self.step = 1 if total is None else max(1, math.ceil(total / FIDELITY_IMAGES))
        self.thorough = thorough
        self.images = self.flat = 0
        self.iou: dict[str, list[Tensor]] = {}
        self.pointing: dict[str, list[Tensor]] = {}
        self.best: dict[str, list[Tensor]] = {}
        self.sample = _Sample(trained)

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
        size = (images.shape[2], images.shape[3])
        found = self.localised(truth)
        if found is not None:
            rows = [*LOCALISED, *(n for n in names[:ROWS] if n not in LOCALISED and self.thorough)]
            shown = [(name, maps[0][:, names.index(name)]) for name in rows]
            shown.insert(
                len(LOCALISED), (f"{MAIN_ROW}, center=1", maps[1][:, names.index(MAIN_ROW)])
            )
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
            self.sample.add(query, labels, main, control, self.images, self.step)
        self.images += len(images)

    def localisation(self) -> Localisation:
        return Localisation(
            THRESHOLDS,
            {name: torch.cat(parts) for name, parts in self.iou.items()},
            {name: torch.cat(parts) for name, parts in self.pointing.items()},
            {name: torch.cat(parts) for name, parts in self.best.items()},
        )

    def fidelity(self) -> Fidelity | None:
        return self.sample.fidelity()


class _Sample:
    """Some test images, kept until the partners of all are known, and then given own triplets.

    An image of a class that the database knows draws from the database, as
    :meth:`gcfast.Explainer.explain_labelled` does. One of another class has its positives among the
    test images; its negatives are the other classes of both.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.queries: list[Query] = []
        self.maps: list[Tensor] = []
        self.controls: list[Tensor] = []
        self.at: list[Tensor] = []  # numbers of the sampled images among the labelled ones
        self.embeddings: list[Tensor] = []  # of all labelled images
        self.labels: list[str] = []

    def add(
        self,
        query: Query,
        labels: Sequence[str],
        maps: Tensor,
        controls: Tensor,
        first: int,
        step: int,
    ) -> None:
        taken = (torch.arange(first, first + len(labels)) % step == 0).nonzero().flatten()
        room = FIDELITY_IMAGES - sum(map(len, self.at))
        taken = taken[:room]
        self.at.append(taken + len(self.labels))
        self.labels += labels
        self.embeddings.append(query.embeddings.cpu())
        if len(taken):
            chosen = taken.to(maps.device)
            self.queries.append(Query(*(part[chosen] for part in query)))
            self.maps.append(maps[chosen])
            self.controls.append(controls[chosen])

    def fidelity(self) -> Fidelity | None:
        if not self.queries:
            return None
        database, settings = self.trained.database, self.trained.settings
        at = torch.cat(self.at)
        names = database.class_names or sorted({str(i) for i in database.labels.tolist()})
        numbers = (
            {name: i for i, name in enumerate(names)}
            if database.class_names
            else {name: int(name) for name in names}
        )
        first_new = int(database.labels.max()) + 1 + len(names)
        strangers = sorted(set(self.labels) - set(numbers))
        numbers |= {name: first_new + i for i, name in enumerate(strangers)}
        labels = torch.tensor([numbers[label] for label in self.labels])
        embeddings = torch.cat(self.embeddings)

        known = labels[at] < first_new
        others = labels >= first_new
        hardest = settings.on_no_triplet == "hardest"
        widened = PairSource(
            settings.objective,
            torch.cat([database.embeddings, embeddings[others]]),
            torch.cat([database.labels, labels[others]]),
            hardest=hardest,
        )
        own_row = len(database) + others.cumsum(0) - 1
        plain = PairSource(
            settings.objective, database.embeddings, database.labels, hardest=hardest
        )
        parts = []
        for source, chosen in ((plain, known), (widened, ~known)):
            images = at[chosen]
            if not len(images):
                continue
            rows = own_row[images] if source is widened else torch.full_like(images, len(database))
            anchors = Anchors(embeddings[images], labels[images], rows)
            part = drawn(source, anchors, TRIPLETS, settings.seed)
            parts.append(self._agreement(chosen.nonzero().flatten(), part, part.valid.any(1)))
        unknown = len(at) - sum(len(one) for one in parts)
        if unknown == len(at):
            return None
        return Fidelity(
            torch.cat([one.distances for one in parts]),
            torch.cat([one.cosine for one in parts]),
            torch.cat([one.spearman for one in parts]),
            sum(one.flat for one in parts),
            unknown,
            torch.cat([one.control for one in parts if one.control is not None]),
        )

    def _agreement(self, chosen: Tensor, part: Any, found: Tensor) -> Fidelity:
        """Of sampled images [b] by number, for their own cotangents; those with triplets only."""
        device = self.trained.device
        shape = {tuple(q.activations.shape[2:]) for q in self.queries}
        assert len(shape) == 1  # a network's view has one size
        whole = Query(*(torch.cat(parts) for parts in zip(*self.queries, strict=True)))
        kept = chosen[found].to(device)
        query = Query(*(value[kept] for value in whole))
        weights = grad_weights(
            self.trained,
            part._replace(
                values=part.values[found], valid=part.valid[found], counts=part.counts[found]
            ),
            "gradcam",
            "for",
            embeddings=query.embeddings,
            norms=query.norms,
            pixels=torch.full((len(kept),), query.pixels, device=device),
            pooled=query.pooled,
        )
        way = Way("own", strongest(weights, [CONTROL_CHANNELS])[0])
        (own,) = low_resolution_maps(self.trained, query, [way], (0.0,))
        lent, control = torch.cat(self.maps)[kept], torch.cat(self.controls)[kept]
        # Fine enough for both correlations, and far cheaper to rank than at the images' size.
        H, W = lent.shape[1:]
        large = upsampled(torch.stack([own[:, 0], lent, control], 1), (8 * H, 8 * W))
        mine, given, random = large.unbind(1)
        return Fidelity(
            query.distances.cpu(),
            cosine(mine, given).cpu(),
            spearman(mine, given).cpu(),
            int((flat_maps(mine) | flat_maps(given)).sum()),
            0,
            cosine(mine, random).cpu(),
        )
