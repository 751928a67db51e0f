"""Stage 1 of a build: one forward pass over the images, into a spool."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gcfast.head import AffineHead, normalized, probe
from gcfast.labels import Labels, Values
from gcfast.loading import batches, check_embeddings
from gcfast.network import Network
from gcfast.settings import Settings
from gcfast.spool import Spool
from gcfast.triplets import PairSource


class Embedded(NamedTuple):
    """What stage 1 found out."""

    embeddings: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64; float64 where they are real numbers
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


def embed_all(
    network: Network,
    loader: Iterable[Any],
    *,
    l2_normalize: bool,
    keep_pooled: bool,
    progress: bool,
    channels: int | str = "all",
    one_pass: bool = False,
    spool_bytes: int | None = None,
    real_labels: bool = False,
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
        spool_bytes: what is held in memory; None for gcfast.spool.SPOOL_MEMORY_BYTES.
        real_labels: labels are real numbers instead of classes.

    Raises:
        ValueError: no images, no labels, one class only, or NaN in an embedding, with its row;
            more channels than the layer has; one pass only, and a head that needs two.
    """
    spool = Spool(spool_bytes)
    labels: Any = Values() if real_labels else Labels()
    ids: list[str] = []
    head: AffineHead | None = None
    channel_sum = torch.zeros(0, dtype=torch.float64)
    pixel_count = 0
    try:
        bar = tqdm(desc="embedding", unit=" images", disable=not progress, leave=False)
        for batch in batches(loader, network, real_labels=real_labels):
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
        if labels.distinct() < 2 and real_labels:
            raise ValueError(
                "`loader` must give at least two different labels, since a RankLoss compares "
                "them; got one"
            )
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
