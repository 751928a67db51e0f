"""Ways to make a map: what a table compares, each as one weight per channel for each image.

All weights are dense, [B, C]: the maps of all ways of a batch are one matrix product with its
activations, and rows' weights are made only for the rows that are needed, not for the whole table
of every variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.build import in_memory
from gcfast.builder.embed import embed
from gcfast.builder.loader import check_embeddings
from gcfast.builder.rows import averaged
from gcfast.database.database import Database
from gcfast.errors import UnsupportedModelError
from gcfast.explain.explainer import Explainer
from gcfast.method.head import normalized
from gcfast.method.pairs import Cotangents, PairSource
from gcfast.method.partners import Anchors
from gcfast.method.proxies import Classes, Proxies, directions, proxy_weights
from gcfast.method.settings import Settings
from gcfast.metrics.controls import random_channels, random_rows
from gcfast.model.network import Network

METHOD_NAMES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}
CONTROL_CHANNELS = 50
TRIPLETS = 50
MAIN_ROW = "Grad-CAM, for, top-50"
PROXY_ROW = "class proxy"
ROWS = 17  # of the table

Count = int | Literal["all"]


class Way(NamedTuple):
    """One way to make the maps of a batch."""

    name: str
    weights: Tensor | None  # [B, C]; None: a uniform map


class Query(NamedTuple):
    """A batch of test images after its forward pass, on the model's device."""

    activations: Tensor  # [B, C, H, W]
    embeddings: Tensor  # [B, D] float32
    pooled: Tensor  # [B, C] float32
    norms: Tensor  # [B]
    nearest: Tensor  # [B] int64, rows of the database
    distances: Tensor  # [B] float32, squared L2
    # [B, C', H', W'] each, of the layers that refine maps, coarse to fine.
    finer: tuple[Tensor, ...] = ()

    def at(self, chosen: Tensor) -> Query:
        """Return what belongs to some of the images, by number."""
        values = (value[chosen] for value in self[:-1])
        return Query._make([*values, tuple(x[chosen] for x in self.finer)])

    @classmethod
    def joined(cls, queries: Sequence[Query]) -> Query:
        """Return several batches as one."""
        *parts, finer = zip(*queries, strict=True)
        outputs = tuple(map(torch.cat, zip(*finer, strict=True)))
        return cls._make([*map(torch.cat, parts), outputs])

    @property
    def pixels(self) -> int:
        """P of the feature map."""
        return self.activations.shape[2] * self.activations.shape[3]


class Trained:
    """The training images after their one forward pass, and the database of the main row.

    Args:
        explainer: gives the network, the objective, the margin and the seed. With ``refine`` the
            maps of all ways are refined; without it the finer outputs are those of "auto".
        loader: as for :meth:`gcfast.Explainer.build`.
        progress: show bars on stderr.

    Raises:
        UnsupportedModelError: the head does not average the activations and map them affinely.
        ValueError: an objective over real numbers, which has no classes to compare; class proxies
            or cotangents, which the table does not vary; as
            :meth:`gcfast.Explainer.build`; fewer than 50 channels.
    """

    def __init__(self, explainer: Explainer, loader: Iterable[Any], progress: bool) -> None:
        self.network, self.settings = explainer.network, explainer.settings
        self.refines = self.network.refine is not None
        if not self.refines:
            self.network = Network(
                self.network.model,
                self.network.layer_name,
                output_key=self.network.output_key,
                reshape=self.network.reshape,
                refine="auto",
            )
        if self.settings.objective.real_labels:
            raise ValueError(
                "`explainer` must have an objective over classes to be evaluated, got "
                f"{self.settings.objective!r}"
            )
        if self.settings.without_channels:
            raise ValueError(
                "`explainer` must be one of grad-weights to be evaluated, got method="
                f"{self.settings.method!r}: build a database of the same pictures with "
                "method='gradcam'"
            )
        # Grad-CAM++, which the table has too, keeps the pooled activations.
        stage = replace(self.settings, method="gradcam++", channels=CONTROL_CHANNELS)
        self.embedded = embed(self.network, loader, stage, progress=progress)
        if self.embedded.head is None:
            raise UnsupportedModelError(
                "the table needs a head that averages the activations and maps them affinely"
            )
        self.head = self.embedded.head
        self.device = self.head.weight.device
        # kept: [N], the number of each row's image
        self.database, self.kept = in_memory(
            self.network, loader, self.embedded, self.main_settings(), progress=progress
        )
        self.table = self.database.embeddings.to(self.device)
        self.mean = self.embedded.mean_activation.to(self.device)  # [C] float64
        self.source = self.embedded.source(self.settings, torch.device("cpu"))
        assert self.embedded.pooled is not None
        classes = Classes.of(directions(self.embedded.pooled), self.embedded.labels)
        self.proxies = Proxies.of(classes, self.device)

    def main_settings(self) -> Settings:
        """Return the settings of the database that the main row explains from."""
        return replace(
            self.settings,
            method="gradcam",
            evidence="for",
            triplets=TRIPLETS,
            channels=CONTROL_CHANNELS,
        )

    def query(self, images: Tensor) -> Query:
        """Run the forward pass over test images, and find their nearest rows.

        Raises:
            UnsupportedModelError: patches do not cover the images, or reach beyond them.
            ValueError: NaN or infinity in the images or their embeddings, with the row.
        """
        captured = self.network.embed(images, finer=True)
        if captured.share != (1.0, 1.0):
            raise UnsupportedModelError(
                "the table needs patches that cover the images, got "
                f"{list(captured.activations.shape[2:])} of them for {list(images.shape[2:])} "
                "pixels: take a size that is a multiple of the patch"
            )
        embeddings = normalized(captured.output, self.settings.l2_normalize)
        check_embeddings(embeddings, images)
        distances, nearest = ops.knn(embeddings, self.table, 1)
        pooled = captured.activations.float().mean((2, 3))
        norms = self.head.project(pooled)[1]
        activations = captured.activations
        nearest, distances = nearest[:, 0], distances[:, 0]
        return Query(activations, embeddings, pooled, norms, nearest, distances, captured.finer)

    def label_names(self, rows: Tensor) -> list[str]:
        """Return the class names of database rows [B]."""
        labels = self.database.labels[rows.cpu()].tolist()
        return [self.database.label_name(label) for label in labels]

    def cotangents(self, rows: Tensor, triplets: Count) -> Cotangents:
        """Return dL/df of the triplets of rows [B], drawn as by a build; their mean for "all"."""
        spool = self.kept[rows.cpu()]
        anchors = Anchors(self.embedded.embeddings[spool], self.embedded.labels[spool], spool)
        return drawn(self.source, anchors, triplets, self.settings.seed)

    def weights(self, rows: Tensor, part: Cotangents, method: str, evidence: str) -> Tensor:
        """Return the grad-weights [B, C] of database rows [B] for their cotangents."""
        spool = self.kept[rows.cpu()]
        embedded, device = self.embedded, self.device
        assert embedded.norms is not None
        assert embedded.pixels is not None
        assert embedded.pooled is not None
        return grad_weights(
            self,
            part,
            method,
            evidence,
            embeddings=embedded.embeddings[spool].to(device),
            norms=embedded.norms[spool].to(device),
            pixels=embedded.pixels[spool].to(device),
            pooled=embedded.pooled[spool].to(device),
        )


def drawn(source: PairSource, anchors: Anchors, triplets: Count, seed: int) -> Cotangents:
    """Return T triplets of each anchor, or the mean over all of them as one."""
    return source.mean(anchors) if triplets == "all" else source.draw(anchors, triplets, seed)


def grad_weights(
    trained: Trained,
    part: Cotangents,
    method: str,
    evidence: str,
    *,
    embeddings: Tensor,
    norms: Tensor,
    pixels: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Return grad-weights [B, C] in closed form, with the sign of the evidence."""
    one = averaged(part) if method == "gradcam" else part
    sign = -1 if evidence == "for" else 1
    values = (sign * one.values).to(trained.device)
    return trained.head.grad_weights(
        [Cotangents(values, one.valid.to(trained.device), one.counts)],
        method,
        embeddings=embeddings,
        norms=norms,
        pixels=pixels,
        pooled=pooled if method == "gradcam++" else None,
    )


def strongest(weights: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Zero all but the M highest weights of each row [B, C], for each M; ties as ``top_m``."""
    order = weights.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    places = torch.arange(weights.shape[1], device=weights.device)
    rank.scatter_(1, order, places.expand_as(order))
    return [torch.where(rank < m, weights, 0.0) for m in counts]


def table_ways(trained: Trained, query: Query, first: int, seed: int) -> Iterator[Way]:
    """Yield the seventeen rows of the paper's table with its controls, in order.

    Args:
        trained: the training images after their pass.
        query: a batch of test images.
        first: the number of its first image among the test images.
        seed: of the random controls.
    """
    B, C = query.pooled.shape
    device = query.pooled.device
    yield Way("uniform", None)
    yield Way("channel sum", torch.ones((B, C), device=device))
    images = torch.arange(first, first + B)
    channels = random_channels(images, C, CONTROL_CHANNELS, seed)
    chosen = torch.zeros((B, C)).scatter_(1, channels, 1.0)
    yield Way("random channels", chosen.to(device))
    rows = random_rows(images, len(trained.database), seed)
    yield Way("random neighbor", from_database(trained.database, rows, C, device))
    yield Way("EmbeddingCAM", _embedding_cam(trained, query))

    # Images of a batch often share their nearest row.
    nearest, back = torch.unique(query.nearest, return_inverse=True)
    single, fifty = (trained.cotangents(nearest, t) for t in (1, TRIPLETS))
    for method, shown in METHOD_NAMES.items():
        for evidence in ("for", "against"):
            head = f"{shown}, {evidence}"
            one = trained.weights(nearest, single, method, evidence)
            yield Way(f"{head}, one triplet", one[back])
            every = trained.weights(nearest, fifty, method, evidence)
            yield Way(f"{head}, all channels", every[back])
            yield Way(f"{head}, top-50", strongest(every, [CONTROL_CHANNELS])[0][back])


def _embedding_cam(trained: Trained, query: Query) -> Tensor:
    # The similarity <f, p> to the proxy, differentiated at the image itself; larger channels raise
    # it, so its sign is that of evidence "for".
    embedded = trained.embedded
    labels = trained.database.labels[query.nearest.cpu()]
    proxies = {
        label: embedded.embeddings[embedded.labels == label].mean(0)
        for label in sorted(set(labels.tolist()))
    }
    proxy = torch.stack([proxies[label] for label in labels.tolist()]).to(trained.device)
    return ops.head_grad_weights(
        proxy[:, None],
        trained.head.weight,
        pixels=query.pixels,
        embeddings=query.embeddings if trained.head.unit else None,
        norms=query.norms if trained.head.unit else None,
    )


def proxy_way(trained: Trained, query: Query) -> Way:
    """Return the way of ``method="proxy"``: the proxy of the nearest row's class."""
    labels = trained.database.labels[query.nearest.cpu()].to(trained.device)
    proxies = trained.proxies.mixed(trained.proxies.places(labels[:, None]))
    return Way(PROXY_ROW, proxy_weights(query.activations, proxies))


def from_database(database: Database, rows: Tensor, C: int, device: torch.device) -> Tensor:
    """Return the weights [B, C] of database rows [B]."""
    taken = rows.cpu()
    dense = torch.zeros((len(taken), C))
    dense.scatter_(1, database.channels[taken], database.weights[taken])
    return dense.to(device)


Ways = Callable[[Trained, Query], Iterator[Way]]


def channel_ways(counts: Sequence[int], evidence: str = "for") -> Ways:
    """Return Grad-CAM with T = 50 and the top M channels, for each M: ``M=…, evidence``."""

    def ways(trained: Trained, query: Query) -> Iterator[Way]:
        nearest, back = torch.unique(query.nearest, return_inverse=True)
        part = trained.cotangents(nearest, TRIPLETS)
        every = trained.weights(nearest, part, "gradcam", evidence)
        for m, weights in zip(counts, strongest(every, counts), strict=True):
            yield Way(f"M={m}, {evidence}", weights[back])

    return ways


def triplet_ways(counts: Sequence[Count]) -> Ways:
    """Return Grad-CAM, evidence for, top-50, with T triplets, for each T: ``T=…``."""

    def ways(trained: Trained, query: Query) -> Iterator[Way]:
        nearest, back = torch.unique(query.nearest, return_inverse=True)
        for count in counts:
            part = trained.cotangents(nearest, count)
            every = trained.weights(nearest, part, "gradcam", "for")
            yield Way(f"T={count}", strongest(every, [CONTROL_CHANNELS])[0][back])

    return ways


def database_ways(databases: dict[str, Database]) -> Ways:
    """Return transfer from the nearest row of other databases of the network, by name."""

    def ways(trained: Trained, query: Query) -> Iterator[Way]:
        C, device = query.pooled.shape[1], query.pooled.device
        for name, database in databases.items():
            _, nearest = ops.knn(query.embeddings, database.embeddings.to(device), 1)
            yield Way(name, from_database(database, nearest[:, 0], C, trained.device))

    return ways


def low_resolution_maps(
    trained: Trained, query: Query, ways: Sequence[Way], centers: Sequence[float]
) -> list[Tensor]:
    """Return maps [B, V, H, W] of V ways in [0, 1] before upsampling, one tensor for each center.

    The maps pass a ReLU and are divided by their maximum, as by :func:`gcfast.ops.sparse_cam`; a
    uniform map is 1 everywhere. With ``refine`` they are refined first, the controls as well, and H
    and W are those of the last finer output.
    """
    B, C, H, W = query.activations.shape
    zeros = query.pooled.new_zeros((B, C))
    weights = torch.stack([zeros if w.weights is None else w.weights for w in ways], 1)
    raw = torch.bmm(weights, query.activations.float().flatten(2))  # [B, V, P]
    offsets = (weights.double() @ trained.mean).float()[..., None]  # [B, V, 1]
    uniform = torch.tensor([w.weights is None for w in ways], device=raw.device)[:, None]
    finished = []
    for center in centers:
        maps = (raw - center * offsets).clamp(min=0)
        peak = maps.amax(2, keepdim=True)
        maps = torch.where(peak == 0, 0.0, maps / peak)  # NaN stays NaN
        maps = torch.where(uniform, 1.0, maps).view(B, len(ways), H, W)
        finished.append(refined(query, maps) if trained.refines else maps)
    return finished


def refined(query: Query, maps: Tensor) -> Tensor:
    """Return maps [B, V, H, W] refined by the query's finer outputs, [B, V, H', W'] in [0, 1]."""
    for output in query.finer:
        maps = torch.stack([ops.refine(way, output) for way in maps.unbind(1)], 1)
    peak = maps.amax((2, 3), keepdim=True)
    return torch.where(peak == 0, 0.0, maps / peak)  # NaN stays NaN
