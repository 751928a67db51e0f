"""Stage 2 of a build: triplets, cotangents, grad-weights, and the strongest of them, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast import ops
from gcfast._checks import require_finite_rows
from gcfast.embedding import Embedded
from gcfast.head import normalized, vjp_grad_weights
from gcfast.loading import batches
from gcfast.network import Network
from gcfast.settings import Settings
from gcfast.shards import FIELDS
from gcfast.triplets import Anchors, Cotangents, PairSource

ROWS_AT_ONCE = 64  # rows whose triplets are held at once in stage 2
ENUMERATION_LIMIT = 10**14  # multiply-adds: about an hour at 30 GFLOP/s
SECOND_PASS_TOLERANCE = 1e-2  # distance by which an embedding may move between the two passes


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


class Rows:
    """Database rows as stage 2 makes them."""

    def __init__(self, embedded: Embedded, settings: Settings) -> None:
        self.embedded = embedded
        self.settings = settings
        self.source = embedded.source(settings)
        self.kept: list[Tensor] = []
        self.channels: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.fallbacks = 0
        C = len(embedded.mean_activation)
        self.m = C if settings.channels == "all" else settings.channels

    def anchors(self, start: int, stop: int) -> Anchors:
        """Rows start to stop of the spool as anchors."""
        return Anchors(
            self.embedded.embeddings[start:stop],
            self.embedded.labels[start:stop],
            torch.arange(start, stop),
        )

    def parts(self, start: int, stop: int, seen: list[Cotangents]) -> Iterator[Cotangents]:
        """The signed cotangents of these rows; the first part is also put in ``seen``."""
        for part in signed_parts(self.source, self.anchors(start, stop), self.settings):
            # It tells which rows have a triplet: later ones only add to rows that have some.
            if not seen:
                seen.append(part)
            yield part

    def add(self, start: int, weights: Tensor, first: Cotangents) -> None:
        """Keep the rows that have a triplet; weights [B, C]."""
        found = first.valid.any(1)
        require_finite_rows("grad-weights", weights, first=start)
        channels, values = ops.top_m(weights[found].cpu(), self.m)
        self.kept.append(found.nonzero().flatten() + start)
        self.channels.append(channels)
        self.weights.append(values)
        self.counts.append(first.counts[found])
        self.fallbacks += int((found & (first.counts == 0)).sum())

    def tensors(self) -> tuple[dict[str, Tensor], Tensor]:
        """(columns of the database, kept row numbers of the spool)."""
        kept = torch.cat(self.kept)
        channels, weights = torch.cat(self.channels), torch.cat(self.weights)
        mean = self.embedded.mean_activation[channels]  # [N, M] float64
        everything = len(kept) == len(self.embedded.ids)
        embeddings = self.embedded.embeddings
        values = {
            "embeddings": embeddings if everything else embeddings[kept],
            "channels": channels,
            "weights": weights,
            "offsets": (weights * mean).sum(1).float(),
            "labels": self.embedded.labels[kept],
            "triplet_counts": torch.cat(self.counts),
        }
        return {name: values[name] for name in FIELDS}, kept


def rows_from_spool(embedded: Embedded, settings: Settings, *, progress: bool) -> Rows:
    """Stage 2 in closed form: from the spool alone."""
    assert embedded.head is not None
    assert embedded.norms is not None
    assert embedded.pixels is not None
    rows = Rows(embedded, settings)
    if settings.triplets == "all" and settings.method == "gradcam++":
        _check_enumeration(rows, embedded.head.weight.numel())
    head, device = embedded.head, embedded.head.weight.device
    N = len(embedded.ids)
    bar = tqdm(total=N, desc="rows", unit=" rows", disable=not progress, leave=False)
    for start in range(0, N, ROWS_AT_ONCE):
        stop = min(N, start + ROWS_AT_ONCE)
        seen: list[Cotangents] = []
        weights = head.grad_weights(
            (
                Cotangents(part.values.to(device), part.valid.to(device), part.counts)
                for part in rows.parts(start, stop, seen)
            ),
            settings.method,
            embeddings=embedded.embeddings[start:stop].to(device),
            norms=embedded.norms[start:stop].to(device),
            pixels=embedded.pixels[start:stop].to(device),
            pooled=None if embedded.pooled is None else embedded.pooled[start:stop].to(device),
        )
        rows.add(start, weights, seen[0])
        bar.update(stop - start)
    bar.close()
    return rows


def rows_from_second_pass(
    network: Network,
    loader: Iterable[Any],
    embedded: Embedded,
    settings: Settings,
    *,
    progress: bool,
) -> Rows:
    """Stage 2 by autograd: the loader once more, checked to give the same images.

    Raises:
        ValueError: the loader gives other images, labels, ids or another number of them.
    """
    rows = Rows(embedded, settings)
    if settings.triplets == "all" and settings.method == "gradcam++":
        _check_enumeration(rows, embedded.embeddings.shape[1] * len(embedded.mean_activation))
    N, start = len(embedded.ids), 0
    names = embedded.class_names
    bar = tqdm(total=N, desc="rows", unit=" rows", disable=not progress, leave=False)
    for batch in batches(loader, network, real_labels=settings.objective.real_labels):
        stop = start + len(batch.images)
        if stop > N:
            raise _other_images(f"it gave {N} images first and more the second time")
        labels = embedded.labels[start:stop].tolist()
        known = [names[label] for label in labels] if names else labels
        if known != batch.labels:
            raise _other_images(f"labels differ in rows {start} to {stop - 1}")
        if batch.ids is not None and batch.ids != embedded.ids[start:stop]:
            raise _other_images(f"ids differ in rows {start} to {stop - 1}")
        with network.differentiable(batch.images) as captured:
            embeddings = normalized(captured.output, settings.l2_normalize)
            before = embedded.embeddings[start:stop]
            moved = (embeddings.detach().cpu() - before).norm(dim=1)
            if bool((moved > SECOND_PASS_TOLERANCE * before.norm(dim=1).clamp(min=1e-12)).any()):
                row = start + int(moved.argmax())
                raise _other_images(f"the embedding of row {row} differs")
            seen: list[Cotangents] = []
            weights = vjp_grad_weights(
                captured,
                embeddings,
                (
                    Cotangents(
                        part.values.to(embeddings.device),
                        part.valid.to(embeddings.device),
                        part.counts,
                    )
                    for part in rows.parts(start, stop, seen)
                ),
                settings.method,
                network,
            )
        rows.add(start, weights, seen[0])
        bar.update(len(batch.images))
        start = stop
    bar.close()
    if start != N:
        raise _other_images(f"it gave {N} images first and {start} the second time")
    return rows


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
            f"{ENUMERATION_LIMIT:.0e} (gcfast.rows.ENUMERATION_LIMIT)"
        )


def _other_images(how: str) -> ValueError:
    return ValueError(
        "`loader` must give the same images in the same order the second time "
        f"(shuffling and random augmentation off): {how}"
    )
