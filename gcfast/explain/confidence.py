"""How probable it is that a map shows the right class: a logistic function of one log-ratio.

The hot pixels of a map are embedded by themselves. How much nearer they are to the map's class than
to any other (:attr:`gcfast.search.classes.Nearest.log_ratio`) tells whether the class is right,
where the distance of the whole image hardly does (bench/RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

STEPS = 50  # of Newton's method, which takes about ten
MIN_IMAGES = 10


@dataclass(frozen=True)
class Confidence:
    """sigmoid(offset + slope · log-ratio), fitted to held-out images.

    Attributes:
        offset: of the logistic function.
        slope: of it; above 0 where a class that is much nearer than others is more often right.
        images: how many images it was fitted to.
        right: in how many of them the map's class was theirs.
    """

    offset: float
    slope: float
    images: int
    right: int

    @classmethod
    def fit(cls, ratios: Tensor, right: Tensor) -> Confidence:
        """Fit by maximum likelihood, with Platt's smoothed targets.

        Where log-ratios separate right from wrong perfectly, or all are right, the smoothed
        targets keep the slope finite.

        Args:
            ratios: [n] floating point, finite.
            right: [n] bool.

        Raises:
            ValueError: fewer than MIN_IMAGES images.

        Source: Platt 1999, with the targets of Lin, Lin and Weng 2007.
        """
        if len(ratios) < MIN_IMAGES:
            raise ValueError(f"`ratios` must be of at least {MIN_IMAGES} images, got {len(ratios)}")
        x = torch.stack([torch.ones(len(ratios)), ratios.cpu()], 1).double()  # [n, 2]
        hits = int(right.sum())
        target = torch.where(right.cpu(), (hits + 1) / (hits + 2), 1 / (len(x) - hits + 2)).double()
        w = torch.zeros(2, dtype=torch.float64)

        def loss(w: Tensor) -> float:
            z = x @ w
            return float((torch.nn.functional.softplus(z) - target * z).sum())

        for _ in range(STEPS):
            p = torch.sigmoid(x @ w)
            gradient = x.T @ (p - target)
            # One ratio for all images leaves the slope open: the ridge keeps it at 0.
            curvature = (x.T * (p * (1 - p))) @ x + 1e-9 * torch.eye(2, dtype=torch.float64)
            step, scale = torch.linalg.solve(curvature, gradient), 1.0
            while loss(w - scale * step) > loss(w) and scale > 1e-6:
                scale /= 2
            w = w - scale * step
            if float(step.abs().max()) < 1e-9:
                break
        return cls(float(w[0]), float(w[1]), len(x), hits)

    def __call__(self, ratios: Tensor) -> Tensor:
        """Return the probability [B] float32 that the class is right, by log-ratios [B]."""
        return torch.sigmoid(self.offset + self.slope * ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return it as the manifest keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Confidence:
        """Read what :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        offset, slope = float(kept["offset"]), float(kept["slope"])
        if not (math.isfinite(offset) and math.isfinite(slope)):
            raise ValueError("its confidence must be finite")
        return cls(offset, slope, int(kept["images"]), int(kept["right"]))
