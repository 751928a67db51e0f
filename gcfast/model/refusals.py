"""Models that cannot be explained, or not without more being said, and why."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from gcfast.errors import UnsupportedModelError
from gcfast.model.layers import Candidate

QUANTIZED = "modules of the model are quantized, and integers have no gradient"


def check_model_runs(model: nn.Module) -> None:
    """Refuse a model whose hooks do not run, or that cannot be called with images alone.

    Raises:
        TypeError: it takes more arguments than one, or keywords alone.
        UnsupportedModelError: a compiled or scripted model, or a graph of torch.export.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"`model` must not be scripted, got a ScriptModule at {name or 'the top'!r}: "
                "hooks do not run in it; give the original module"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(
                f"`model` must not be compiled in place, got Module.compile() at "
                f"{name or 'the top'!r}: hooks do not run in it; give an uncompiled module, or "
                "torch.compile(model), which can be unwrapped"
            )
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise UnsupportedModelError(
                f"`model` must not have compiled parts, got torch.compile() at {name!r}: hooks "
                "do not run in it; give a model of uncompiled modules"
            )
    _check_inputs(model)


def _check_inputs(model: nn.Module) -> None:
    """Refuse a model that cannot be called with images alone, or whose modules do not run.

    Raises:
        TypeError: it takes more arguments than one, or keywords alone.
        UnsupportedModelError: a graph of torch.export.
    """
    if isinstance(model, torch.fx.GraphModule):
        run = {node.target for node in model.graph.nodes if node.op == "call_module"}
        if not run - {"_guards_fn"}:
            raise UnsupportedModelError(
                "`model` must run its modules, got a graph of operations without any, as "
                "torch.export makes it: give the module that it was made from, or "
                "torch.export.unflatten(program)"
            )
    if type(model).__call__ is not nn.Module.__call__:
        return
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a built-in
        return
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"`model` must take images as its one argument, got forward{signature}: give a module "
            "whose forward(images) calls it, as the how-to on layers shows"
        ) from None


def no_default(model: nn.Module, found: Sequence[Candidate]) -> ValueError:
    """Why no layer of a model is explained by default, and what to do."""
    listed = ", ".join(f"{c.name!r} {list(c.shape)}" for c in found[-5:])
    if is_quantized(model):
        why = f"{QUANTIZED}; give the model that it was made from"
    elif not found:
        why = (
            "no layer of the model has an output [B, C, H, W], [B, H, W, C] or tokens [B, P, C] "
            "that lies on the image; name one, and give `reshape` for it"
        )
    elif not any(one.reached for one in found):
        why = (
            "the embedding has no gradient at any layer (the model detaches it, or runs without "
            f"gradients); layers seen: {listed}"
        )
    else:
        why = (
            "the image reaches the embedding past the last ones, as where branches, or the "
            "features of two views, are put together by no module; do that in a module, or name "
            f"the layer to be explained ('NAME@2' is the second run); layers seen: {listed}"
        )
    return ValueError(f"`layer` must be given: {why}")


def is_quantized(model: nn.Module) -> bool:
    """Whether some of a model's modules compute with integers, through which no gradient goes."""
    return any("quantized" in type(module).__module__ for module in model.modules())
