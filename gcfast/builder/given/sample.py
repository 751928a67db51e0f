"""What a few images tell of given embeddings: the head, the mean activation, and whose they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast._checks import require_images
from gcfast.builder.loader import check_embeddings, on_device
from gcfast.method.elementwise import check_reached
from gcfast.method.head import AffineHead, normalized, probe
from gcfast.method.settings import Settings
from gcfast.model.network import Network

IMAGES_AT_ONCE = 32
# Cosine of an image's embedding and its row, both less the mean of all rows: the embeddings of many
# networks lie so close together that another image's has a cosine of 0.99 as it is (the median of
# neighbors among the drawn birds, which is 0.92 this way; the lowest is -0.36).
# From here on the two count as the same: rows of 8 bits a component have 0.9993 on these birds,
# bfloat16 has 0.99999.
SAME_COSINE = 0.999
# Below this a build is refused unless its caller says otherwise: 6 bits have 0.984, 4 bits 0.83.
MIN_COSINE = 0.95
LENGTH_TOLERANCE = 1e-2  # relative, of lengths that should be equal but for a common factor
SCALE_TOLERANCE = 1e-3  # how far such a factor may be from 1 to be rounding


class Sample(NamedTuple):
    """What the sample images tell."""

    head: AffineHead | None
    mean_activation: Tensor  # [C] float64, over images and pixels
    pixels: int  # P of the first image
    one_size: bool  # all images have that P
    precision: torch.dtype  # of the model's output


def look_at(network: Network, sample: Any, settings: Settings) -> Sample:
    """Run a few images: probe the model's head with them, and average their activations.

    Args:
        network: the model, its layer known or not.
        sample: images [n, 3, h, w], or an iterable of batches of them, alone or first in a tuple.
        settings: of the build.

    Raises:
        TypeError, ValueError: no images; more channels than the layer has; a head whose rows need
            the images.
    """
    head: AffineHead | None = None
    total = torch.zeros(0, dtype=torch.float64)
    count = places = 0
    sizes: list[int] = []  # P of each batch
    precision = torch.float32
    for batch in _batches(sample):
        images = on_device(batch, network)
        if not count and settings.is_elementwise:
            check_reached(network, images, settings.l2_normalize)
        elif not count and not settings.is_proxy:
            head = probe(network, images, settings.l2_normalize)
        captured = network.embed(images)
        embeddings = normalized(captured.output, settings.l2_normalize)
        check_embeddings(embeddings, images, first=count)
        precision = captured.output.dtype
        pooled = captured.activations.float().mean((2, 3))
        if head is not None and not head.agrees(pooled, embeddings, precision):
            head = None  # affine as far as the probe saw
        if not settings.without_channels and head is None:
            raise ValueError(
                "`model` must end in global average pooling and an affine map for rows to follow "
                f"from embeddings alone, and what is behind its layer {network.layer_name!r} is "
                "something else: call build(loader), which runs the images, or take "
                "method='elementwise', or 'proxy', which needs `pooled` activations"
            )
        P = captured.activations[0, 0].numel()
        sums = pooled.sum(0, dtype=torch.float64).cpu() * P
        total = total + sums if count else sums
        count, places = count + len(images), places + P * len(images)
        sizes.append(P)
    if not count:
        raise ValueError("`sample` must give images, got none")
    channels = settings.channels
    if not settings.without_channels and channels != "all" and channels > len(total):
        raise ValueError(f"`channels` must be at most the layer's C = {len(total)}, got {channels}")
    return Sample(head, total / places, sizes[0], len(set(sizes)) == 1, precision)


class Checked(NamedTuple):
    """Images whose rows are known, as the model sees them."""

    rows: Tensor  # [n] int64
    embeddings: Tensor  # [n, D] float32 on the CPU
    pooled: Tensor  # [n, C] float32 on the model's device

    def compare(self, table: Tensor, min_cosine: float, *, lengths: bool) -> float:
        """Compare the images' embeddings with their rows; returns the lowest cosine.

        Of both the mean of all rows is subtracted before.

        Args:
            table: [N, D], the rows.
            min_cosine: below which the rows are refused.
            lengths: whether embeddings must be as long as their rows.

        Raises:
            ValueError: they are not the model's embeddings of these images.
        """
        what = "the model gives for the images of `check`"
        if lengths:
            ratios = self.embeddings.norm(dim=1) / table[self.rows].norm(dim=1).clamp(min=1e-30)
            if bool(((ratios - 1).abs() > LENGTH_TOLERANCE).any()):
                raise ValueError(
                    f"`embeddings` must be as long as {what} with l2_normalize=False, the ratio is "
                    f"{float(ratios.min()):.3g} to {float(ratios.max()):.3g}: give the model's "
                    "output as it is"
                )
        middle_of_all = table.mean(0, dtype=torch.float64)
        found = torch.cosine_similarity(
            self.embeddings - middle_of_all, table[self.rows] - middle_of_all
        )
        lowest, worst = float(found.min()), int(self.rows[found.argmin()])
        middle = float(found.median())
        if not lowest >= min_cosine:
            raise ValueError(
                f"`embeddings` must be what {what}, and row {worst} has a cosine of {lowest:.4f} "
                f"with it once the mean of all rows is subtracted (the median is {middle:.4f}, at "
                f"least {min_cosine:g} is asked for): "
                "they are of another model, of other preprocessing or of other images, or of an "
                "index that compresses them so far; `min_cosine` lowers the bound"
            )
        if lowest < SAME_COSINE:
            warnings.warn(
                f"the embeddings have a cosine of only {lowest:.4f} with what {what}, once the "
                f"mean of all rows is subtracted (the median is {middle:.4f}): with a compressed "
                "index, rows are of what it decodes, and some of their channels are others",
                stacklevel=5,
            )
        return lowest

    def compare_pooled(self, pooled: Tensor) -> None:
        """Raise ValueError where rows of pooled activations [N, C] are not these images'."""
        if pooled.shape[1] != self.pooled.shape[1]:
            raise ValueError(
                f"`pooled` must have C = {self.pooled.shape[1]} columns, as the layer has "
                f"channels, got {pooled.shape[1]}"
            )
        own, given = self.pooled.cpu(), pooled[self.rows]
        missed = (own - given).norm(dim=1) / own.norm(dim=1).clamp(min=1e-30)
        if not bool((missed <= LENGTH_TOLERANCE).all()):
            raise ValueError(
                "`pooled` must be the layer's activations averaged over its places, and row "
                f"{int(self.rows[missed.argmax()])} differs from those of its image in `check` by "
                f"{float(missed.max()):.2g} of their length"
            )

    def scale_of(self, norms: Tensor, head: AffineHead) -> float | None:
        """Return what given norms [N] must be multiplied by to be those of the head.

        A model that normalizes its own output hides the scale of its head, which is then free.

        Returns:
            1 where they are the head's; None where no one factor makes them so.
        """
        own = head.project(self.pooled)[1].cpu()
        ratios = own / norms[self.rows]
        middle = float(ratios.median())
        if not bool(((ratios / middle - 1).abs() <= LENGTH_TOLERANCE).all()):
            return None
        return 1.0 if abs(middle - 1) <= SCALE_TOLERANCE else middle


def checked_images(
    network: Network, images: Any, rows: Tensor, settings: Settings, dim: int
) -> Checked:
    """Embed the images of ``check``.

    Args:
        network: the model, its layer known.
        images: [n, 3, h, w].
        rows: [n] int64, theirs.
        settings: of the build.
        dim: D of the given embeddings.

    Raises:
        TypeError, ValueError: other images than rows, or fewer than two; another D.
    """
    images = require_images("check", images)
    if len(images) != len(rows) or len(set(rows.tolist())) < 2:
        raise ValueError(
            "`check` must be at least 2 images and the row of each, not the same, got "
            f"{len(images)} images and {len(rows)} rows"
        )
    embeddings, pooled = [], []
    for batch in _batches(images):
        captured = network.embed(on_device(batch, network))
        embeddings.append(normalized(captured.output, settings.l2_normalize).cpu())
        pooled.append(captured.activations.float().mean((2, 3)))
    found = torch.cat(embeddings)
    check_embeddings(found, images)
    if found.shape[1] != dim:
        raise ValueError(
            f"`embeddings` must have the model's D = {found.shape[1]} columns, got {dim}"
        )
    return Checked(rows, found, torch.cat(pooled))


def _batches(images: Any) -> Iterator[Tensor]:
    """Yield batches of IMAGES_AT_ONCE images at most."""
    batches = [images] if isinstance(images, Tensor) else images
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"`sample` must be images [n, 3, h, w] or batches of them, got {type(images).__name__}"
        )
    for batch in batches:
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        yield from torch.split(require_images("sample", first), IMAGES_AT_ONCE)
