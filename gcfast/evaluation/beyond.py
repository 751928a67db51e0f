"""The table beyond the paper: class proxies and refined maps, beside the controls that ask why.

Its rows are made of the same forward pass as the table's seventeen. Each comes as it is and, where
the network has finer outputs on the way to the layer, refined: a control that gains as much from
refining says that the gain is not the method's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gcfast.evaluation.table import (
    Collected,
    QualityTable,
    RegionScore,
    Statistic,
    statistics,
    upsampled,
)
from gcfast.evaluation.ways import (
    MAIN_ROW,
    PROXY_ROW,
    Query,
    Trained,
    Way,
    low_resolution_maps,
    proxy_way,
    refined,
)
from gcfast.metrics import ranking_scores, region_sums

CENTERED_ROW = f"{MAIN_ROW}, center=1"
FROM_TABLE = ("uniform", "channel sum", "random channels", "random neighbor", "EmbeddingCAM")
ROWS = (*FROM_TABLE, CENTERED_ROW, PROXY_ROW)
RANKED_IMAGES = 256

# (truth, class name of each image's nearest row) → [B, h, w] bool, what each map should show:
# nothing of it for an image without one; None where there are no masks.
Objects = Callable[[Any, list[str]], Tensor | None]


class Beyond:
    """Scores the rows batch by batch.

    Args:
        trained: the training images after their pass.
        score: gives the columns that both tables have.
        objects: gives what average precision and best IoU are of; None leaves both out.
        step: every how many images one has these two, which take longer than all else.
        most: how many images have them at most; None for all.
    """

    def __init__(
        self,
        trained: Trained,
        score: RegionScore,
        objects: Objects | None,
        *,
        step: int = 1,
        most: int | None = RANKED_IMAGES,
    ) -> None:
        self.trained, self.score, self.objects = trained, score, objects
        self.step, self.most = step, most
        self.collected = Collected()
        self.images = self.ranked = 0

    def add(self, truth: Any, query: Query, ways: Sequence[Way]) -> dict[str, Tensor]:
        """Score a batch.

        Args:
            truth: of its B images.
            query: the images after their pass.
            ways: those of the table.

        Returns:
            The plain maps [B, H, W] of the main row and of the class proxies.
        """
        names = self.trained.label_names(query.nearest)
        chosen = [way for way in ways if way.name in (*FROM_TABLE, MAIN_ROW)]
        chosen.append(proxy_way(self.trained, query))
        zero, one = low_resolution_maps(self.trained, query._replace(finer=()), chosen, (0.0, 1.0))
        main = len(FROM_TABLE)
        plain = torch.cat([zero[:, :main], one[:, main : main + 1], zero[:, main + 1 :]], 1)
        parts = [(list(ROWS), plain)]
        if query.finer:
            parts.append(([f"{row}, refined" for row in ROWS], refined(query, plain)))
        regions = self.score.regions(truth).to(plain.device)
        shown = None if self.objects is None else self.objects(truth, names)
        taken = self._sampled(len(plain)).to(plain.device)
        for keys, made in parts:
            scores = self.score.scores(region_sums(made, regions), truth, names)
            if shown is not None:
                scores = scores | _ranking(made, shown.to(made.device), taken)
            self.collected.add(keys, scores)
        self.images += len(plain)
        self.ranked += len(taken)
        return {MAIN_ROW: zero[:, main], PROXY_ROW: zero[:, main + 1]}

    def _sampled(self, count: int) -> Tensor:
        """Numbers within the batch of its images that average precision is measured for."""
        numbers = torch.arange(self.images, self.images + count)
        taken = (numbers % self.step == 0).nonzero()[:, 0]
        return taken if self.most is None else taken[: self.most - self.ranked]

    def table(self) -> QualityTable:
        """Return the scores of all images, each row followed by its refined self."""
        pairs = ((row, f"{row}, refined") for row in ROWS)
        rows = [name for pair in pairs for name in pair if name in self.collected.parts]
        return self.collected.table(self.trained.database, rows)


def _ranking(maps: Tensor, shown: Tensor, taken: Tensor) -> dict[str, Tensor]:
    """Average precision and best IoU of maps [B, V, H, W], [B, V] each; NaN if not taken."""
    scores = maps.new_full((2, len(maps), maps.shape[1]), torch.nan, dtype=torch.float32)
    if len(taken):
        for v in range(maps.shape[1]):  # one by one: they are sorted at the size of the images
            size = (shown.shape[1], shown.shape[2])
            large = upsampled(maps[taken, v : v + 1], size)[:, 0]
            scores[:, taken, v] = torch.stack(ranking_scores(large, shown[taken]))
    return {"AP": scores[0], "IoU": scores[1]}


def gains(table: QualityTable, *, seed: int = 0) -> dict[str, dict[str, Statistic]]:
    """Return by how much the class proxy, refined, is above EmbeddingCAM and above the default.

    Args:
        table: of :meth:`Beyond.table`. Where nothing refines, the plain rows are compared.
        seed: of the bootstrap over images.

    Returns:
        "row less row" → column → the images' differences with the interval of their mean.
    """
    scores, end = table.scores, ", refined"
    if f"{PROXY_ROW}{end}" not in scores:
        end = ""
    best = f"{PROXY_ROW}{end}"
    return {
        f"{best} less {rival}": {
            column: statistics((scores[best][column] - scores[rival][column])[:, None], seed)[0]
            for column in table.columns
        }
        for rival in (f"EmbeddingCAM{end}", CENTERED_ROW)
    }
