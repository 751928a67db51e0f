"""Building a database: one forward pass over the images, then the rows.

Stage 1 runs the model once over the loader and spools each image's embedding and label (and, for
the closed form, its norm and pooled activations). Stage 2 draws each row's triplets from the whole
spool and turns their cotangents into grad-weights: from the spool alone where the head allows the
closed form, with a second pass over the loader where it does not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast import ops
from gcfast._checks import require_finite_rows, require_tensor
from gcfast.capture import Network
from gcfast.database import FIELDS, FORMAT, FORMAT_VERSION, Database
from gcfast.fingerprint import fingerprint
from gcfast.head import AffineHead, normalized, probe, vjp_grad_weights
from gcfast.labels import Labels
from gcfast.settings import Settings
from gcfast.spool import SPOOL_MEMORY_BYTES, Spool
from gcfast.triplets import Anchors, Cotangents, PairSource

ROWS_AT_ONCE = 64  # rows whose triplets are held at once in stage 2
ENUMERATION_LIMIT = 10**14  # multiply-adds: about an hour at 30 GFLOP/s
SECOND_PASS_TOLERANCE = 1e-2  # distance by which an embedding may move between the two passes


class Embedded(NamedTuple):
    """What stage 1 found out."""

    embeddings: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64
    ids: list[str]
    class_names: list[str]
    norms: Tensor | None  # [N] float32: closed form only
    pixels: Tensor | None  # [N] int64
    pooled: Tensor | None  # [N, C] float32: closed form with Grad-CAM++ only
    mean_activation: Tensor  # [C] float64
    head: AffineHead | None

    def source(self, settings: Settings) -> PairSource:
        """The valid pairs of any anchor among these rows."""
        return PairSource(
            settings.objective,
            self.embeddings,
            self.labels,
            hardest=settings.on_no_triplet == "hardest",
        )


class Batch(NamedTuple):
    """One element of a loader, checked."""

    images: Tensor  # [B, 3, h, w] on the model's device, in its dtype
    labels: list[int] | list[str]
    ids: list[str] | None


def batches(loader: Iterable[Any], network: Network) -> Iterator[Batch]:
    """The elements of a loader, checked and moved to the model's device and dtype."""
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"`loader` must be an iterable of (images, labels), got {type(loader).__name__}"
        )
    for number, element in enumerate(loader):
        if not isinstance(element, tuple | list) or len(element) not in (2, 3):
            got = type(element).__name__
            if isinstance(element, tuple | list):
                got = f"{got} of {len(element)}"
            raise ValueError(
                f"`loader` must give (images, labels) or (images, labels, ids), got a {got} as "
                f"batch {number}: a database needs labels"
            )
        images = require_images("images", element[0])
        device = network.device(images.device)
        dtype = images.dtype if torch.is_autocast_enabled(device.type) else network.dtype()
        images = images.to(device, dtype)
        labels = Labels.listed(element[1], len(images))
        ids = None
        if len(element) == 3:
            ids = listed_ids(element[2], len(images))
        if len(images):
            yield Batch(images, labels, ids)


def listed_ids(ids: Any, count: int) -> list[str]:
    """Ids of any kind, also as a tensor or an array, as strings."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"`ids` must be one id an image, got {ids!r}")
    values = [str(value) for value in values]
    if len(values) != count:
        raise ValueError(f"`ids` must have B = {count} elements, got {len(values)}")
    return values


def require_images(name: str, images: object) -> Tensor:
    """The images, if they are a floating-point tensor [B, channels, h, w]."""
    tensor = require_tensor(name, images)
    if tensor.ndim != 4:
        raise ValueError(f"`{name}` must have shape [B, 3, h, w], got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"`{name}` must be floating point, scaled as the model expects, got {got}")
    return tensor


def embed_all(
    network: Network,
    loader: Iterable[Any],
    *,
    l2_normalize: bool,
    keep_pooled: bool,
    progress: bool,
    channels: int | str = "all",
    one_pass: bool = False,
    spool_bytes: int = SPOOL_MEMORY_BYTES,
) -> Embedded:
    """Stage 1: one forward pass over the loader.

    Args:
        network: the model and its layer.
        loader: as for :meth:`gcfast.Explainer.build`.
        l2_normalize: whether the embedding is normalised after the model.
        keep_pooled: spool the pooled activations too, for Grad-CAM++.
        progress: show a bar on stderr.
        channels: how many channels a row will keep.
        one_pass: the loader cannot be gone through again; stop where a head needs that.
        spool_bytes: what is held in memory.

    Raises:
        ValueError: no images, no labels, one class only, or NaN in an embedding, with its row;
            more channels than the layer has; one pass only, and a head that needs two.
    """
    spool = Spool(spool_bytes)
    labels = Labels()
    ids: list[str] = []
    head: AffineHead | None = None
    channel_sum = torch.zeros(0, dtype=torch.float64)
    pixel_count = 0
    try:
        bar = tqdm(desc="embedding", unit=" images", disable=not progress, leave=False)
        for batch in batches(loader, network):
            row = len(ids)
            if row == 0:
                head = probe(network, batch.images, l2_normalize)
            captured = network.embed(batch.images)
            embeddings = normalized(captured.output, l2_normalize)
            check_embeddings(embeddings, batch.images, first=row)
            if row == 0:
                C = captured.activations.shape[1]
                if channels != "all" and int(channels) > C:
                    raise ValueError(
                        f"`channels` must be at most the layer's C = {C}, got {channels}"
                    )
            pooled = captured.activations.float().mean((2, 3))  # [B, C]
            pixels = math.prod(captured.activations.shape[2:])
            totals = pooled.sum(0, dtype=torch.float64).cpu() * pixels
            channel_sum = totals if row == 0 else channel_sum + totals
            pixel_count += pixels * len(pooled)
            columns = {"embeddings": embeddings}
            if head is not None:
                if head.agrees(pooled, embeddings, captured.output.dtype):
                    columns["norms"] = head.project(pooled)[1]
                    columns["pixels"] = torch.full((len(pooled),), pixels)
                    if keep_pooled:
                        columns["pooled"] = pooled
                else:
                    head = None  # affine as far as the probe saw; autograd takes all the rows
                    spool.drop("norms", "pixels", "pooled")
            if head is None and one_pass:
                raise ValueError(
                    "`loader` must be one that can be gone through twice, got a one-shot iterator "
                    f"({type(loader).__name__}): this model's head needs a second pass over the "
                    "images"
                )
            spool.add(**{name: column.cpu() for name, column in columns.items()})
            labels.add(batch.labels)
            ids += batch.ids or [str(i) for i in range(row, row + len(batch.images))]
            bar.update(len(batch.images))
        bar.close()
        if not ids:
            raise ValueError("`loader` must give images, got none")
        if labels.distinct() < 2:
            raise ValueError(
                "`loader` must give at least two classes, since triplets need negatives; got one"
            )
        closed = head is not None
        return Embedded(
            embeddings=spool.column("embeddings"),
            labels=labels.tensor(),
            ids=ids,
            class_names=labels.names,
            norms=spool.column("norms") if closed else None,
            pixels=spool.column("pixels") if closed else None,
            pooled=spool.column("pooled") if closed and keep_pooled else None,
            mean_activation=channel_sum / max(pixel_count, 1),
            head=head,
        )
    finally:
        spool.close()


def check_embeddings(embeddings: Tensor, images: Tensor, *, first: int = 0) -> None:
    """Refuse embeddings with NaN or infinity, blaming the images where it is they that have it."""
    if bool(torch.isfinite(embeddings.sum(dtype=torch.float64))):
        return
    require_finite_rows("images", images, first=first)
    require_finite_rows("embeddings", embeddings, first=first)


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
        """The signed cotangents of these rows; each part is also appended, bare, to ``seen``."""
        for part in signed_parts(self.source, self.anchors(start, stop), self.settings):
            # Only the first part counts: later ones add valid triplets to rows that have some.
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
    for batch in batches(loader, network):
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


def build(
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
    preprocessing: dict[str, Any] | None = None,
    spool_bytes: int = SPOOL_MEMORY_BYTES,
) -> Database:
    """Both stages; see :meth:`gcfast.Explainer.build`."""
    try:
        json.dumps(preprocessing)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`preprocessing` must be what JSON can hold: {error}") from None
    embedded = embed_all(
        network,
        loader,
        l2_normalize=settings.l2_normalize,
        keep_pooled=settings.method == "gradcam++",
        progress=progress,
        channels=settings.channels,
        one_pass=isinstance(loader, Iterator),
        spool_bytes=spool_bytes,
    )
    if embedded.head is not None:
        rows = rows_from_spool(embedded, settings, progress=progress)
    else:
        rows = rows_from_second_pass(network, loader, embedded, settings, progress=progress)
    return assemble(network, embedded, rows, settings, preprocessing)


def assemble(
    network: Network,
    embedded: Embedded,
    rows: Rows,
    settings: Settings,
    preprocessing: dict[str, Any] | None,
) -> Database:
    """The database of the rows made, with its manifest.

    Raises:
        ValueError: no row has a triplet.
    """
    tensors, kept = rows.tensors()
    seen = Counter(embedded.labels.tolist())
    needs_positive = settings.objective.pairs != "negative"
    single = torch.tensor(
        [needs_positive and seen[label] == 1 for label in embedded.labels.tolist()]
    )
    dropped = torch.ones(len(embedded.ids), dtype=torch.bool)
    dropped[kept] = False
    report = {
        "images": len(embedded.ids),
        "rows": len(kept),
        "skipped_single": int((single & dropped).sum()),
        "skipped_no_triplet": int((dropped & ~single).sum()),
        "hardest_triplet": rows.fallbacks,
    }
    if len(kept) == 0:
        raise ValueError(
            f"`loader` must give images with valid triplets, got none: {report['skipped_single']} "
            f"of {report['images']} labels were seen once, {report['skipped_no_triplet']} images "
            "had no valid triplet"
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(network.model),
        "layer": network.layer_name,
        "settings": {**settings.describe(), "output_key": network.output_key},
        "closed_form": embedded.head is not None,
        "channels_last": network.channels_last,
        "embedding_dim": tensors["embeddings"].shape[1],
        "layer_channels": len(embedded.mean_activation),
        "class_names": embedded.class_names,
        "report": report,
        "preprocessing": preprocessing,
        "mean_activation": embedded.mean_activation.tolist(),
    }
    return Database(tensors, [embedded.ids[i] for i in kept.tolist()], manifest)


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
            f"{ENUMERATION_LIMIT:.0e} (gcfast.build.ENUMERATION_LIMIT)"
        )


def _other_images(how: str) -> ValueError:
    return ValueError(
        "`loader` must give the same images in the same order the second time "
        f"(shuffling and random augmentation off): {how}"
    )
