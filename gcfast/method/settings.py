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
    objective_from,
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
# What is ahead on photographs (bench/RESULTS.md), beyond the paper, for Explainer(model, **BEST):
# class proxies, and maps refined by earlier layers. It needs classes; each piece stands alone.
BEST: dict[str, Any] = {"method": "proxy", "refine": "auto"}
PROXY = "proxy"  # the method of class proxies, which goes beyond the paper
ELEMENTWISE = "elementwise"  # that of transferred cotangents, which does too
# Those of gcfast.Explainer, for what a description leaves out.
DEFAULTS: dict[str, Any] = {
    "objective": TripletLoss(),
    "method": "gradcam",
    "triplets": 50,
    "channels": 50,
    "evidence": "for",
    "l2_normalize": True,
    "on_no_triplet": "hardest",
    "seed": 0,
}
# What a method does not take, and why.
_LEFT_OUT: dict[str, dict[str, str]] = {
    PROXY: {
        "triplets": "draws no triplets",
        "channels": "weighs every channel",
        "evidence": "has weights of either sign",
        "on_no_triplet": "draws no triplets",
    },
    ELEMENTWISE: {"channels": "takes every channel"},
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
        require_choice("method", method, (*METHODS, PROXY, ELEMENTWISE))
        require_choice("evidence", evidence, ("for", "against"))
        require_choice("on_no_triplet", on_no_triplet, ("hardest", "skip"))
        if not isinstance(l2_normalize, bool):
            raise TypeError(f"`l2_normalize` must be a bool, got {l2_normalize!r}")
        one = cls(
            objective=as_objective(objective),
            method=method,
            triplets=_count("triplets", triplets),
            channels=_count("channels", channels),
            evidence=evidence,
            l2_normalize=l2_normalize,
            on_no_triplet=on_no_triplet,
            seed=require_int("seed", seed, 0, MAX_SEED),
        )
        if one.is_proxy:
            one._check_proxy()
        for name, why in _LEFT_OUT.get(method, {}).items():
            value = getattr(one, name)
            if value != DEFAULTS[name]:
                raise ValueError(
                    f"`{name}` must be left out with method={method!r}, which {why}, got {value!r}"
                )
        return one

    @classmethod
    def described(cls, description: dict[str, Any]) -> Settings:
        """Return the settings that :meth:`describe` described.

        Raises:
            KeyError, TypeError, ValueError: it is not the description of any.
        """
        stored = dict(description)
        output_key = stored.pop("output_key", None)  # which the description of a build also has
        if output_key is not None and not isinstance(output_key, (str, int)):
            raise TypeError(f"'output_key' must be a str or an int, got {output_key!r:.60}")
        if "objective" in stored:  # class proxies have none
            stored["objective"] = objective_from(stored["objective"])
        return cls.checked(**{**DEFAULTS, **stored})

    def _check_proxy(self) -> None:
        """Refuse what class proxies know nothing of, unless it is left at its default."""
        if self.objective.real_labels:
            raise ValueError(
                f"`method` must be {' or '.join(map(repr, METHODS))} with a "
                f"{type(self.objective).__name__}, whose labels are real numbers, got 'proxy', "
                "which needs classes"
            )
        if self.objective.describe() != TripletLoss().describe():
            raise ValueError(
                "`objective` must be left out with method='proxy', which differentiates nothing, "
                f"got {self.objective!r}"
            )

    @property
    def is_proxy(self) -> bool:
        """Whether class proxies explain, rather than gradients."""
        return self.method == PROXY

    @property
    def is_elementwise(self) -> bool:
        """Whether rows lend cotangents, which are pulled back at the explained image."""
        return self.method == ELEMENTWISE

    @property
    def without_channels(self) -> bool:
        """Whether rows keep no channels, and a build takes one pass over any head."""
        return self.method in _LEFT_OUT

    @property
    def kind(self) -> str:
        """What rows lend, in a word that differs where a database cannot stand for another."""
        return self.method if self.without_channels else METHODS[0]

    @property
    def sign(self) -> int:
        """What dL/df is multiplied by: −1 for the evidence that lowers the loss."""
        return -1 if self.evidence == "for" else 1

    def describe(self) -> dict[str, Any]:
        """The settings as JSON has them; those that say nothing of the method are left out."""
        if self.is_proxy:
            return {"method": self.method, "l2_normalize": self.l2_normalize}
        return {
            "objective": self.objective.describe(),
            "method": self.method,
            "triplets": self.triplets,
            **({} if self.is_elementwise else {"channels": self.channels}),
            "evidence": self.evidence,
            "l2_normalize": self.l2_normalize,
            "on_no_triplet": self.on_no_triplet,
            "seed": self.seed,
        }


def _count(name: str, value: int | str) -> int | Literal["all"]:
    if value == "all":
        return "all"
    return require_int(name, value, 1, what=' or "all"')
