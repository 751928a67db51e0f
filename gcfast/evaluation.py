"""The paper's Table 1 with controls: every way of making a map, scored on the same images.

One forward pass over the training images and one over the test images serve all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast import ops
from gcfast.build import assemble
from gcfast.database import Database
from gcfast.embedding import Embedded, embed_all
from gcfast.errors import UnsupportedModelError
from gcfast.explainer import Explainer
from gcfast.head import AffineHead, normalized
from gcfast.rows import rows_from_spool
from gcfast.settings import Settings

Score = Callable[[Tensor, Any, list[str]], dict[str, Tensor]]
METHOD_NAMES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}
CONTROL_CHANNELS = 50
MAIN_ROW = "Grad-CAM, for, top-50"


@dataclass
class QualityTable:
    """Scores of each way of making a map.

    Attributes:
        columns: names of the scores.
        scores: row name → column → scores of all test images, [B] float32.
        database: of the row "Grad-CAM, for, top-50".
    """

    columns: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    database: Database | None = None

    @property
    def rows(self) -> list[tuple[str, dict[str, float]]]:
        """(name, mean of each score over the images that have it, NaN being "has not")."""
        return [
            (name, {column: float(values.nanmean()) for column, values in columns.items()})
            for name, columns in self.scores.items()
        ]

    def cells(self) -> list[list[str]]:
        """Header and rows as text."""
        return [
            ["", *self.columns],
            *([name, *(f"{means[c]:.3f}" for c in self.columns)] for name, means in self.rows),
        ]

    def __str__(self) -> str:
        """The table, aligned."""
        cells = self.cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = []
        for row in cells:
            name, *values = row
            aligned = [name.ljust(widths[0])]
            aligned += [v.rjust(w) for v, w in zip(values, widths[1:], strict=True)]
            lines.append("  ".join(aligned))
        return "\n".join(lines)


class _Weights(NamedTuple):
    """What one row of the table makes a batch's maps from."""

    channels: Tensor  # [R, M]
    weights: Tensor  # [R, M]
    offsets: Tensor  # [R]
    rows: Tensor  # [B]: which of the R each image takes


def quality_table(
    explainer: Explainer,
    train_loader: Iterable[Any],
    test_batches: Iterable[tuple[Tensor, Any]],
    score: Score,
    *,
    center: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> QualityTable:
    """The table of one ``center``; see :func:`quality_tables`."""
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
    score: Score,
    *,
    centers: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
    progress: bool = False,
) -> list[QualityTable]:
    """Score the controls, EmbeddingCAM, and every variant of the method.

    The 17 rows: a uniform map; the sum over all channels; 50 random channels; the weights of a
    random row in place of the nearest; EmbeddingCAM (arXiv:2402.00909) with the mean embedding of
    the nearest row's class as the proxy, all channels; then Grad-CAM and Grad-CAM++, evidence for
    and against, each with one triplet and all channels, 50 triplets and all channels, 50 triplets
    and the top 50 channels, by transfer from the nearest row.

    Args:
        explainer: gives the network, the objective, the margin and the seed; its other settings are
            what the rows vary. The head must be the common one.
        train_loader: as for :meth:`Explainer.build`.
        test_batches: (images [B, 3, h, w] on the model's device, truth) pairs; truth is passed on.
        score: (maps [B, h, w] in [0, 1], truth, class name of each image's nearest row) → scores
            by name, [B] each; NaN where an image has none.
        centers: how much of the offsets to subtract from every map, the controls' included: one
            table for each.
        seed: of the random controls.
        progress: show bars on stderr.

    Returns:
        The tables, in the order of ``centers``.

    Raises:
        UnsupportedModelError: another head.
        ValueError: as :meth:`Explainer.build`; no test images; fewer than 50 channels.

    Source: paper, Table 1.
    """
    network = explainer.network
    embedded = embed_all(
        network,
        train_loader,
        l2_normalize=explainer.settings.l2_normalize,
        keep_pooled=True,
        progress=progress,
        channels=CONTROL_CHANNELS,
    )
    if embedded.head is None:
        raise UnsupportedModelError(
            "the table needs a head that averages the activations and maps them affinely"
        )
    variants = {
        name: rows_from_spool(embedded, settings, progress=progress)
        for name, settings in _variants(explainer.settings)
    }
    main = variants[MAIN_ROW]
    database = assemble(network, embedded, main, main.settings, None)
    sources = {name: rows.tensors()[0] for name, rows in variants.items()}
    generator = torch.Generator().manual_seed(seed)
    collected = [_Collected() for _ in centers]
    for images, truth in tqdm(test_batches, desc="test images", disable=not progress, leave=False):
        captured = network.embed(images)
        embeddings = normalized(captured.output, explainer.settings.l2_normalize)
        _, nearest = ops.knn(embeddings, database.embeddings.to(images.device), 1)
        nearest = nearest[:, 0]
        labels = database.labels[nearest.cpu()].tolist()
        names = [database.label_name(label) for label in labels]
        makers = _makers(
            embedded,
            embedded.head,
            sources,
            captured.activations,
            embeddings,
            nearest,
            generator,
        )
        for name, chosen in makers:
            taken = None if chosen is None else _Weights(*(t.to(images.device) for t in chosen))
            for center, scores in zip(centers, collected, strict=True):
                maps = _maps(captured.activations, taken, center, images.shape)
                scores.add(name, score(maps, truth, names))
    if not all(scores.parts for scores in collected):
        raise ValueError("`test_batches` must give images, got none")
    return [scores.table(database) for scores in collected]


class _Collected:
    """Scores as they come, batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, name: str, scores: dict[str, Tensor]) -> None:
        columns = self.parts.setdefault(name, {})
        for column, values in scores.items():
            columns.setdefault(column, []).append(values.cpu())

    def table(self, database: Database) -> QualityTable:
        scores = {
            name: {column: torch.cat(values) for column, values in columns.items()}
            for name, columns in self.parts.items()
        }
        return QualityTable(list(next(iter(scores.values()))), scores, database)


def _maps(
    activations: Tensor, weights: _Weights | None, center: float, images: torch.Size
) -> Tensor:
    """Maps [B, h, w] at the size of the images; uniform ones without weights."""
    if weights is None:
        return torch.ones((images[0], *images[2:]), device=activations.device)
    return ops.sparse_cam(
        activations,
        weights.rows[:, None],
        weights.channels,
        weights.weights,
        size=(images[2], images[3]),
        offsets=weights.offsets,
        center=center,
    )


def _variants(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """The twelve settings of the paper's method."""
    for method, shown in METHOD_NAMES.items():
        for evidence in ("for", "against"):
            base = replace(settings, method=method, evidence=evidence)
            head = f"{shown}, {evidence}"
            yield f"{head}, one triplet", replace(base, triplets=1, channels="all")
            yield f"{head}, all channels", replace(base, triplets=50, channels="all")
            yield f"{head}, top-50", replace(base, triplets=50, channels=50)


def _makers(
    embedded: Embedded,
    head: AffineHead,
    sources: dict[str, dict[str, Tensor]],
    activations: Tensor,
    embeddings: Tensor,
    nearest: Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[str, _Weights | None]]:
    """(row name, weights) in the order of the table; None is the uniform map."""
    B, C = activations.shape[:2]
    device = activations.device
    own = torch.arange(B, device=device)
    mean = embedded.mean_activation.float()
    every = torch.arange(C)[None]

    yield "uniform", None
    yield (
        "channel sum",
        _Weights(every, torch.ones(1, C), mean.sum()[None], torch.zeros_like(own)),
    )
    channels = torch.rand((B, C), generator=generator).argsort(1)[:, :CONTROL_CHANNELS]
    yield (
        "random channels",
        _Weights(channels, torch.ones(channels.shape), mean[channels].sum(1), own),
    )
    main = sources[MAIN_ROW]
    random_rows = torch.randint(len(main["labels"]), (B,), generator=generator).to(device)
    yield "random neighbour", _from_table(main, random_rows)

    # EmbeddingCAM: the similarity <f, p> to the proxy, differentiated at the image itself; growing
    # channels raise it, so its sign is that of evidence for.
    train_labels = embedded.labels
    proxies = torch.stack(
        [
            embedded.embeddings[train_labels == label].mean(0)
            for label in main["labels"][nearest.cpu()]
        ]
    ).to(device)
    pooled = activations.float().mean((2, 3))
    weights = ops.head_grad_weights(
        proxies[:, None],
        head.weight,
        pixels=activations.shape[2] * activations.shape[3],
        embeddings=embeddings if head.unit else None,
        norms=head.project(pooled)[1] if head.unit else None,
    ).cpu()
    yield "EmbeddingCAM", _Weights(every.expand(B, C), weights, weights @ mean, own)

    for name, source in sources.items():
        yield name, _from_table(source, nearest)


def _from_table(source: dict[str, Tensor], rows: Tensor) -> _Weights:
    """Only the rows that are taken travel to the device."""
    taken = rows.cpu()
    return _Weights(
        source["channels"][taken],
        source["weights"][taken],
        source["offsets"][taken],
        torch.arange(len(rows), device=rows.device),
    )
