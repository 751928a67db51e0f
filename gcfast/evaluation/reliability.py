"""What a confidence in a map's class is worth on test images whose labels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast.evaluation.ways import Query, Trained
from gcfast.explain.confidence import MIN_IMAGES, Confidence
from gcfast.explain.second_look import HOT
from gcfast.method.tail import pooled_by
from gcfast.metrics import auroc
from gcfast.search.classes import nearest_by_class

GROUPS = 10
IMAGES_A_GROUP = 20
DRAWS = 1000


class Group(NamedTuple):
    """Images of about the same confidence."""

    images: int
    stated: float  # mean confidence
    right: float  # share whose map's class is theirs


@dataclass(frozen=True)
class Reliability:
    """A confidence that was fitted to one half of the images, on the other half.

    Attributes:
        fitted: the confidence.
        stated: [n] float32, how probable it called each image's class.
        right: [n] bool, whether the map's class is the image's.
        distances: [n] float32, squared L2 to the nearest row.
    """

    fitted: Confidence
    stated: Tensor
    right: Tensor
    distances: Tensor

    def groups(self) -> list[Group]:
        """Return the images by confidence, in groups of equal size."""
        return [
            Group(
                len(part),
                float(self.stated[part].double().mean()),
                float(self.right[part].double().mean()),
            )
            for part in self._parts()
        ]

    @property
    def error(self) -> float:
        """The calibration error: how far groups' confidence is from what came true, on average."""
        return float(self._error(self.right[None].double()))

    @property
    def chance(self) -> float:
        """The error that a confidence would have here, on average, that states the true odds."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand((DRAWS, len(self.stated)), generator=generator, dtype=torch.float64)
        return float(self._error((drawn < self.stated).double()).mean())

    def _parts(self) -> Sequence[Tensor]:
        count = max(1, min(GROUPS, len(self.stated) // IMAGES_A_GROUP))
        return self.stated.argsort(stable=True).tensor_split(count)

    def _error(self, right: Tensor) -> Tensor:
        """The calibration error [n] of outcomes [n, images] float64."""
        gaps = right - self.stated.double()
        return sum(
            (gaps[:, part].sum(1).abs() for part in self._parts()), gaps.new_zeros(len(gaps))
        ) / len(self.stated)

    def __str__(self) -> str:
        """Return what it is worth, next to the distance, in one line."""
        return (
            f"calibration error {self.error:.3f} (of one that is calibrated: {self.chance:.3f}); "
            "right from wrong (AUROC): "
            f"{auroc(self.stated, self.right):.3f} by the confidence, "
            f"{auroc(-self.distances, self.right):.3f} by the distance; the class is right in "
            f"{float(self.right.double().mean()):.3f} of {len(self.right)} images, fitted to the "
            f"{self.fitted.images} others"
        )


class RatedSample:
    """Test images of the database's classes, rated by a second look at one row's maps.

    Args:
        trained: the training images after their pass.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        database = trained.database
        self.known = {database.label_name(label) for label in set(database.labels.tolist())}
        self.ratios: list[Tensor] = []
        self.right: list[Tensor] = []
        self.distances: list[Tensor] = []

    def add(self, query: Query, labels: Sequence[str], maps: Tensor) -> None:
        """Add a batch, as :class:`gcfast.explain.second_look.SecondLook` rates it.

        Args:
            query: B images after their pass.
            labels: their B class names; those that the database does not know are left out.
            maps: [B, H, W] in [0, 1], at the activations' resolution.
        """
        trained = self.trained
        hot = trained.head.project(pooled_by(query.activations, maps**HOT))[0]
        classes = trained.database.labels.to(hot.device)
        near = nearest_by_class(hot, trained.table, classes, classes[query.nearest])
        kept = torch.tensor([label in self.known for label in labels], dtype=torch.bool)
        names = trained.label_names(query.nearest)
        right = torch.tensor([a == b for a, b in zip(names, labels, strict=True)], dtype=torch.bool)
        self.ratios.append(near.log_ratio.cpu()[kept])
        self.right.append(right[kept])
        self.distances.append(query.distances.cpu()[kept])

    def checked(self) -> Reliability | None:
        """Fit to every other image and state for the rest; None for too few of them."""
        ratios, right, distances = (
            torch.cat(parts) if parts else torch.empty(0)
            for parts in (self.ratios, self.right, self.distances)
        )
        if len(ratios) < 2 * MIN_IMAGES:
            return None
        fitted = Confidence.fit(ratios[::2], right[::2])
        return Reliability(fitted, fitted(ratios[1::2]), right[1::2], distances[1::2])
