"""Stage 2 of a build: triplets, cotangents, grad-weights, and the strongest of them, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast import ops
from gcfast._checks import require_finite_rows
from gcfast.builder.embed import Embedded, other_images
from gcfast.builder.loader import batches, on_device
from gcfast.builder.offload import Columns, Offload
from gcfast.database.shards import Shard
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.pairs import Anchors, Cotangents, PairSource
from gcfast.method.settings import Settings
from gcfast.model.network import Network

ROWS_AT_ONCE = 64  # rows whose triplets are held at once in stage 2
ENUMERATION_LIMIT = 10**14  # multiply-adds: about an hour at 30 GFLOP/s


def signed_parts(source: PairSource, anchors: Anchors, settings: Settings) -> Iterator[Cotangents]:
    """The cotangents of the anchors' triplets, with the sign of the evidence, piece by piece."""
    if settings.triplets == "all":
        whole = settings.method == "gradcam++"
        parts = source.all(anchors) if whole else iter([source.mean(anchors)])
    else:
        drawn = source.draw(anchors, settings.triplets, settings.seed)
        if settings.method == "gradcam":
            drawn = averaged(drawn)
        parts = iter([drawn])
    for part in parts:
        yield part._replace(values=settings.sign * part.values)


def averaged(part: Cotangents) -> Cotangents:
    """The mean of the valid cotangents as one triplet: Grad-CAM is linear in them."""
    kept = torch.where(part.valid[..., None], part.values, 0.0)
    mean = kept.sum(1, dtype=torch.float64) / part.valid.sum(1).clamp(min=1)[:, None]
    return Cotangents(mean.float()[:, None], part.valid.any(1)[:, None], part.counts)


class RowTable:
    """Kept rows in columns made at once.

    Small tensors kept one by one between large ones that come and go leave holes in the heap that
    nothing fits in: 440 MiB for 20,000 rows of Grad-CAM++ where these columns take 12.
    """

    def __init__(self, capacity: int, m: int) -> None:
        self.rows = torch.empty(capacity, dtype=torch.int64)  # numbers of the spool
        self.channels = torch.empty((capacity, m), dtype=torch.int64)
        self.weights = torch.empty((capacity, m))
        self.offsets = torch.empty(capacity)
        self.counts = torch.empty(capacity, dtype=torch.int64)
        self.filled = 0

    def put(self, *columns: Tensor) -> int:
        """Append rows of all the columns, as many as there is room for; returns how many."""
        into = (self.rows, self.channels, self.weights, self.offsets, self.counts)
        taken = min(len(columns[0]), len(self.rows) - self.filled)
        for column, values in zip(into, columns, strict=True):
            column[self.filled : self.filled + taken] = values[:taken]
        self.filled += taken
        return taken

    def shard(self, embedded: Embedded) -> tuple[Shard, Tensor]:
        """(the rows as the database has them, their numbers of the spool)."""
        kept = self.rows[: self.filled]
        N = len(embedded.ids)
        everything = len(kept) == N
        shard = Shard(
            embeddings=embedded.embeddings if everything else embedded.embeddings[kept],
            channels=self.channels[: self.filled],
            weights=self.weights[: self.filled],
            offsets=self.offsets[: self.filled],
            labels=embedded.labels[kept],
            triplet_counts=self.counts[: self.filled],
        )
        return shard, kept


class Rows:
    """Database rows as stage 2 makes them.

    Args:
        embedded: what stage 1 found out about the images that rows are made for.
        settings: of the build.
        device: of the model, where the rows are made.
        everyone: embeddings [R, D] float32 and labels [R] of all the rows that lend partners, those
            of the images last; None for theirs alone.
        mean: [C] float64, the mean activation of the offsets; None is that of the images.
        start: the first image that a row is made for; those before it have theirs.
        capacity: rows that are held; None for all.
        flush: takes the rows when so many are there, and at the end.
    """

    def __init__(
        self,
        embedded: Embedded,
        settings: Settings,
        device: torch.device,
        *,
        everyone: tuple[Tensor, Tensor] | None = None,
        mean: Tensor | None = None,
        start: int = 0,
        capacity: int | None = None,
        flush: Callable[[RowTable], None] | None = None,
    ) -> None:
        self.embedded = embedded
        self.settings = settings
        lending = embedded
        if everyone is not None:
            lending = embedded._replace(embeddings=everyone[0], labels=everyone[1])
        self.first = len(lending.labels) - len(embedded.labels)
        self.source = lending.source(settings, device)
        # What still waits for a GPU, once for each batch of rows: whether any anchor is without a
        # valid pair (its hardest is then put in), how many pairs there are when all are listed, and
        # in a second pass whether these are the images of the first, before the backward pass.
        self.offload: Offload[int] = Offload(device)
        self.mean = embedded.mean_activation if mean is None else mean
        self.start = start
        self.flush = flush
        C = len(embedded.mean_activation)
        m = C if settings.channels == "all" else settings.channels
        self.m = m
        self.table = RowTable(len(embedded.ids) if capacity is None else capacity, m)

    def anchors(self, start: int, stop: int) -> Anchors:
        """Rows start to stop of the spool as anchors."""
        where = self.source.embeddings.device
        return Anchors(
            self.embedded.embeddings[start:stop].to(where),
            self.embedded.labels[start:stop].to(where),
            torch.arange(self.first + start, self.first + stop, device=where),
        )

    def parts(
        self, start: int, stop: int, device: torch.device, seen: list[Cotangents]
    ) -> Iterator[Cotangents]:
        """The signed cotangents of these rows on a device; the first part also in ``seen``."""
        for part in signed_parts(self.source, self.anchors(start, stop), self.settings):
            # It tells which rows have a triplet: later ones only add to rows that have some.
            if not seen:
                seen.append(part)
            yield Cotangents(part.values.to(device), part.valid.to(device), part.counts)

    def add(self, start: int, weights: Tensor, first: Cotangents) -> None:
        """Keep the rows that have a triplet; weights [B, C], taken up one batch behind on a GPU."""
        channels, values = ops.top_m(weights, self.m)
        columns = {
            "found": first.valid.any(1),
            "finite": torch.isfinite(weights).all(1),
            "counts": first.counts,
            "channels": channels,
            "values": values,
        }
        for taken in self.offload.put(columns, start):
            self._keep(*taken)

    def _keep(self, columns: Columns, start: int) -> None:
        found = columns["found"]
        require_finite_rows(
            "grad-weights", torch.where(columns["finite"], 0.0, torch.nan)[:, None], first=start
        )
        channels, values = columns["channels"][found], columns["values"][found]
        offsets = (values * self.mean[channels]).sum(1).float()
        rows = found.nonzero().flatten() + start
        # Rows that exist are computed once more with their neighbours and dropped: a matrix product
        # of other sizes may round otherwise.
        skip = int((rows < self.start).sum())
        kept = [c[skip:] for c in (rows, channels, values, offsets, columns["counts"][found])]
        while len(kept[0]):
            taken = self.table.put(*kept)
            kept = [column[taken:] for column in kept]
            if self.flush is not None and self.table.filled == len(self.table.rows):
                self._flush()

    def finish(self) -> None:
        """Take up what is under way, and flush what is left."""
        for taken in self.offload.drain():
            self._keep(*taken)
        if self.flush is not None and self.table.filled:
            self._flush()

    def _flush(self) -> None:
        assert self.flush is not None
        self.flush(self.table)
        self.table.filled = 0

    def tensors(self) -> tuple[dict[str, Tensor], Tensor]:
        """(columns of the database, kept row numbers of the spool)."""
        shard, kept = self.table.shard(self.embedded)
        return shard._asdict(), kept


def rows_from_spool(embedded: Embedded, settings: Settings, *, progress: bool) -> Rows:
    """Stage 2 in closed form: from the spool alone."""
    assert embedded.head is not None
    rows = Rows(embedded, settings, embedded.head.weight.device)
    fill_from_spool(rows, progress=progress)
    return rows


def fill_from_spool(rows: Rows, *, progress: bool) -> None:
    """Make the rows in closed form."""
    embedded, settings = rows.embedded, rows.settings
    assert embedded.head is not None
    assert embedded.norms is not None
    assert embedded.pixels is not None
    if settings.triplets == "all" and settings.method == "gradcam++":
        _check_enumeration(rows, embedded.head.weight.numel())
    head, device = embedded.head, embedded.head.weight.device
    N = len(embedded.ids)
    bar = tqdm(total=N, desc="rows", unit=" rows", disable=not progress, leave=False)
    for start in range(rows.start - rows.start % ROWS_AT_ONCE, N, ROWS_AT_ONCE):
        stop = min(N, start + ROWS_AT_ONCE)
        seen: list[Cotangents] = []
        weights = head.grad_weights(
            rows.parts(start, stop, device, seen),
            settings.method,
            embeddings=embedded.embeddings[start:stop].to(device),
            norms=embedded.norms[start:stop].to(device),
            pixels=embedded.pixels[start:stop].to(device),
            pooled=None if embedded.pooled is None else embedded.pooled[start:stop].to(device),
        )
        rows.add(start, weights, seen[0])
        bar.update(stop - bar.n)
    bar.close()
    rows.finish()


def rows_from_second_pass(
    network: Network,
    loader: Iterable[Any],
    embedded: Embedded,
    settings: Settings,
    *,
    progress: bool,
) -> Rows:
    """Stage 2 by autograd; raises as :func:`fill_from_second_pass`."""
    rows = Rows(embedded, settings, network.device(torch.device("cpu")))
    fill_from_second_pass(network, loader, rows, progress=progress)
    return rows


def fill_from_second_pass(
    network: Network, loader: Iterable[Any], rows: Rows, *, progress: bool
) -> None:
    """Make the rows by autograd: the loader once more, checked to give the same images.

    Raises:
        ValueError: the loader gives other images, labels, ids or another number of them.
    """
    embedded, settings = rows.embedded, rows.settings
    if settings.triplets == "all" and settings.method == "gradcam++":
        _check_enumeration(rows, embedded.embeddings.shape[1] * len(embedded.mean_activation))
    N, start = len(embedded.ids), 0
    bar = tqdm(total=N, desc="rows", unit=" rows", disable=not progress, leave=False)
    for batch in batches(loader, real_labels=settings.objective.real_labels):
        stop = embedded.check_same(batch, start, "first")
        if stop > rows.start:
            images = on_device(batch.images, network)
            with network.differentiable(images) as captured:
                embeddings = normalized(captured.output, settings.l2_normalize)
                embedded.check_embeddings(embeddings, start)
                seen: list[Cotangents] = []
                weights = vjp_grad_weights(
                    captured,
                    embeddings,
                    rows.parts(start, stop, embeddings.device, seen),
                    settings.method,
                    network,
                )
            rows.add(start, weights, seen[0])
        bar.update(stop - start)
        start = stop
    bar.close()
    if start != N:
        raise other_images(f"it gave {N} images first and {start} now")
    rows.finish()


def _check_enumeration(rows: Rows, cost_per_pair: int) -> None:
    """Refuse to list more pairs than anyone would wait for."""
    N = len(rows.embedded.ids)
    pairs = sum(
        int(rows.source.count(rows.anchors(start, min(N, start + ROWS_AT_ONCE))).sum())
        for start in range(0, N, ROWS_AT_ONCE)
    )
    cost = pairs * cost_per_pair
    if cost > ENUMERATION_LIMIT:
        raise ValueError(
            f"`triplets` must be a number for gradcam++ on these images: 'all' would list "
            f"{pairs:,} pairs, about {cost:.1e} multiply-adds, above the limit of "
            f"{ENUMERATION_LIMIT:.0e} (gcfast.builder.rows.ENUMERATION_LIMIT)"
        )
