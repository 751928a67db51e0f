"""Stage 1 of a build: one forward pass over the images, into a spool."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast._checks import require_finite_rows
from gcfast._progress import Progress, length
from gcfast.builder.loader import Batch, batches, check_embeddings, on_device
from gcfast.builder.offload import Columns, Offload, resident
from gcfast.builder.spool import Spool
from gcfast.database.ids import Ids, IdTable, repeated
from gcfast.method import labels
from gcfast.method.elementwise import check_reached
from gcfast.method.head import AffineHead, normalized, probe
from gcfast.method.labels import Labels, Values
from gcfast.method.neighbors import Neighbors, NeighborSource
from gcfast.method.pairs import PairSource
from gcfast.method.proxies import Classes, directions
from gcfast.method.settings import Settings
from gcfast.model.network import Network

SAME_IMAGE_TOLERANCE = 1e-2  # distance by which an embedding may move between two passes
CLOSED_FORM = ("norms", "pixels", "pooled")  # columns that only the closed form needs


class Embedded(NamedTuple):
    """The results of stage 1."""

    embeddings: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64; float64 where they are real numbers
    ids: Sequence[str]
    class_names: list[str]
    norms: Tensor | None  # [N] float32: closed form only
    pixels: Tensor | None  # [N] int64
    pooled: Tensor | None  # [N, C] float32: closed form with Grad-CAM++ only
    mean_activation: Tensor  # [C] float64
    head: AffineHead | None
    directions: Tensor | None = None  # [N, C] float32: class proxies only
    neighbors: Neighbors | None = None  # what stands for labels, which are then row numbers

    def source(self, settings: Settings, device: torch.device) -> PairSource:
        """Return the valid pairs of any anchor among these rows, found on the device if it fits."""
        table, hardest = resident(self.embeddings, device), settings.on_no_triplet == "hardest"
        if self.neighbors is not None:
            return NeighborSource(
                settings.objective, table, self.neighbors, seed=settings.seed, hardest=hardest
            )
        return PairSource(settings.objective, table, self.labels.to(table.device), hardest=hardest)

    @property
    def alone(self) -> Tensor | None:
        """Which rows [N] are without a positive whatever their labels say; None: labels say it."""
        return None if self.neighbors is None else torch.zeros(len(self.labels), dtype=torch.bool)

    def classes(self) -> Classes | None:
        """Return the sums that class proxies are made of; None for another method."""
        return None if self.directions is None else Classes.of(self.directions, self.labels)

    def check_same(self, batch: Batch, start: int, before: str) -> int:
        """Check that a batch has the labels and ids of these rows, from ``start`` on.

        Args:
            batch: what the loader gave.
            start: number of its first image.
            before: when the rows were made, for the error: "the first time", …

        Returns:
            The number after that of its last image.

        Raises:
            ValueError: it is another batch.
        """
        stop = start + len(batch.images)
        if stop > len(self.ids):
            raise other_images(f"it gave {len(self.ids)} images {before} and more now")
        labels = self.labels[start:stop].tolist()
        known = [self.class_names[label] for label in labels] if self.class_names else labels
        if known != batch.labels:
            raise other_images(f"labels differ in rows {start} to {stop - 1}")
        if batch.ids is not None and batch.ids != self.ids[start:stop]:
            raise other_images(f"ids differ in rows {start} to {stop - 1}")
        return stop

    def check_embeddings(self, embeddings: Tensor, start: int) -> None:
        """Raise ValueError where embeddings [B, D] differ from these rows', from ``start`` on."""
        before = self.embeddings[start : start + len(embeddings)]
        moved = (embeddings.detach().cpu() - before).norm(dim=1)
        if bool((moved > SAME_IMAGE_TOLERANCE * before.norm(dim=1).clamp(min=1e-12)).any()):
            raise other_images(f"the embedding of row {start + int(moved.argmax())} differs")


def other_images(how: str) -> ValueError:
    """Return the error for a loader that gives other images than it gave before."""
    return ValueError(
        "`loader` must give the same images in the same order each time "
        f"(shuffling and random augmentation off): {how}"
    )


@dataclass
class Totals:
    """What stage 1 keeps from batch to batch, in addition to the spool."""

    rows: int = 0
    first: int = 0  # the number of the first image, where a database has some already
    head: AffineHead | None = None
    channel_sum: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    pixel_count: int = 0
    id_bytes: int = 0
    labels: Labels | Values = field(default_factory=Labels)

    def embedded(self, spool: Spool) -> Embedded:
        """Return the results so far."""

        def column(name: str) -> Tensor | None:
            return spool.column(name) if self.head is not None and spool.has(name) else None

        return Embedded(
            embeddings=spool.column("embeddings"),
            labels=spool.column("labels"),
            ids=Ids([IdTable(spool.column("id_ends"), spool.column("id_bytes"))]),
            class_names=self.labels.names,
            norms=column("norms"),
            pixels=column("pixels"),
            pooled=column("pooled"),
            mean_activation=self.channel_sum / max(self.pixel_count, 1),
            head=self.head,
            directions=spool.column("directions") if spool.has("directions") else None,
        )


def embed(
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
    spool: Spool | None = None,
    totals: Totals | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Embedded:
    """Stage 1: one forward pass over the loader.

    Batches that the spool already holds are compared with it, without a forward pass except for
    the last of them.

    Args:
        network: the model and its layer.
        loader: as for :meth:`gcfast.Explainer.build`.
        settings: of the build; pooled activations are spooled for Grad-CAM++ and for class proxies
            alone.
        progress: show a bar on stderr.
        spool: what the results go to; None for one in memory. Closed at the end.
        totals: what belongs to the spool so far; None for the beginning.
        after_batch: called when a batch is in the spool, which may store both.

    Raises:
        ValueError: no images, no labels, one class only, or NaN in an embedding, with its row;
            more channels than the layer has; a loader that can be gone through once, and a head
            that needs two passes; other images than are spooled.
    """
    spool = Spool() if spool is None else spool
    if totals is None:
        totals = Totals(labels=labels.column(settings.objective.real_labels))
    try:
        _Stage(network, settings, spool, totals).run(loader, progress, after_batch)
        return complete(spool, totals)
    finally:
        spool.close()


def complete(spool: Spool, totals: Totals) -> Embedded:
    """Return what stage 1 gave for all the images; raises ValueError for one class, ids twice."""
    if not totals.first:
        totals.labels.require_two()
    embedded = totals.embedded(spool)
    twice = repeated(embedded.ids)
    if twice is not None:
        first, second = (totals.first + number for number in twice[1:])
        raise ValueError(
            f"`ids` must be unique, got {twice[0]!r} for images {first} and {second}: give "
            "each image an id of its own, or no ids at all"
        )
    return embedded


def head_of(network: Network, images: Tensor, settings: Settings) -> AffineHead | None:
    """Return the head that the closed form takes, if the model's is one and the method needs it.

    Args:
        network: the model and its layer.
        images: [B, 3, h, w], the first batch, on its device.
        settings: of the build.

    Raises:
        ValueError: with ``method="elementwise"``, that no gradient reaches the layer.
    """
    if settings.is_elementwise:
        check_reached(network, images, settings.l2_normalize)
    if settings.without_channels:
        return None
    return probe(network, images, settings.l2_normalize)


def forward(
    network: Network, images: Tensor, settings: Settings, head: AffineHead | None
) -> tuple[Columns, int]:
    """Run one batch through the network; nothing here waits for the device.

    Args:
        network: the model and its layer.
        images: [B, 3, h, w], on its device and in its dtype.
        settings: of the build.
        head: the closed form's; None where there is none.

    Returns:
        The columns "embeddings" [B, D] and, where the build needs them, "norms" [B], "pooled" or
        "directions" [B, C]; "sums" [C] float64 of the mean activations, and with a head "agreed",
        whether it makes these embeddings. And how many pixels the layer has.

    Raises:
        ValueError: more channels than the layer has.
    """
    captured = network.embed(images)
    embeddings = normalized(captured.output, settings.l2_normalize)
    C, channels = captured.activations.shape[1], settings.channels
    if not settings.without_channels and channels != "all" and channels > C:
        raise ValueError(f"`channels` must be at most the layer's C = {C}, got {channels}")
    pooled = captured.activations.float().mean((2, 3))  # [B, C]
    columns = {"embeddings": embeddings, "sums": pooled.sum(0, dtype=torch.float64)}
    if head is not None:
        columns["norms"], columns["agreed"] = head.norms_and_agreement(
            pooled, embeddings, captured.output.dtype
        )
        if settings.method == "gradcam++":
            columns["pooled"] = pooled
    elif settings.is_proxy:
        columns["directions"] = directions(pooled)
    return columns, math.prod(captured.activations.shape[2:])


class _Launched(NamedTuple):
    """A batch whose columns are being copied to the host."""

    batch: Batch
    images: Tensor  # on the device, to be looked at where an embedding is not finite
    pixels: int


class _Stage:
    """Stage 1; arguments as for :func:`embed`."""

    def __init__(self, network: Network, settings: Settings, spool: Spool, totals: Totals) -> None:
        self.network = network
        self.settings = settings
        self.spool = spool
        self.totals = totals

    def run(self, loader: Iterable[Any], progress: bool, after_batch: Callable[[], None]) -> None:
        """Go through the loader from where the totals are; raises as :func:`embed`."""
        totals = self.totals
        done = totals.rows
        before = totals.embedded(self.spool) if done else None
        offload: Offload[_Launched] | None = None
        row = 0

        def take(columns: Columns, launched: _Launched) -> None:
            self._take(columns, launched)
            one_pass = totals.head is not None or self.settings.without_channels
            if not one_pass and isinstance(loader, Iterator):
                raise ValueError(
                    "`loader` must be one that can be gone through twice, got a one-shot iterator "
                    f"({type(loader).__name__}): this model's head needs a second pass over the "
                    "images"
                )
            after_batch()

        with Progress("embedding", "batches", total=length(loader), show=progress) as shown:
            for batch in batches(loader, real_labels=self.settings.objective.real_labels):
                if before is not None and row < done:
                    self._compare(batch, before, row)
                else:
                    images = on_device(batch.images, self.network)
                    if offload is None:
                        offload = Offload(images.device)
                        if not done or self.settings.is_elementwise:
                            totals.head = head_of(self.network, images, self.settings)
                    for taken in offload.put(*self._launch(batch, images)):
                        take(*taken)
                row += len(batch.images)
                shown.update()
            for taken in offload.drain() if offload is not None else []:
                take(*taken)
        if row < done:
            raise other_images(f"it gave {done} images or more before and {row} now")
        if not totals.rows:
            raise ValueError("`loader` must give images, got none")

    def _compare(self, batch: Batch, before: Embedded, row: int) -> None:
        stop = row + len(batch.images)
        done = len(before.ids)
        if stop > done:
            raise other_images(f"its batches ended at image {done} before, and at {stop} now")
        before.check_same(batch, row, "before")
        if stop == done:
            captured = self.network.embed(on_device(batch.images, self.network))
            embeddings = normalized(captured.output, self.settings.l2_normalize)
            before.check_embeddings(embeddings, row)

    def _launch(self, batch: Batch, images: Tensor) -> tuple[Columns, _Launched]:
        """Start a batch on the device; nothing here waits for it."""
        columns, pixels = forward(self.network, images, self.settings, self.totals.head)
        return columns, _Launched(batch, images, pixels)

    def _take(self, columns: Columns, launched: _Launched) -> None:
        """Check and spool a batch whose columns are on the host."""
        totals, (batch, images, pixels) = self.totals, launched
        B, start = len(images), totals.first + totals.rows
        embeddings = columns["embeddings"]
        check_embeddings(embeddings, images, first=start)
        sums = columns["sums"] * pixels
        totals.channel_sum = totals.channel_sum + sums if totals.rows else sums
        totals.pixel_count += pixels * B
        kept = {"embeddings": embeddings}
        if "directions" in columns:
            kept["directions"] = columns["directions"]
            require_finite_rows("activations", columns["directions"], first=start)
        elif totals.head is not None and bool(columns["agreed"]):
            kept |= {"norms": columns["norms"], "pixels": torch.full((B,), pixels)}
            if "pooled" in columns:
                kept["pooled"] = columns["pooled"]
        else:
            totals.head = None  # affine as far as the probe saw; autograd takes all the rows
            self.spool.drop(*CLOSED_FORM)
        ids = IdTable.encoded(batch.ids or [str(start + i) for i in range(B)])
        self.spool.add(
            **kept,
            labels=totals.labels.add(batch.labels),
            id_ends=ids.ends + totals.id_bytes,
            id_bytes=ids.content,
        )
        totals.id_bytes += len(ids.content)
        totals.rows += B
