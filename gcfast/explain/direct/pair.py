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
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.explain.direct.toward import checked_vectors, require_width
from gcfast.explain.maps import on_images
from gcfast.explain.result import Finish, MapOptions, PairMaps
from gcfast.method.head import normalized, vjp
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
    def of(cls, stack: ExitStack, network: Network, images: Tensor, twice: bool) -> _Side:
        """Run the pass; its graph is there until the stack is left.

        Attention has to be the plain one to be differentiated ``twice``.
        """
        with HeldNorms(), sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            captured = stack.enter_context(network.differentiable(images, finer=True))
        unit = normalized(captured.output.detach(), True)
        check_embeddings(unit, images)
        assert captured.leaf is not None
        return cls(captured, before_norm(captured.output, captured.leaf), unit)

    @property
    def norms(self) -> Tensor:
        """|u|, [B, 1] float32."""
        norms: Tensor = torch.linalg.vector_norm(self.vector.detach().float(), dim=1, keepdim=True)
        return norms.clamp(min=1e-12)

    def pulled_back(self, network: Network, target: Tensor) -> Tensor:
        """The gradient [B, C, H, W] of f · target by the activations, |u| held fast."""
        return vjp(network, self.captured, self.vector, target / self.norms).float()


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
        one, other = (_Side.of(stack, network, i, correspondence) for i in images)
        if vectors:
            require_width("unlike", against, one.unit)
        first = _split(network, one, other.unit - against, finishes[0], mean, spread_rest)
        second = _split(network, other, one.unit - against, finishes[1], mean, spread_rest)
        between = None
        if correspondence:
            between = _between(_places(network, one), _places(network, other))
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


def _places(network: Network, side: _Side) -> Tensor:
    """Return vectors [B, H, W, D] that sum to f; what has no place is spread evenly."""
    activations = side.captured.activations.detach().float()
    each = _by_place(network, side, activations)
    if each is None:
        each = _by_dimension(network, side, activations)
    rest = side.unit - each.sum((1, 2))
    return each + rest[:, None, None] / each[0, ..., 0].numel()


def _by_place(network: Network, side: _Side, activations: Tensor) -> Tensor | None:
    """The Jacobian times the activations of each place, one product a place, [B, H, W, D].

    The gradient of t · f at A is linear in t, so its own gradient by t is the product. None where
    that takes more products than there are dimensions, or the model cannot be differentiated twice.
    """
    leaf = side.captured.leaf
    H, W = activations.shape[2:]
    assert leaf is not None
    if side.unit.shape[1] < H * W:
        return None
    if leaf.dtype == torch.float16:  # whose gradients need a scale each
        return None
    target = torch.zeros_like(side.vector, requires_grad=True)
    (gradient,) = torch.autograd.grad(side.vector, leaf, target, create_graph=True)
    arranged = network.arranged(gradient, side.captured.image_size)
    products = (arranged * activations.to(arranged.dtype)).sum(1).flatten(1).sum(0)  # [H W]
    try:
        columns = [
            torch.autograd.grad(product, target, retain_graph=True)[0].float()
            for product in products
        ]
    except RuntimeError:
        return None
    each = torch.stack(columns, 1) / side.norms[:, None]  # [B, H W, D]
    return each.reshape(len(each), H, W, -1)


def _by_dimension(network: Network, side: _Side, activations: Tensor) -> Tensor:
    """The same, one product a dimension: the whole Jacobian would not fit into memory."""
    columns = []
    for number in range(side.unit.shape[1]):
        target = torch.zeros_like(side.unit)
        target[:, number] = 1
        columns.append((side.pulled_back(network, target) * activations).sum(1))
    return torch.stack(columns, 3)


def _between(query: Tensor, match: Tensor) -> Tensor:
    """Return the products [B, H, W, H', W'] of vectors [B, H, W, D] and [B, H', W', D]."""
    with full_precision(query.device):
        return torch.einsum("bhwd,bijd->bhwij", query, match)
