"""What an explanation is, and what may be asked of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gcfast._checks import require_choice, require_int

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """Heat maps and what they rest on, all on the images' device."""

    maps: Tensor  # [B, OH, OW] float32
    embeddings: Tensor  # [B, D] float32
    neighbors: Tensor  # [B, K] int64, rows of the database; -1: none
    distances: Tensor  # [B, K] float32, squared L2; +inf where there is none
    labels: Tensor  # [B, K] int64, of those rows; -1 where there is none (float64, NaN: RankLoss)
    flat: Tensor  # [B] bool: nothing was left of the map, which is all zeros
    # [B] float32: the cosine with the image's own map that is to be expected at this distance, for
    # images of the database's classes; None where the database holds no calibration
    # (`Explainer.calibrate`, whose result says whether it is informative).
    confidence: Tensor | None = None


class TripletMaps(NamedTuple):
    """Heat maps of the three images of a triplet, each [B, OH, OW] float32."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


class Finish(NamedTuple):
    """How maps are finished, checked: the keywords of ``sparse_cam`` that are not tensors."""

    size: tuple[int, int]
    center: float
    relu: bool
    normalize: str | None


@dataclass(frozen=True)
class MapOptions:
    """How maps are to be finished; :meth:`gcfast.Explainer.explain_batch` says what each means."""

    size: Size | None
    normalize: str | None
    relu: bool
    center: float

    def checked(self, images: Tensor) -> Finish:
        """Check everything, and take the size from the images where none is given."""
        require_choice("normalize", self.normalize, ("max", "minmax", None))
        if isinstance(self.center, bool) or not isinstance(self.center, int | float):
            raise TypeError(f"`center` must be a number, got {self.center!r}")
        if not math.isfinite(self.center):
            raise ValueError(f"`center` must be finite, got {self.center}")
        size = tuple(images.shape[-2:]) if self.size is None else self.size
        if not isinstance(size, int | tuple | list) or (
            not isinstance(size, int) and len(size) != 2
        ):
            raise TypeError(f"`size` must be (OH, OW) or one int for both, got {size!r}")
        height, width = (size, size) if isinstance(size, int) else size
        require_int("size", height, 1)
        require_int("size", width, 1)
        return Finish((height, width), self.center, self.relu, self.normalize)
