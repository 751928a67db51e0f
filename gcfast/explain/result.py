"""The results of an explanation, and the options that maps are made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from gcfast._checks import require_choice, require_int
from gcfast.method.labels import label_name

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """Heat maps and what they rest on, all on the images' device."""

    maps: Tensor  # [B, OH, OW] float32
    embeddings: Tensor  # [B, D] float32
    neighbors: Tensor  # [B, K] int64, rows of the database; -1: none
    distances: Tensor  # [B, K] float32, squared L2; +inf where there is none
    labels: Tensor  # [B, K] int64, of those rows; -1 where there is none (float64, NaN: RankLoss)
    flat: Tensor  # [B] bool: the map is zero everywhere
    # After Explainer.calibrate, whose result says how informative they are; else None.
    # [B] float32: how probable it is that the map shows its own class (`labels`).
    confidence: Tensor | None = None
    # [B] float32: the expected cosine with the image's own map at this distance, for images of the
    # database's classes.
    fidelity: Tensor | None = None
    class_names: Sequence[str] = field(default=(), repr=False)  # by label; empty: they are numbers

    @property
    def label_names(self) -> list[list[str]]:
        """``labels`` by name, B lists of K: the number where it has none, "" where there is none.

        On a CUDA device this waits for it.
        """
        return [
            [label_name(label, self.class_names) for label in row] for row in self.labels.tolist()
        ]


class TripletMaps(NamedTuple):
    """Heat maps of the three images of a triplet, each [B, OH, OW] float32."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


class ObjectMaps(NamedTuple):
    """A map for each object of an image, the most prominent one first, on the images' device."""

    maps: Tensor  # [B, objects, OH, OW] float32
    neighbors: Tensor  # [B, objects] int64, rows of the database
    distances: Tensor  # [B, objects] float32, squared L2 of what was looked at to that row
    labels: Tensor  # [B, objects] int64, of those rows


class PairMaps(NamedTuple):
    """What makes pairs of images close, on either one; all on the images' device, in float32.

    ``similarity`` is the cosine s = f_query · f_match of two unit vectors. Each of ``query_parts``
    and ``match_parts`` splits it over the places of one image, and sums to it; with ``unlike``,
    to the cosine less the product of the image with that.

    ``query_rest`` and ``match_rest`` are what cannot be attributed to a place. It is spread evenly
    over the places, and contained in the parts:

    - 0 for a head that is linear but for its norms, pooling of any power included;
    - the share of the bias for an affine one, which each place has anyway: then a part is exactly
      the share of the place's own embedding;
    - for any other (a hidden nonlinearity, attention, a class token, which is no place) whatever a
      linear model of the head at this image, its norms held fast, leaves out. Where it is most of
      the similarity, the parts say little: look at it.
    """

    query: Tensor  # [B, OH, OW]
    match: Tensor  # [B, OH, OW]
    similarity: Tensor  # [B], the cosine of the two embeddings
    query_parts: Tensor  # [B, H, W], at the layer's resolution, signed
    match_parts: Tensor  # [B, H', W']
    query_rest: Tensor  # [B]
    match_rest: Tensor  # [B]
    # [B, H, W, H', W'], where it was asked for: the share of each place of the one with each place
    # of the other. It sums to the similarity; over the places of the match, to its parts at the
    # query, without `unlike`.
    correspondence: Tensor | None = None


class MapOptions(TypedDict, total=False):
    """How maps are made: keywords of :meth:`gcfast.Explainer.explain_batch` and its siblings.

    Attributes:
        size: (OH, OW) or one number for both; None (the default) is the images' own.
        normalize: "max" (the default: the largest magnitude becomes 1) or "minmax", before
            upsampling; None is raw.
        relu: keep what is positive (the default and the paper); False keeps signed maps.
        center: how much of the rows' offsets to subtract: the response that the row's channels have
            on average over the training images. 0 (the default) is the paper; 1 sharpens most maps.
            Class proxies, which are contrasted with each other, have no offsets: 0 alone.
    """

    size: Size | None
    normalize: str | None
    relu: bool
    center: float


class Finish(NamedTuple):
    """The map options, checked: the keywords of ``sparse_cam`` that are not tensors."""

    size: tuple[int, int]
    normalize: str | None
    relu: bool
    center: float

    def of_dense(self) -> dict[str, Any]:
        """Return the keywords of ``dense_cam``, which subtracts nothing."""
        options = self._asdict()
        del options["center"]
        return options

    @classmethod
    def checked(
        cls,
        images: Tensor,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
    ) -> Finish:
        """Check :class:`MapOptions`, and take the size from images [B, 3, h, w] if none is given.

        Raises:
            TypeError, ValueError: an option of the wrong kind or out of range.
        """
        require_choice("normalize", normalize, ("max", "minmax", None))
        if isinstance(center, bool) or not isinstance(center, int | float):
            raise TypeError(f"`center` must be a number, got {center!r}")
        if not math.isfinite(center):
            raise ValueError(f"`center` must be finite, got {center}")
        if size is None:
            size = (images.shape[-2], images.shape[-1])
        if not isinstance(size, int | tuple | list) or (
            not isinstance(size, int) and len(size) != 2
        ):
            raise TypeError(f"`size` must be (OH, OW) or one int for both, got {size!r}")
        height, width = (size, size) if isinstance(size, int) else size
        require_int("size", height, 1)
        require_int("size", width, 1)
        return cls((height, width), normalize, relu, center)
