"""Stage 2 of a build: triplets, cotangents, grad-weights, and the strongest of them, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast import ops
from gcfast._checks import require_finite_rows
from gcfast._progress import Progress
from gcfast.builder.embed import Embedded, other_images
from gcfast.builder.loader import batches, on_device
from gcfast.builder.offload import Columns, Offload
from gcfast.database.shards import Shard, offsets_of
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.pairs import Cotangents, PairSource
from gcfast.method.partners import Anchors
from gcfast.method.settings import Settings
from gcfast.model.network import Network
from gcfast.ops import Triplets

ROWS_AT_ONCE = 64  # rows whose triplets are held at once in stage 2
GPU_BYTES = 2**25  # of the cotangents of rows made at once on a GPU, where launches are what costs
ENUMERATION_LIMIT = 10**14  # multiply-adds: about an hour at 30 GFLOP/s


def signed_parts(
    source: PairSource, anchors: Anchors, settings: Settings, drawn: Triplets | None = None
) -> Iterator[Cotangents]:
    """The cotangents of the anchors' triplets, with the sign of the evidence, piece by piece.

    Args:
        source: of the triplets.
        anchors: theirs.
        settings: of the build.
        drawn: their triplets where they are drawn already; None draws them.
    """
    if settings.triplets == "all":
        whole = settings.method == "gradcam++"
        parts = source.all(anchors) if whole else iter([source.mean(anchors)])
    else:
        if drawn is None:
            drawn = source.drawn(anchors, settings.triplets, settings.seed)
        part = source.cotangents(anchors, drawn)
        parts = iter([part if settings.method == "gradcam++" else averaged(part)])
    for part in parts:
        yield part._replace(values=settings.sign * part.values)


def averaged(part: Cotangents) -> Cotangents:
    """The mean of the valid cotangents as one triplet: all but Grad-CAM++ is linear in them."""
    kept = torch.where(part.valid[..., None], part.values, 0.0)
    mean = kept.sum(1, dtype=torch.float64) / part.valid.sum(1).clamp(min=1)[:, None]
    return part._replace(values=mean.float()[:, None], valid=part.valid.any(1)[:, None])


class Made(NamedTuple):
    """Consecutive rows of a database."""

    rows: Shard
    ids: list[str]
    images: Tensor  # [n] int64, the number of each row's image
    exact: Tensor  # [n] bool: the count of triplets is no estimate

    @property
    def estimated(self) -> int:
        """How many rows have an estimate for the count of their triplets."""
        return int((~self.exact).sum())


class RowTable:
    """Kept rows in columns made at once.

    Small tensors kept one by one between large ones that come and go leave holes in the heap that
    nothing fits in: 440 MiB for 20,000 rows of Grad-CAM++ where these columns take 12.
    """

    def __init__(self, capacity: int, m: int, width: int) -> None:
        self.images = torch.empty(capacity, dtype=torch.int64)
        self.channels = torch.empty((capacity, m), dtype=torch.int64)
        self.weights = torch.empty((capacity, width))
        self.offsets = torch.empty(capacity)
        self.counts = torch.empty(capacity, dtype=torch.int64)
        self.exact = torch.empty(capacity, dtype=torch.bool)  # counts that are no estimates
        self.filled = 0

    @property
    def full(self) -> bool:
        """Whether there is no room for another row."""
        return self.filled == len(self.images)

    def put(self, *columns: Tensor) -> int:
        """Append rows of all the columns, as many as there is room for; returns how many."""
        into = (
            self.images, self.channels, self.weights, self.offsets, self.counts, self.exact
        )  # fmt: skip
        taken = min(len(columns[0]), len(self.images) - self.filled)
        for column, values in zip(into, columns, strict=True):
            column[self.filled : self.filled + taken] = values[:taken]
        self.filled += taken
        return taken

    def take(self, embedded: Embedded) -> Made:
        """Empty the table; returns its rows, as views that hold until it is filled again."""
        kept = self.images[: self.filled]
        everything = len(kept) == len(embedded.ids)
        rows = Shard(
            embeddings=embedded.embeddings if everything else embedded.embeddings[kept],
            channels=self.channels[: self.filled],
            weights=self.weights[: self.filled],
            offsets=self.offsets[: self.filled],
            labels=embedded.labels[kept],
            triplet_counts=self.counts[: self.filled],
        )
        exact = self.exact[: self.filled]
        self.filled = 0
        # Ids are decoded together where they are, as they mostly are, those of consecutive images.
        first, last = int(kept[0]), int(kept[-1])
        ids = embedded.ids[first : last + 1]
        if len(ids) > len(kept):
            ids = [ids[number - first] for number in kept.tolist()]
        return Made(rows, list(ids), kept, exact)

    def parts(self, columns: Sequence[Tensor], embedded: Embedded) -> Iterator[Made]:
        """Put in rows of all the columns, and yield the table's each time it is full."""
        while len(columns[0]):
            taken = self.put(*columns)
            columns = [column[taken:] for column in columns]
            if self.full:
                yield self.take(embedded)


class Rows:
    """Stage 2: the rows of a database.

    Args:
        network: the model and its layer.
        embedded: the results of stage 1 for the images that rows are made for; offsets are made
            with its mean activation.
        settings: of the build.
        everyone: embeddings [R, D] float32 and labels [R] of all the images that triplets are drawn
            from; None for those that rows are made for.
        first: the number among them of the first image that a row is made for. What a row draws
            depends on its image's number; None where those images come last.
        start: the first image that a row is made for; those before it have theirs.
        source: of the triplets, where it has been made for the same ``everyone`` before.
    """

    def __init__(
        self,
        network: Network,
        embedded: Embedded,
        settings: Settings,
        *,
        everyone: tuple[Tensor, Tensor] | None = None,
        first: int | None = None,
        start: int = 0,
        source: PairSource | None = None,
    ) -> None:
        self.network = network
        self.embedded = embedded
        self.settings = settings
        self.device = network.device(torch.device("cpu"))
        lending = embedded
        if everyone is not None:
            lending = embedded._replace(embeddings=everyone[0], labels=everyone[1])
        self.first = len(lending.labels) - len(embedded.labels) if first is None else first
        if not settings.is_proxy:
            self.source = source or lending.source(settings, self.device)
        self._drawn: tuple[int, int, Triplets] | None = None  # of which images
        self.start = start
        C = len(embedded.mean_activation)
        self.m = C if settings.channels == "all" else settings.channels
        if settings.without_channels:
            self.m = 0  # its weights belong to its class, or are a cotangent
        self.width = embedded.embeddings.shape[1] if settings.is_elementwise else self.m

    def made(
        self, loader: Iterable[Any], *, capacity: int | None = None, progress: bool = False
    ) -> Iterator[Made]:
        """Make the rows; those of an image without a triplet are left out.

        Args:
            loader: gone through once more where the head does not allow the closed form.
            capacity: how many rows are given at once, which hold until the next ones are asked for;
                None for all.
            progress: show a bar on stderr.

        Raises:
            ValueError: the loader gives other images, labels, ids or another number of them; NaN in
                the weights, with the row; more pairs than can be listed.
        """
        if self.settings.triplets == "all" and self.settings.method == "gradcam++":
            self._check_enumeration()
        N = len(self.embedded.ids)
        table = RowTable(N if capacity is None else capacity, self.m, self.width)
        if self.settings.is_proxy:
            yield from self._without_weights(table)
            return
        # What still waits for a GPU, once for each batch of rows: whether any anchor is without a
        # valid pair (its hardest is then put in), how many pairs there are when all are listed, and
        # in a second pass whether these are the images of the first, before the backward pass.
        offload: Offload[int] = Offload(self.device)
        closed = self.settings.is_elementwise or self.embedded.head is not None
        batches = self._closed_form() if closed else self._second_pass(loader)
        with Progress("making rows", "rows", total=N, show=progress) as shown:
            for start, stop, weights, first in batches:
                for taken in offload.put(self._columns(weights, first), start):
                    yield from self._kept(table, *taken)
                shown.update(stop - shown.done)
        for taken in offload.drain():
            yield from self._kept(table, *taken)
        if table.filled:
            yield table.take(self.embedded)

    def _without_weights(self, table: RowTable) -> Iterator[Made]:
        """Yield the rows of class proxies: an embedding and a label for every image."""
        images = torch.arange(self.start, len(self.embedded.ids))
        n = len(images)
        none, zeros = torch.zeros((n, 0)), torch.zeros(n)
        columns = [images, none.long(), none, zeros, zeros.long(), torch.ones(n).bool()]
        yield from table.parts(columns, self.embedded)
        if table.filled:
            yield table.take(self.embedded)

    def anchors(self, images: slice | Tensor) -> Anchors:
        """Return images, by a range or by their numbers [n], as anchors."""
        where = self.source.embeddings.device
        numbers = images if isinstance(images, Tensor) else torch.arange(images.start, images.stop)
        return Anchors(
            self.embedded.embeddings[images].to(where),
            self.embedded.labels[images].to(where),
            (self.first + numbers).to(where),
        )

    def of(self, images: Tensor) -> Columns:
        """Return rows of any images, by the closed form.

        They are those that :meth:`made` gives, but for the rounding of matrix products of another
        size.

        Args:
            images: [n] int64, numbers of images.

        Returns:
            On the CPU: found, finite, exact [n] bool, counts [n] int64, channels [n, M] int64,
            values [n, M] float32.
        """
        parts = list(signed_parts(self.source, self.anchors(images), self.settings))
        weights = self._weights(iter(part.to(self.device) for part in parts), images)
        return {name: column.cpu() for name, column in self._columns(weights, parts[0]).items()}

    def parts(
        self, start: int, stop: int, device: torch.device, seen: list[Cotangents]
    ) -> Iterator[Cotangents]:
        """Yield the signed cotangents of these images; the first part is also put in ``seen``."""
        drawn = None if self.settings.triplets == "all" else self.drawn(start, stop)
        anchors = self.anchors(slice(start, stop))
        for part in signed_parts(self.source, anchors, self.settings, drawn):
            # It tells which rows have a triplet: later ones only add to rows that have some.
            if not seen:
                seen.append(part)
            yield part.to(device)

    def drawn(self, start: int, stop: int) -> Triplets:
        """Return the triplets of these images, drawn together with those of images to come."""
        triplets = self.settings.triplets
        assert triplets != "all"
        if self._drawn is None or not self._drawn[0] <= start <= stop <= self._drawn[1]:
            end = max(stop, start + self.source.anchors_at_once(triplets))
            end = min(end, len(self.embedded.ids))
            anchors = self.anchors(slice(start, end))
            drawn = self.source.drawn(anchors, triplets, self.settings.seed)
            self._drawn = (start, end, drawn)
        first, _, drawn = self._drawn
        return Triplets(*(column[start - first : stop - first] for column in drawn))

    @property
    def at_once(self) -> int:
        """How many rows the closed form makes together: a multiple of ROWS_AT_ONCE."""
        triplets = self.settings.triplets
        if self.device.type != "cuda" or triplets == "all":
            return ROWS_AT_ONCE
        fitting = GPU_BYTES // (4 * triplets * self.embedded.embeddings.shape[1])
        return max(1, fitting // ROWS_AT_ONCE) * ROWS_AT_ONCE

    def _closed_form(self) -> Iterator[tuple[int, int, Tensor, Cotangents]]:
        """Yield (first image, image after the last, weights [B, C], first part of cotangents)."""
        N, step = len(self.embedded.ids), self.at_once
        for start in range(self.start - self.start % step, N, step):
            stop = min(N, start + step)
            seen: list[Cotangents] = []
            parts = self.parts(start, stop, self.device, seen)
            weights = self._weights(parts, slice(start, stop))
            yield start, stop, weights, seen[0]

    def _weights(self, parts: Iterator[Cotangents], images: slice | Tensor) -> Tensor:
        """Return the grad-weights [n, C] of images by the closed form, from their cotangents.

        With ``method="elementwise"`` the mean cotangents [n, D] themselves.
        """
        embedded, device = self.embedded, self.device
        if self.settings.is_elementwise:
            (part,) = parts
            return part.values[:, 0]
        assert embedded.head is not None
        assert embedded.norms is not None
        assert embedded.pixels is not None
        return embedded.head.grad_weights(
            parts,
            self.settings.method,
            embeddings=embedded.embeddings[images].to(device),
            norms=embedded.norms[images].to(device),
            pixels=embedded.pixels[images].to(device),
            pooled=None if embedded.pooled is None else embedded.pooled[images].to(device),
        )

    def _second_pass(self, loader: Iterable[Any]) -> Iterator[tuple[int, int, Tensor, Cotangents]]:
        """Yield the same by autograd: the loader once more, checked to give the same images."""
        embedded, settings, network, start = self.embedded, self.settings, self.network, 0
        for batch in batches(loader, real_labels=settings.objective.real_labels):
            stop = embedded.check_same(batch, start, "first")
            if stop > self.start:
                images = on_device(batch.images, network)
                with network.differentiable(images) as captured:
                    embeddings = normalized(captured.output, settings.l2_normalize)
                    embedded.check_embeddings(embeddings, start)
                    seen: list[Cotangents] = []
                    weights = vjp_grad_weights(
                        captured,
                        embeddings,
                        self.parts(start, stop, embeddings.device, seen),
                        settings.method,
                        network,
                    )
                yield start, stop, weights, seen[0]
            start = stop
        if start != len(embedded.ids):
            raise other_images(f"it gave {len(embedded.ids)} images first and {start} now")

    def _columns(self, weights: Tensor, first: Cotangents) -> Columns:
        channels, values = first.counts.new_zeros((len(weights), 0)), weights
        if self.m:
            channels, values = ops.top_m(weights, self.m)
        return {
            "found": first.valid.any(1),
            "finite": torch.isfinite(weights).all(1),
            "counts": first.counts,
            "exact": torch.ones_like(first.counts).bool() if first.exact is None else first.exact,
            "channels": channels,
            "values": values,
        }

    def _kept(self, table: RowTable, columns: Columns, start: int) -> Iterator[Made]:
        """Put the rows that have a triplet into the table, and yield it when it is full."""
        found = columns["found"]
        try:
            finite = torch.where(columns["finite"], 0.0, torch.nan)[:, None]
            require_finite_rows("grad-weights", finite, first=start)
        except ValueError as error:
            what = (
                "objective's gradient is not finite there"
                if self.settings.is_elementwise
                else f"gradient at the layer {self.network.layer_name!r} is not finite there; take "
                "another layer (gcfast.layers lists them) or the model in float32"
            )
            raise ValueError(f"{error}: the {what}") from None
        channels, values = columns["channels"][found], columns["values"][found]
        offsets = self.offsets(channels, values)
        images = found.nonzero().flatten() + start
        # Rows that exist are computed once more with their neighbours and dropped: a matrix product
        # of other sizes may round otherwise.
        skip = int((images < self.start).sum())
        counted = (columns["counts"][found], columns["exact"][found])
        kept = [c[skip:] for c in (images, channels, values, offsets, *counted)]
        yield from table.parts(kept, self.embedded)

    def offsets(self, channels: Tensor, values: Tensor) -> Tensor:
        """Return the mean responses [n] float32 of rows' channels and weights [n, M]."""
        return offsets_of(channels, values, self.embedded.mean_activation)

    def _check_enumeration(self) -> None:
        """Refuse to list more pairs than anyone would wait for."""
        N, D = self.embedded.embeddings.shape
        pairs = sum(
            int(self.source.count(self.anchors(slice(start, min(N, start + ROWS_AT_ONCE)))).sum())
            for start in range(0, N, ROWS_AT_ONCE)
        )
        cost = pairs * D * len(self.embedded.mean_activation)
        if cost > ENUMERATION_LIMIT:
            raise ValueError(
                f"`triplets` must be a number for gradcam++ on these images: 'all' would list "
                f"{pairs:,} pairs, about {cost:.1e} multiply-adds, above the limit of "
                f"{ENUMERATION_LIMIT:.0e} (gcfast.builder.rows.ENUMERATION_LIMIT)"
            )
