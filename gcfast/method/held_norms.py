"""Norms that are held fast, so that gradients times activations add up to what they explain.

What is divided by its own norm does not change with its length, so its gradient has nothing along
itself, and what brings two vectors close lies just there. With the norm as a constant the division
is linear. The same holds for the deviation that a layer norm divides by.

Source: Ali et al., "XAI for transformers: better explanations through conservative propagation",
ICML 2022, arXiv:2202.07304, for layer norms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gcfast.errors import UnsupportedModelError

NODES = 12  # of the graph that are looked at behind a vector: a norm and its division are five
SAVED = ("_saved_self", "_saved_other")  # what divisions, products and norms keep of their inputs
# By how much unit vectors may differ to be the same, by the precision of the model.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class HeldNorms(TorchFunctionMode):
    """Layer and RMS norms inside the block have deviations without a gradient.

    Their values stay as they are. Only norms of what requires a gradient are touched.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of PyTorch, or its stand-in."""
        del types
        kwargs = kwargs or {}
        held = _HELD.get(func)
        first = args[0] if args else kwargs.get("input")
        if held is None or not isinstance(first, Tensor) or not first.requires_grad:
            return func(*args, **kwargs)
        return held(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    centered = wide - wide.mean(axes, keepdim=True)
    deviation = (centered.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(centered * deviation, input, weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    size = (wide.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(wide * size, input, weight, None)


def _affine(values: Tensor, like: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    values = values if weight is None else values * weight
    values = values if bias is None else values + bias
    # Under autocast a layer norm gives float32.
    wide = torch.is_autocast_enabled(like.device.type)
    return values.to(torch.float32 if wide and like.dtype != torch.float64 else like.dtype)


_HELD: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}


def before_norm(output: Tensor, leaf: Tensor) -> Tensor:
    """Return u where the model's output is u / |u|, times any factor; else the output.

    Args:
        output: [B, D], with a graph that begins at ``leaf``.
        leaf: the layer's output, [B, …].

    Returns:
        [B, D] in the same graph, each row a positive multiple of the output's.

    Raises:
        UnsupportedModelError: the output is divided by its norm in a way that the graph does not
            show.
    """
    found = output
    while (before := _proportional(found)) is not None:
        found = before
    if found is output and _forgets_its_norm(output, leaf):
        raise UnsupportedModelError(
            "the model divides its output by its norm in one operation that cannot be looked into: "
            "give the model without it (an Explainer normalizes by itself)"
        )
    return found


def _proportional(vector: Tensor) -> Tensor | None:
    """Return a tensor shortly before ``vector`` whose rows are multiples of its own, if any."""
    if vector.shape[1] < 2:  # any two numbers are multiples of each other
        return None
    unit = F.normalize(vector.detach().double(), dim=1)
    nodes = [vector.grad_fn]
    for node in nodes:  # grows as it is gone through
        for name in SAVED:
            try:
                tensor = getattr(node, name, None)
            except RuntimeError:  # written over since
                continue
            if (
                not isinstance(tensor, Tensor)
                or not tensor.requires_grad
                or tensor.numel() != vector.numel()
                or len(tensor) != len(vector)
                or tensor.grad_fn is vector.grad_fn
            ):
                continue
            other = F.normalize(tensor.detach().flatten(1).double(), dim=1)
            if bool((other - unit).abs().max() <= TOLERANCES[vector.dtype]):
                return tensor.flatten(1)
        if len(nodes) < NODES and node is not None:
            nodes += [following for following, _ in node.next_functions if following is not None]
    return None


def _forgets_its_norm(output: Tensor, leaf: Tensor) -> bool:
    """Whether no change of the layer's output changes the norms of ``output``."""
    norms = output.detach().float().norm(dim=1)
    if bool((norms - norms[0]).abs().max() > TOLERANCES[output.dtype] * norms[0]):
        return False
    (gradient,) = torch.autograd.grad(
        output, leaf, output.detach(), retain_graph=True, allow_unused=True
    )
    if gradient is None:
        return False
    moved = (gradient.double() * leaf.detach().double()).abs().sum()
    return bool(moved <= 1e-3 * norms.double().square().sum())
