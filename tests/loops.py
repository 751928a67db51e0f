"""The paper's method as a plain loop: one triplet, one backward pass at a time, in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfast

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Triple = tuple[int, int]


def squared(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y) ** 2).sum(-1)


LOSSES: dict[str, Loss] = {
    # Without its hinge: whoever calls has chosen the valid triplets, or wants the hinge ignored.
    "TripletLoss": lambda a, p, n: squared(a, p) - squared(a, n),
    "DistanceDifference": lambda a, p, n: squared(a, p) - squared(a, n),
    "PairDistance positive": lambda a, p, n: squared(a, p) + 0 * n.sum(-1),
    "PairDistance negative": lambda a, p, n: -squared(a, n) + 0 * p.sum(-1),
}


def smooth(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """A user's loss that is above zero everywhere."""
    return F.softplus(2 * (squared(a, p) - squared(a, n)))


def hinged(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """A user's loss with a hinge of its own, not linear in the distances."""
    return torch.relu(squared(a, p).sqrt() - squared(a, n).sqrt() + 0.2)


class Oracle:
    """A float64 copy of a model whose layer can be differentiated."""

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        *,
        l2_normalize: bool = True,
        reshape: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(True)
        self.layer, self.l2_normalize, self.reshape = layer, l2_normalize, reshape

    def run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(activations as the layer gave them, with their graph; embedding [D])."""
        kept = []
        handle = self.model.get_submodule(self.layer).register_forward_hook(
            lambda *given: kept.append(given[2])
        )
        output = self.model(image[None].double())[0]
        handle.remove()
        return kept[0], F.normalize(output, dim=0) if self.l2_normalize else output

    def maps(self, image: Tensor) -> Tensor:
        """[C, H, W]."""
        return self.reshape(self.run(image)[0].detach())[0]

    def weights(
        self,
        image: Tensor,
        partners: Iterable[tuple[Tensor, Tensor]],
        loss: Loss,
        method: str,
        evidence: str,
    ) -> Tensor:
        """[C]: the mean over the triplets (embeddings of positive and negative)."""
        activations, embedding = self.run(image)
        kept = self.reshape(activations.detach())[0]
        each = []
        for positive, negative in partners:
            value = loss(embedding[None], positive[None].double(), negative[None].double())
            (gradient,) = torch.autograd.grad(value.sum(), activations, retain_graph=True)
            each.append(channel_weights(self.reshape(gradient)[0], kept, method, evidence))
        return torch.stack(each).mean(0)


def channel_weights(gradient: Tensor, activation: Tensor, method: str, evidence: str) -> Tensor:
    """[C] of one triplet, as the papers write it."""
    gradient = gradient if evidence == "against" else -gradient
    if method == "gradcam":
        return gradient.mean((1, 2))
    total = activation.sum((1, 2)).clamp(min=0)[:, None, None]
    alpha = gradient**2 / (2 * gradient**2 + total * gradient**3)
    return torch.where(gradient > 0, alpha * gradient, 0.0).sum((1, 2))


def valid_pairs(
    embeddings: Tensor, labels: list[int], row: int, margin: float = math.inf
) -> list[Triple]:
    """Every (positive, negative) of a row with D(a, p) + margin > D(a, n)."""
    rows = range(len(labels))
    positives = [p for p in rows if labels[p] == labels[row] and p != row]
    negatives = [n for n in rows if labels[n] != labels[row]]
    f = embeddings.double()
    return [
        (p, n)
        for p, n in itertools.product(positives, negatives)
        if squared(f[row], f[p]) + margin > squared(f[row], f[n])
    ]


def dense(database: gcfast.Database, channels: int) -> Tensor:
    """The rows' weights, [N, C]; zero for channels that were not kept."""
    weights = torch.zeros(len(database), channels)
    return weights.scatter_(1, database.channels, database.weights)
