"""Scores of heat maps against the objects that they should fall on, and against each other.

All work on batches, on the maps' device; docstrings have the definitions and their sources.
"""

from gcfast.metrics.agreement import cosine, spearman
from gcfast.metrics.boxes import box_iou, box_masks, mask_box
from gcfast.metrics.localisation import (
    best_box_iou,
    localisation_accuracy,
    localisation_iou,
    max_box_acc_v2,
    threshold_boxes,
)
from gcfast.metrics.ranking import auroc, ranking_scores
from gcfast.metrics.regions import RegionSums, region_sums
from gcfast.metrics.scores import (
    box_score,
    flat_maps,
    mask_score,
    part_score,
    pointing_game,
    two_object_scores,
)

__all__ = [
    "RegionSums",
    "auroc",
    "best_box_iou",
    "box_iou",
    "box_masks",
    "box_score",
    "cosine",
    "flat_maps",
    "localisation_accuracy",
    "localisation_iou",
    "mask_box",
    "mask_score",
    "max_box_acc_v2",
    "part_score",
    "pointing_game",
    "ranking_scores",
    "region_sums",
    "spearman",
    "threshold_boxes",
    "two_object_scores",
]
