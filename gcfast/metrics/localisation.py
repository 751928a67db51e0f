"""Weakly-supervised localisation: from a map to boxes, and how well they fit.

SciPy (gcfast's extra ``evaluate``) finds connected components on the CPU; results are on the maps'
device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import require_finite_rows, require_shape
from gcfast.errors import MissingExtraError
from gcfast.metrics.boxes import box_iou, mask_box

V2_IOUS = (0.3, 0.5, 0.7)
V2_THRESHOLDS = tuple(i / 100 for i in range(100))
_EIGHT = np.ones((3, 3), dtype=np.uint8)  # pixels that touch at a corner are connected

Boxes = Tensor | Sequence[Tensor]


def threshold_boxes(maps: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the box of the largest connected component above each threshold.

    A pixel counts where the map is above ``threshold`` times its maximum; pixels that touch at a
    corner are connected; of components of equal size the first by rows wins.

    Args:
        maps: [B, H, W] floating point, finite, at the size of the images.
        thresholds: K numbers in [0, 1).

    Returns:
        [B, K, 4] int64, whole pixels (x0, y0, x1, y1), the end exclusive; zeros for a flat map.

    Raises:
        MissingExtraError: SciPy is not installed.
        ValueError: another shape; NaN or infinity in a map; a threshold out of range.

    Source: Zhou et al., "Learning deep features for discriminative localization", CVPR 2016,
        section 3.2, which takes 0.2; the paper's weakly-supervised localisation.
    """
    found = [
        [boxes[sizes.argmax()] if len(boxes) else (0, 0, 0, 0) for boxes, sizes in one]
        for one in _components(maps, thresholds)
    ]
    shape = (len(maps), len(thresholds), 4)
    return torch.tensor(np.asarray(found, np.int64).reshape(shape), device=maps.device)


def localisation_iou(maps: Tensor, boxes: Boxes, thresholds: Sequence[float]) -> Tensor:
    """Return the IoU of the largest component's box with the closest true box, by threshold.

    Args:
        maps: [B, H, W], as for :func:`threshold_boxes`.
        boxes: the true ones, [B, 4], or B tensors [n, 4] where an image has several.
        thresholds: K numbers in [0, 1).

    Returns:
        [B, K] float32; 0 for a flat map.

    Raises:
        MissingExtraError, ValueError: as :func:`threshold_boxes`; an image without a box, by row.
    """
    true = _listed_boxes(boxes, len(maps))
    found = threshold_boxes(maps, thresholds).cpu()
    best = [box_iou(f, t).amax(1) for f, t in zip(found, true, strict=True)]
    return _stacked(best, len(thresholds), maps.device)


def localisation_accuracy(iou: Tensor, at: float = 0.5) -> Tensor:
    """Return the share of images whose IoU [B, K] is at least ``at``, by threshold: [K] float32."""
    require_shape("iou", iou, "B K")
    return (iou >= at).float().mean(0)


def best_box_iou(maps: Tensor, boxes: Boxes, thresholds: Sequence[float] = V2_THRESHOLDS) -> Tensor:
    """Return the IoU of the best pair of any component's box and any true box, by threshold.

    Args:
        maps: [B, H, W] floating point, finite, at the size of the images; each is scaled to its
            own minimum and maximum first, as in the source.
        boxes: as for :func:`localisation_iou`.
        thresholds: K numbers in [0, 1).

    Returns:
        [B, K] float32; 0 for a constant map.

    Raises:
        MissingExtraError, ValueError: as :func:`localisation_iou`.

    Source: Choe et al., "Evaluating weakly supervised object localization methods right", CVPR
        2020 (arXiv:2001.07437), MaxBoxAccV2. The source's code rounds maps to 256 levels, counts
        box ends as inclusive, also boxes the holes of components and uses thresholds 0.001 apart;
        this function does none of that, and its default thresholds are 0.01 apart.
    """
    true = _listed_boxes(boxes, len(maps))
    require_shape("maps", maps, "B H W")
    require_finite_rows("maps", maps)
    low = maps.amin((1, 2), keepdim=True)
    best = []
    for one, t in zip(_components(maps - low, thresholds), true, strict=True):
        fits = box_iou(torch.from_numpy(np.concatenate([found for found, _ in one])), t).amax(1)
        ends = np.cumsum([len(found) for found, _ in one]).tolist()
        parts = fits.tensor_split(ends[:-1])
        best.append(torch.stack([p.max() if len(p) else p.new_zeros(()) for p in parts]))
    return _stacked(best, len(thresholds), maps.device)


def max_box_acc_v2(iou: Tensor) -> float:
    """Return MaxBoxAccV2 of :func:`best_box_iou`'s [B, K].

    This is the accuracy of the best threshold for an IoU of 0.3, 0.5 and 0.7, averaged over the
    three.
    """
    require_shape("iou", iou, "B K")
    if not iou.numel():
        raise ValueError(f"`iou` must hold images and thresholds, got {list(iou.shape)}")
    return sum(float(localisation_accuracy(iou, at).max()) for at in V2_IOUS) / len(V2_IOUS)


def _components(
    maps: Tensor, thresholds: Sequence[float]
) -> Iterator[list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Yield for each map, at each threshold, boxes [n, 4] and sizes [n] of the components."""
    ndimage = _ndimage()
    require_shape("maps", maps, "B H W")
    require_finite_rows("maps", maps)
    for value in thresholds:
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError(f"`thresholds` must lie in [0, 1), got {value}")
    for one in maps.detach().float().cpu().numpy():
        peak = float(one.max())
        # Above a positive threshold, or above 0: a flat map has nothing there.
        yield [_components_of(one > (v * peak if peak > 0 else peak), ndimage) for v in thresholds]


def _components_of(
    mask: NDArray[np.bool_], ndimage: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not mask.any():
        return np.zeros((0, 4), np.int64), np.zeros(0, np.int64)
    x0, y0, x1, y1 = mask_box(mask)
    labels, count = ndimage.label(mask[y0:y1, x0:x1], _EIGHT)
    if count == 1:  # the usual case: nothing to compare
        return np.array([[x0, y0, x1, y1]]), np.ones(1, np.int64)
    slices = ndimage.find_objects(labels)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices])
    boxes += np.array([x0, y0, x0, y0])
    return boxes, np.bincount(labels.ravel())[1:]


def _listed_boxes(boxes: Boxes, count: int) -> list[Tensor]:
    listed = [b[None] for b in boxes] if isinstance(boxes, Tensor) else list(boxes)
    if len(listed) != count:
        raise ValueError(f"`boxes` must have B = {count} elements, got {len(listed)}")
    for row, box in enumerate(listed):
        if box.ndim != 2 or box.shape[1] != 4 or not len(box):
            raise ValueError(
                f"`boxes` must hold [n, 4] with n at least 1 for each image, "
                f"got {list(box.shape)} in row {row}"
            )
    return [box.cpu() for box in listed]


def _stacked(rows: list[Tensor], width: int, device: torch.device) -> Tensor:
    if not rows:
        return torch.zeros((0, width), device=device)
    return torch.stack(rows).float().to(device)


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise MissingExtraError(
            "localisation needs SciPy: pip install 'gcfast[evaluate]'"
        ) from error
    return ndimage
