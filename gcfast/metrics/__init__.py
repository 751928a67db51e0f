"""Scores of heat maps against what they should fall on, and of maps against each other.

Batched, on the maps' device; the definitions and their sources are in the docstrings.
"""

from gcfast.metrics.agreement import cosine, spearman
from gcfast.metrics.localisation import (
    best_box_iou,
    box_iou,
    localisation_accuracy,
    localisation_iou,
    max_box_acc_v2,
    threshold_boxes,
)
from gcfast.metrics.pointing import pointing_game
from gcfast.metrics.regions import RegionSums, region_sums
from gcfast.metrics.shares import (
    box_masks,
    box_score,
    flat_maps,
    mask_score,
    part_score,
    two_object_scores,
)

__all__ = [
    "RegionSums",
    "best_box_iou",
    "box_iou",
    "box_masks",
    "box_score",
    "cosine",
    "flat_maps",
    "localisation_accuracy",
    "localisation_iou",
    "mask_score",
    "max_box_acc_v2",
    "part_score",
    "pointing_game",
    "region_sums",
    "spearman",
    "threshold_boxes",
    "two_object_scores",
]
