"""What an explanation depends on besides the model and the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gcfast._checks import MAX_SEED, require_choice, require_int
from gcfast.method.objectives import (
    PAPER_MARGIN,
    LossFunction,
    Objective,
    TripletLoss,
    as_objective,
)
from gcfast.ops import METHODS

# The settings of the paper's tables (sections 3 and 4.1), for Explainer(model, **PAPER). It states
# no margin: PAPER_MARGIN is ours.
PAPER: dict[str, Any] = {
    "objective": TripletLoss(margin=PAPER_MARGIN),
    "method": "gradcam",
    "triplets": 50,
    "channels": 50,
    "evidence": "against",
    "k": 1,
    "index": "exact",
    "l2_normalize": True,
}


@dataclass(frozen=True)
class Settings:
    """The settings that a database is built with; :class:`gcfast.Explainer` documents them."""

    objective: Objective
    method: str
    triplets: int | Literal["all"]
    channels: int | Literal["all"]
    evidence: str
    l2_normalize: bool
    on_no_triplet: str
    seed: int

    @classmethod
    def checked(
        cls,
        *,
        objective: Objective | LossFunction,
        method: str,
        triplets: int | str,
        channels: int | str,
        evidence: str,
        l2_normalize: bool,
        on_no_triplet: str,
        seed: int,
    ) -> Settings:
        """The settings, or TypeError or ValueError with the argument's name."""
        require_choice("method", method, METHODS)
        require_choice("evidence", evidence, ("for", "against"))
        require_choice("on_no_triplet", on_no_triplet, ("hardest", "skip"))
        if not isinstance(l2_normalize, bool):
            raise TypeError(f"`l2_normalize` must be a bool, got {l2_normalize!r}")
        return cls(
            objective=as_objective(objective),
            method=method,
            triplets=_count("triplets", triplets),
            channels=_count("channels", channels),
            evidence=evidence,
            l2_normalize=l2_normalize,
            on_no_triplet=on_no_triplet,
            seed=require_int("seed", seed, 0, MAX_SEED),
        )

    @property
    def sign(self) -> int:
        """What dL/df is multiplied by: −1 for the evidence that lowers the loss."""
        return -1 if self.evidence == "for" else 1

    def describe(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {
            "objective": self.objective.describe(),
            "method": self.method,
            "triplets": self.triplets,
            "channels": self.channels,
            "evidence": self.evidence,
            "l2_normalize": self.l2_normalize,
            "on_no_triplet": self.on_no_triplet,
            "seed": self.seed,
        }


def _count(name: str, value: int | str) -> int | Literal["all"]:
    if value == "all":
        return "all"
    return require_int(name, value, 1, what=' or "all"')
