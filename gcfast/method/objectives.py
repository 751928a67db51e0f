"""What is differentiated: losses over an anchor and its partners.

Every objective answers two questions. ``pairs`` says which partners an anchor may have: "triplet"
(a positive and a negative), "positive" or "negative"; or, where labels are real numbers, "ranked"
(images of any other label), "lower" or "higher" (of a lower or a higher one). ``cotangent`` gives
the gradient of the loss with respect to the anchor's embedding, and which partners are valid. A
lower loss is always better, so that "evidence for" has one meaning: the channels whose growth
lowers the loss.

D is the squared Euclidean distance. Source: paper, section 3.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcfast._checks import require_choice

PAPER_MARGIN = 0.2  # ours: the paper gives no value for its margin
LINEAR_LIMIT = 16_384  # weights of a RankLoss: the manifest holds them as text, 20 bytes each

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Partners(NamedTuple):
    """Embeddings of the partners, [..., T, D]; None for a kind that the objective does not use."""

    positives: Tensor | None
    negatives: Tensor | None
    others: Tensor | None = None  # of ranked pairs
    above: Tensor | None = None  # [..., T] bool: the anchor's label is the larger of the pair


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distance along the last dimension, [..., D] and [..., D] → [...]."""
    return (x - y).square().sum(-1)


class Objective(ABC):
    """A loss over an anchor and its partners.

    Attributes:
        pairs: "triplet", "positive" or "negative" where labels are classes; "ranked", "lower" or
            "higher" where they are real numbers (see ``real_labels``).
        hinge: the margin m where a triplet is valid exactly when ``D(a,p) + m > D(a,n)``
            (infinity: always), so that valid pairs can be counted without listing them; None where
            only the loss itself can tell.
        is_affine: every pair is valid and the gradient is affine in the partners, so that its mean
            over pairs is the gradient at the mean partners.
    """

    pairs: str = "triplet"
    hinge: float | None = None
    is_affine: bool = False

    @property
    def real_labels(self) -> bool:
        """Whether labels are real numbers (prices, ages) instead of classes."""
        return self.pairs in ("ranked", "lower", "higher")

    @abstractmethod
    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """The loss of T triplets, [T, D] each → [T]; without its hinge where ``hinge`` is False."""

    @abstractmethod
    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """The gradient of the loss, the hinge ignored, and which triplets are valid.

        Args:
            anchor: [..., D] float32.
            partners: positives and negatives, [..., T, D] float32.

        Returns:
            (dL/df_a [..., T, D], valid [..., T] bool).
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and parameters, as JSON has them."""

    def __repr__(self) -> str:
        """Name and parameters."""
        described = self.describe()
        values = ", ".join(f"{k}={v!r}" for k, v in described.items() if k != "name")
        return f"{described['name']}({values})"


class DistanceDifference(Objective):
    """L = D(a, p) − D(a, n), every triplet valid (the triplet loss with an infinite margin)."""

    hinge = math.inf
    is_affine = True

    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """See :meth:`Objective.loss`."""
        del hinge
        return squared_distance(anchor, positive) - squared_distance(anchor, negative)

    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """2 (f_n − f_p), whatever the anchor; see :meth:`Objective.cotangent`."""
        del anchor
        assert partners.positives is not None
        assert partners.negatives is not None
        gradient = 2 * (partners.negatives - partners.positives)
        return gradient, torch.ones(gradient.shape[:-1], dtype=torch.bool, device=gradient.device)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        return {"name": "DistanceDifference"}


class TripletLoss(Objective):
    """L = max(0, D(a, p) − D(a, n) + margin), valid where it is above zero.

    Args:
        margin: δ, in units of squared distance. The paper gives no value; 0.2 is ours.

    Raises:
        ValueError: a margin that is not finite.

    Source: paper, Eq. 2.
    """

    def __init__(self, margin: float = PAPER_MARGIN) -> None:
        if not math.isfinite(margin):
            raise ValueError(f"`margin` must be finite, got {margin}")
        self.margin = self.hinge = float(margin)

    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """See :meth:`Objective.loss`."""
        difference = squared_distance(anchor, positive) - squared_distance(anchor, negative)
        loss = difference + self.margin
        return loss.clamp(min=0) if hinge else loss

    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """2 (f_n − f_p), whatever the anchor; see :meth:`Objective.cotangent`."""
        assert partners.positives is not None
        assert partners.negatives is not None
        gradient = 2 * (partners.negatives - partners.positives)
        loss = self.loss(anchor[..., None, :], partners.positives, partners.negatives, hinge=False)
        return gradient, loss > 0

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        return {"name": "TripletLoss", "margin": self.margin}


class PairDistance(Objective):
    """The distance to one kind of partner: D(a, p), or −D(a, n).

    Args:
        kind: "positive" or "negative". Both fall when the embedding gets better.

    Raises:
        ValueError: another kind.

    Source: paper, section 3.1 (pair-wise distances).
    """

    is_affine = True

    def __init__(self, kind: str) -> None:
        require_choice("kind", kind, ("positive", "negative"))
        self.kind = self.pairs = kind

    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """See :meth:`Objective.loss`."""
        del hinge
        if self.kind == "positive":
            return squared_distance(anchor, positive)
        return -squared_distance(anchor, negative)

    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """±2 (f_a − f_partner); see :meth:`Objective.cotangent`."""
        positive = self.kind == "positive"
        partner = partners.positives if positive else partners.negatives
        assert partner is not None
        gradient = (2 if positive else -2) * (anchor[..., None, :] - partner)
        return gradient, torch.ones(gradient.shape[:-1], dtype=torch.bool, device=gradient.device)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        return {"name": "PairDistance", "kind": self.kind}


class RankLoss(Objective):
    """Cross-entropy over a linear layer on f_a − f_j: which of the two has the larger label.

    Class 1 is "the anchor's label is the larger". A pair is valid where the labels, real numbers,
    differ. With the logit z = (w_1 − w_0)·(f_a − f_j) + b_1 − b_0 the gradient is
    dL/df_a = (σ(z) − y) (w_1 − w_0), y = 1 where the anchor's label is the larger.

    All gradients thus lie on one line, and the mean over the pairs of an anchor is the share that
    the network puts below it less the share that is: the more the network has learnt, the more
    what remains is the anchor's residual, whose sign need not be that of what the image shows.
    ``partners="lower"`` asks what puts an image above those that it is above (evidence for: what
    raises its score), "higher" what keeps it below the others.

    The network is meant to be explained as it was trained, ``Explainer(model,
    objective=RankLoss(linear), l2_normalize=False)``; loaders give one finite number an image as
    label.

    Args:
        linear: D features to 2 outputs, in the order "lower", "higher". Its values are copied.
        partners: "all" (the paper), or only images of a "lower" or a "higher" label.

    Raises:
        TypeError: not an ``nn.Linear``.
        ValueError: not 2 outputs, NaN or infinity in it, or more than LINEAR_LIMIT weights; other
            partners.

    Source: paper, the rank siamese network of its house price application.
    """

    def __init__(self, linear: nn.Linear, partners: str = "all") -> None:
        require_choice("partners", partners, ("all", "lower", "higher"))
        self.partners = partners
        self.pairs = "ranked" if partners == "all" else partners
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"`linear` must be a torch.nn.Linear, got {type(linear).__name__}")
        if linear.out_features != 2:
            raise ValueError(f"`linear` must have 2 outputs, got {linear.out_features}")
        if linear.weight.numel() > LINEAR_LIMIT:
            raise ValueError(
                f"`linear` must have at most {LINEAR_LIMIT} weights (the database's manifest holds "
                f"them), got {linear.weight.numel()}"
            )
        bias = linear.weight.new_zeros(2) if linear.bias is None else linear.bias
        self.weight = linear.weight.detach().float().cpu().clone()  # [2, D]
        self.bias = bias.detach().float().cpu().clone()  # [2]
        if not bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all()):
            raise ValueError("`linear` must have finite weights, got NaN or infinity")

    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """Always an error: see :meth:`pair_loss`."""
        del anchor, positive, negative, hinge
        raise ValueError(
            "`objective` must be over triplets to explain one, got RankLoss, which compares two "
            "images: use explain_labelled"
        )

    def pair_loss(self, anchor: Tensor, other: Tensor, above: Tensor) -> Tensor:
        """The loss of T pairs: [T, D], [T, D] and bool [T] (see :class:`Partners`) → [T]."""
        weight, bias = self._checked(anchor)
        logits = (anchor - other) @ weight.T + bias
        return F.cross_entropy(logits, above.long(), reduction="none")

    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """(σ(z) − y) (w_1 − w_0); see :meth:`Objective.cotangent`."""
        assert partners.others is not None
        assert partners.above is not None
        direction = self.direction(anchor)
        slope = self.slopes((anchor[..., None, :] - partners.others) @ direction, partners.above)
        valid = torch.ones(slope.shape, dtype=torch.bool, device=slope.device)
        return slope[..., None] * direction, valid

    def direction(self, embeddings: Tensor) -> Tensor:
        """w_1 − w_0, [D], where the embeddings are and in their dtype."""
        weight, _ = self._checked(embeddings)
        return weight[1] - weight[0]

    def slopes(self, difference: Tensor, above: Tensor) -> Tensor:
        """σ(z) − y, by (w_1 − w_0)·(f_a − f_j) and whether the anchor's label is the larger."""
        logit = difference + (self.bias[1] - self.bias[0]).to(difference)
        # σ(z) − 1 is −σ(−z), which keeps its digits where the network is sure.
        return torch.where(above, -torch.sigmoid(-logit), torch.sigmoid(logit))

    def _checked(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias where the embeddings are and in their dtype."""
        D = self.weight.shape[1]
        if embeddings.shape[-1] != D:
            raise ValueError(
                f"`objective` must rank embeddings of D = {embeddings.shape[-1]}, got a RankLoss "
                f"whose linear layer takes {D}"
            )
        return self.weight.to(embeddings), self.bias.to(embeddings)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        return {
            "name": "RankLoss",
            "partners": self.partners,
            "weight": self.weight.tolist(),
            "bias": self.bias.tolist(),
        }

    def __repr__(self) -> str:
        """Name and size; the weights would fill the line."""
        return f"RankLoss(D={self.weight.shape[1]}, partners={self.partners!r})"

    @classmethod
    def _described(cls, description: dict[str, Any]) -> RankLoss:
        weight = torch.tensor(description["weight"], dtype=torch.float32)
        linear = nn.Linear(weight.shape[1], 2, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(torch.tensor(description["bias"], dtype=torch.float32))
        return cls(linear, description["partners"])


class FunctionObjective(Objective):
    """A user's function of the three embeddings.

    A triplet is valid where the loss is above zero. To find those, the function is evaluated on
    every pair of every anchor, in chunks: fine for thousands of rows, slow for millions.

    Args:
        function: (anchor, positive, negative), [T, D] float32 each → [T], differentiable in the
            anchor.
    """

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, hinge: bool) -> Tensor:
        """See :meth:`Objective.loss`; a function's hinge is its own and stays."""
        del hinge
        loss = self.function(anchor, positive, negative)
        if not isinstance(loss, Tensor) or loss.shape != anchor.shape[:1]:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"`objective` must return a tensor of shape [T] = [{len(anchor)}], got {got}"
            )
        return loss

    def cotangent(self, anchor: Tensor, partners: Partners) -> tuple[Tensor, Tensor]:
        """By autograd; see :meth:`Objective.cotangent`."""
        assert partners.positives is not None
        assert partners.negatives is not None
        shape = partners.positives.shape
        with torch.inference_mode(False), torch.enable_grad():
            leaf = anchor[..., None, :].expand(shape).reshape(-1, shape[-1]).clone()
            leaf.requires_grad_()
            loss = self.loss(
                leaf,
                partners.positives.reshape(leaf.shape).clone(),
                partners.negatives.reshape(leaf.shape).clone(),
                hinge=True,
            )
            gradient = gradients_of(loss, [leaf])[0]
        return gradient.view(shape), (loss.detach() > 0).view(shape[:-1])

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"name": "function", "function": f"{self.function.__module__}.{name}"}


def gradients_of(loss: Tensor, embeddings: list[Tensor]) -> list[Tensor]:
    """dL/df for each of the embeddings, zeros for those that the loss does not use.

    Raises:
        ValueError: a loss that uses none of them, or whose graph is cut.
    """
    if not loss.requires_grad:
        raise ValueError(
            "`objective` must be differentiable in the anchor's embedding, got a loss that does "
            "not depend on it"
        )
    gradients = torch.autograd.grad(
        loss.sum(), embeddings, allow_unused=True, materialize_grads=True
    )
    return list(gradients)


def as_objective(objective: Objective | LossFunction) -> Objective:
    """The objective itself, or a user's function as one.

    Raises:
        TypeError: neither; a class instead of an instance included.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            "`objective` must be an Objective such as gcfast.TripletLoss() or a function of "
            f"(anchor, positive, negative), got {objective!r}"
        )
    return FunctionObjective(objective)


def objective_from(description: dict[str, Any]) -> Objective:
    """The objective that ``describe`` described.

    A user's function cannot be stored; its place is taken by one that says so when it is called.
    """
    if not isinstance(description, dict):
        raise TypeError(f"the objective's description must be a dict, got {description!r:.60}")
    name = description.get("name")
    if name == "TripletLoss":
        return TripletLoss(description["margin"])
    if name == "DistanceDifference":
        return DistanceDifference()
    if name == "PairDistance":
        return PairDistance(description["kind"])
    if name == "RankLoss":
        return RankLoss._described(description)

    def missing(*_: Tensor) -> Tensor:
        raise ValueError(
            "`objective` must be given: the database was built with the function "
            f"{description.get('function')!r}, which is not stored in it"
        )

    return FunctionObjective(missing)
