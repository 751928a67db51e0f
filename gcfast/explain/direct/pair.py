"""Why two images are close: their cosine, split over the pixels of either.

With f = u / |u| the cosine of q and m is (u_q · f_m) / |u_q|. Where u is linear in the activations
A_p of the layer's places p, as behind global average pooling, that is a sum over the places. For
any head the gradient of u · f_m at A, times A, is such a sum: exact wherever u is homogeneous of
degree one in A (pooling of any power: Euler's theorem), with a constant left over behind a bias,
and a linear model of the head elsewhere. Norms are held fast, |u| and those of layer norms
(:mod:`gcfast.method.held_norms`): through them the gradient has nothing along f, and its products
with the activations sum to nothing.

Source: Stylianou, Souvenir and Pless, "Visualizing deep similarity networks", WACV 2019,
arXiv:1901.00536; Zhu, Yang and Chen, "Visual explanation for deep metric learning",
arXiv:1909.12977.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.explain.direct.toward import checked_vectors, require_width
from gcfast.explain.maps import on_images
from gcfast.explain.result import Finish, MapOptions, PairMaps
from gcfast.method.head import normalized, probe, vjp
from gcfast.method.held_norms import HeldNorms, before_norm
from gcfast.model.capture import Captured
from gcfast.model.network import Network
from gcfast.ops.precision import full_precision


class _Side(NamedTuple):
    """One image of each pair, inside the block of its differentiable pass."""

    captured: Captured
    vector: Tensor  # [B, D], u, with its graph
    unit: Tensor  # [B, D] float32, f

    @classmethod
    def of(cls, stack: ExitStack, network: Network, images: Tensor) -> _Side:
        """Run the pass; its graph is there until the stack is left."""
        with HeldNorms():
            captured = stack.enter_context(network.differentiable(images, finer=True))
        unit = normalized(captured.output.detach(), True)
        check_embeddings(unit, images)
        assert captured.leaf is not None
        return cls(captured, before_norm(captured.output, captured.leaf), unit)

    def pulled_back(self, network: Network, target: Tensor) -> Tensor:
        """The gradient [B, C, H, W] of f · target by the activations, |u| held fast."""
        norms = self.vector.detach().float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        return vjp(network, self.captured, self.vector, target / norms).float()


class _Split(NamedTuple):
    """A cosine over the places of one image."""

    maps: Tensor  # [B, OH, OW]
    parts: Tensor  # [B, H, W]
    rest: Tensor  # [B]


def pair_maps(
    network: Network,
    query: Tensor,
    match: Tensor,
    unlike: Tensor | None,
    mean_activation: Callable[[], Tensor],
    options: MapOptions,
    *,
    spread_rest: bool,
    correspondence: bool,
) -> PairMaps:
    """Split the cosines of pairs over the places of either image.

    Args:
        network: the model.
        query: [B, 3, h, w].
        match: [B, 3, h', w'].
        unlike: images [B, 3, h'', w''], vectors [D] or [B, D], or None.
        mean_activation: gives [C], which ``center`` needs.
        options: of the maps.
        spread_rest: keep in the maps what has no place, spread evenly.
        correspondence: also split them over pairs of places.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as :meth:`gcfast.Explainer.explain_pair`.
    """
    named = {"query": query, "match": match}
    vectors = isinstance(unlike, Tensor) and unlike.ndim < 3
    if unlike is not None and not vectors:
        named["unlike"] = unlike
    named = {name: network.checked(name, images) for name, images in named.items()}
    if len({len(images) for images in named.values()}) > 1:
        names = ["`" + name + "`" for name in named]
        raise ValueError(
            f"{', '.join(names[:-1])} and {names[-1]} must have the same B, got "
            + ", ".join(str(len(images)) for images in named.values())
        )
    images = [named["query"], named["match"]]
    finishes = [Finish.checked(i, **options) for i in images]
    mean = mean_activation() if finishes[0].center != 0 else None
    if len(images[0]) == 0:
        maps = [torch.zeros((0, *finish.size), device=images[0].device) for finish in finishes]
        none, parts = maps[0].new_zeros(0), maps[0].new_zeros((0, 0, 0))
        between = maps[0].new_zeros((0,) * 5) if correspondence else None
        return PairMaps(maps[0], maps[1], none, parts, parts, none, none, between)
    against = images[0].new_zeros((), dtype=torch.float32)
    if vectors:
        against = checked_vectors("unlike", unlike, images[0])
    elif unlike is not None:
        output = network.embed(named["unlike"]).output
        check_embeddings(output, named["unlike"])
        against = normalized(output, True)
    with ExitStack() as stack:
        one, other = (_Side.of(stack, network, i) for i in images)
        if vectors:
            require_width("unlike", against, one.unit)
        first = _split(network, one, other.unit - against, finishes[0], mean, spread_rest)
        second = _split(network, other, one.unit - against, finishes[1], mean, spread_rest)
        between = None
        if correspondence:
            between = _between(_places(network, one, images[0]), _places(network, other, images[1]))
    return PairMaps(
        query=first.maps,
        match=second.maps,
        similarity=(one.unit * other.unit).sum(1),
        query_parts=first.parts,
        match_parts=second.parts,
        query_rest=first.rest,
        match_rest=second.rest,
        correspondence=between,
    )


def _split(
    network: Network,
    own: _Side,
    target: Tensor,
    finish: Finish,
    mean: Tensor | None,
    spread_rest: bool,
) -> _Split:
    """Split f · target over the places."""
    activations = own.captured.activations.detach().float()
    gradient = own.pulled_back(network, target)
    products = (gradient * activations).sum(1)  # [B, H, W]
    rest = (own.unit * target).sum(1) - products.sum((1, 2))
    parts = products + rest[:, None, None] / products[0].numel()
    shown = parts if spread_rest else products
    if finish.center != 0:
        assert mean is not None
        usual = (gradient * mean.to(gradient.device)[:, None, None]).sum(1)
        shown = shown - finish.center * usual
    cam = on_images(ops.dense_cam, own.captured.share, own.captured.finer)
    one = shown.new_ones((len(shown), 1))
    return _Split(cam(shown[:, None], one, **finish.of_dense()), parts, rest)


def _places(network: Network, side: _Side, images: Tensor) -> Tensor:
    """Return vectors [B, H, W, D] that sum to f; what has no place is spread evenly."""
    activations = side.captured.activations.detach().float()
    H, W = activations.shape[2:]
    head = probe(network, images, True)
    if head is not None:
        norms = head.project(activations.mean((2, 3)))[1]
        with full_precision(activations.device):
            each = torch.einsum("dc,bchw->bhwd", head.weight, activations)
        each = each / (H * W * norms[:, None, None, None])
    else:
        # The Jacobian, one row after the other: it would not fit into memory at once.
        columns = []
        for number in range(side.unit.shape[1]):
            target = torch.zeros_like(side.unit)
            target[:, number] = 1
            columns.append((side.pulled_back(network, target) * activations).sum(1))
        each = torch.stack(columns, 3)
    rest = side.unit - each.sum((1, 2))
    return each + rest[:, None, None] / (H * W)


def _between(query: Tensor, match: Tensor) -> Tensor:
    """Return the products [B, H, W, H', W'] of vectors [B, H, W, D] and [B, H', W', D]."""
    with full_precision(query.device):
        return torch.einsum("bhwd,bijd->bhwij", query, match)
