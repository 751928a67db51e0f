"""What `bench/scenes.py` scores: batches of its pictures, the four columns, the goals and why.

`share` and `right` are over the pictures whose nearest row's class is one of the two on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scenes_compose import Pictures
from scenes_network import to_input
from torch import Tensor

import gcfast
from gcfast.cli.evaluate import compressor
from gcfast.evaluation.measure import PAPER_ROW, Evaluation, evaluate
from gcfast.evaluation.table import MAIN_ROW, statistics
from gcfast.metrics import RegionSums, box_masks, localisation_accuracy
from gcfast.metrics.scores import two_object_shares

BATCH = 32


@dataclass(frozen=True)
class Truth:
    """What a batch of B pictures shows: masks bool [B, n, h, w], boxes [B, n, 4], class names."""

    masks: Tensor
    boxes: Tensor
    names: list[tuple[str, ...]]


class Rows:
    """Labelled training batches (images, class names, ids), the same on every pass."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return -(-len(self.pictures) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], list[str]]]:
        for start in range(0, len(self.pictures), BATCH):
            part = slice(start, start + BATCH)
            labels = [names[0] for names in self.pictures.names[part]]
            ids = [f"{name}#{start + i}" for i, name in enumerate(labels)]
            yield to_input(self.pictures.images[part]), labels, ids


class Queries:
    """Test batches (images, Truth) of several sets of pictures, one set after the other."""

    def __init__(self, sets: Sequence[Pictures]) -> None:
        self.sets = sets

    def __len__(self) -> int:
        return sum(-(-len(pictures) // BATCH) for pictures in self.sets)

    def __iter__(self) -> Iterator[tuple[Tensor, Truth]]:
        for pictures in self.sets:
            for start in range(0, len(pictures), BATCH):
                part = slice(start, start + BATCH)
                yield (
                    to_input(pictures.images[part]),
                    Truth(
                        torch.from_numpy(pictures.masks[part]),
                        torch.from_numpy(pictures.boxes[part]),
                        pictures.names[part],
                    ),
                )


def matches(names: Sequence[tuple[str, ...]], neighbor_labels: Sequence[str]) -> Tensor:
    """Which of each picture's objects is of its nearest row's class, [B]; -1 where none is."""
    pairs = zip(names, neighbor_labels, strict=True)
    return torch.tensor([n.index(label) if label in n else -1 for n, label in pairs])


class SceneScore:
    """The four columns; NaN where a column does not apply to a batch's pictures."""

    def regions(self, truth: Truth) -> Tensor:
        """Mask and box of the one object, or the masks of the two."""
        if truth.masks.shape[1] == 2:
            return truth.masks
        boxes = box_masks(truth.boxes[:, 0], *truth.masks.shape[2:])
        return torch.stack([truth.masks[:, 0], boxes], 1)

    def scores(
        self, sums: RegionSums, truth: Truth, neighbor_labels: list[str]
    ) -> dict[str, Tensor]:
        nothing = torch.full(sums.total.shape, torch.nan)
        if truth.masks.shape[1] == 1:
            mask, box = sums.shares().unbind(2)
            return {"mask": mask, "box": box, "share": nothing, "right": nothing}
        match = matches(truth.names, neighbor_labels)
        share, right = two_object_shares(sums.inside, sums.areas, match)
        return {"mask": nothing, "box": nothing, "share": share, "right": right}


def objects(truth: Truth, neighbor_labels: list[str]) -> Tensor:
    """Masks [B, h, w] of what a map should show: the one object, or that of the map's class.

    Nothing where neither of two objects is of it.
    """
    match = matches(truth.names, neighbor_labels)
    if truth.masks.shape[1] == 1:
        match = torch.zeros_like(match)
    own = truth.masks[torch.arange(len(match)), match.clamp(min=0)]
    return own & (match >= 0)[:, None, None]


def localised(truth: Truth) -> tuple[list[Tensor], Tensor] | None:
    """True boxes and masks, of pictures with one object."""
    return (list(truth.boxes), truth.masks[:, 0]) if truth.masks.shape[1] == 1 else None


def labels(truth: Truth) -> list[str] | None:
    """Classes of pictures with one object."""
    return [name for (name,) in truth.names] if truth.masks.shape[1] == 1 else None


def bars(
    rows: dict[str, dict[str, float]], compressed: dict[str, float] | None = None
) -> list[str]:
    """The differences that the maps are held to, one line each.

    Args:
        rows: Row name to column name to mean, without centring.
        compressed: The same of the database of 50 k-means centres, where there is one.
    """
    top = rows[MAIN_ROW]
    every, against = rows["Grad-CAM, for, all channels"], rows["Grad-CAM, against, top-50"]
    uniform, random = rows["uniform"], rows["random channels"]
    checks = [
        ("mask: top-50 less all channels", top["mask"] - every["mask"], 0.10),
        ("mask: top-50 less uniform", top["mask"] - uniform["mask"], 0.30),
        ("share: for less random channels", top["share"] - random["share"], 0.05),
        ("share: for less against", top["share"] - against["share"], 0.10),
        ("right: for", top["right"], 0.85),
    ]
    lines = [
        f"{name:39s} {value:+.3f}  goal {goal:+.2f}  {'met' if value >= goal else 'MISSED'}"
        for name, value, goal in checks
    ]
    for column in () if compressed is None else ("mask", "share"):
        assert compressed is not None
        value = compressed[column] - top[column]
        name = f"{column}: 50 k-means centres less all rows"
        met = "met" if abs(value) <= 0.02 else "MISSED"
        lines.append(f"{name:39s} {value:+.3f}  goal ±0.02  {met}")
    return lines


def measure(
    explainer: gcfast.Explainer,
    rows: Pictures,
    one: Pictures,
    two: Pictures,
    *,
    seed: int,
    progress: bool,
) -> Evaluation:
    """All that `gcfast evaluate` measures, over both sets of test pictures."""
    return evaluate(
        explainer,
        Rows(rows),
        Queries([one, two]),
        SceneScore(),
        labels=labels,
        localised=localised,
        objects=objects,
        ranked=None,
        compress=compressor(),
        total=len(one),
        seed=seed,
        progress=progress,
    )


def sweep_lines(measured: Evaluation) -> list[str]:
    """How the columns depend on M, T and the number of centres, and the fidelity by distance."""
    extra = measured.tables[0.0].extra
    columns = measured.tables[0.0].columns
    width = max(len(name) for name in extra)
    lines = [f"{'':{width}s}" + "".join(f"{c:>7s}" for c in columns)]
    for name, values in extra.items():
        means = "".join(f"{float(values[c].nanmean()):7.3f}" for c in columns)
        lines.append(f"{name:{width}s}{means}")
    for name, iou in measured.localisation.iou.items():
        shown = " ".join(f"{float(v):.3f}" for v in localisation_accuracy(iou))
        lines.append(f"accuracy at IoU 0.5 for thresholds 0.1 to 0.9, {name}: {shown}")
    for name, hits in measured.localisation.pointing.items():
        lines.append(f"pointing game, 15 pixels, {name}: {float(hits.mean()):.3f}")
    if measured.fidelity is not None:
        lines += str(measured.fidelity).splitlines()
    return lines


def gap_lines(measured: Evaluation, two: Pictures) -> list[str]:
    """The share of evidence for less that of evidence against: where it is wide, where narrow."""
    scores = measured.tables[0.0].scores
    top, against = (scores[n]["share"][-len(two) :] for n in (MAIN_ROW, PAPER_ROW))
    # A uniform map's share is the matching object's part of the two areas.
    area = scores["uniform"]["share"][-len(two) :]
    lines = []
    edges = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    for low, high in [(0.0, 1.0), *pairwise(edges)]:
        there = (area >= low) & ((area < high) | (high == 1.0))
        if not bool(there.any()):
            continue
        gap = (top - against)[there]
        (one,) = statistics(gap[:, None].double())
        lines.append(
            f"match has {low:.1f} to {high:.1f} of the objects' area: for "
            f"{float(top[there].mean()):.3f}, against {float(against[there].mean()):.3f}, gap "
            f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}], {one.images} pictures"
        )
    return lines
