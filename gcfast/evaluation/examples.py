"""Examples of what ``gcfast evaluate`` scored, with their maps: the paper's Figures 4 and 5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gcfast import ops
from gcfast.evaluation import figures
from gcfast.evaluation.datasets import AnnotationError, ScoredLoader
from gcfast.evaluation.table import upsampled
from gcfast.explain.explainer import Explainer
from gcfast.metrics import mask_score

EXAMPLES = 6
FILES = ("examples.png", "pairs.png")


def draw_examples(
    explainer: Explainer, loader: ScoredLoader, neighbors: Path | None, out: Path
) -> Iterator[str]:
    """Draw images spread evenly over the set; yields the names of the files.

    Args:
        explainer: with the database whose maps are shown.
        loader: of the test images.
        neighbors: the folder of the database's pictures; None draws no pairs.
        out: the folder.
    """
    samples = loader.dataset.samples
    left_out = {name for name, _ in loader.skipped}
    samples = [sample for sample in samples if sample.id not in left_out]
    step = max(1, -(-len(samples) // EXAMPLES))
    few = ScoredLoader(
        replace(loader.dataset, samples=samples[::step][:EXAMPLES]), loader.preprocessing
    )
    try:
        ((images, truth),) = list(few)
    except AnnotationError:  # the pictures were removed after they were scored
        return
    images = images.to(explainer.network.device(images.device))
    why = explainer.explain_batch(images, details=True)
    size = (images.shape[2], images.shape[3])
    captured = explainer.network.embed(images, finer=True)
    total = captured.activations.float().sum(1, keepdim=True).clamp(min=0)
    for output in captured.finer:
        total = ops.refine(total[:, 0], output)[:, None]
    total = total / total.amax((2, 3), keepdim=True).clamp(min=1e-30)
    maps = {
        "the database": why.maps,
        "the same, center=1": explainer.explain_batch(images, center=1.0),
        "channel sum": upsampled(total, size)[:, 0],
    }
    regions = {"box": truth.box_mask} | ({} if truth.masks is None else {"mask": truth.masks})
    views = list(loader.preprocessing.pictures(images))
    figure = figures.grid(
        views,
        {name: _heats(heat) for name, heat in maps.items()},
        {
            name: {r: mask_score(heat.cpu(), inside).tolist() for r, inside in regions.items()}
            for name, heat in maps.items()
        },
        titles=truth.labels,
    )
    figures.save(figure, out / FILES[0])
    yield FILES[0]

    database = explainer.database
    assert database is not None
    ids = [database.ids[row] for row in why.neighbors[:, 0].tolist()]
    if neighbors is None or not all((neighbors / name).is_file() for name in ids):
        return
    shown = [loader.preprocessing.view(neighbors / name) for name in ids]
    lent = loader.preprocessing.normalize(torch.stack([torch.from_numpy(v.copy()) for v in shown]))
    # A training picture's nearest row is its own.
    own = explainer.explain_batch(lent.to(images.device))
    figure = figures.transfer_pairs(
        views,
        _heats(why.maps),
        shown,
        _heats(own),
        titles=[f"squared distance {d:.3g}" for d in why.distances[:, 0].tolist()],
    )
    figures.save(figure, out / FILES[1])
    yield FILES[1]


def _heats(maps: Tensor) -> list[figures.Heat]:
    return list(maps.float().clamp(0, 1).cpu().numpy())
