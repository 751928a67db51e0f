"""What the sources of models have in common."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gcfast.cli.weights import ModelLoadError
from gcfast.errors import MissingExtraError
from gcfast.images.named import told
from gcfast.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class LoadedModel:
    """A network and how its source says to use it.

    Attributes:
        module: the network, in eval mode, on the CPU.
        output_key: the key of the embedding if its output is a dict or tuple; else None.
        preprocessing: how its source says that its input must be prepared; None if it does not
            say.
    """

    module: nn.Module
    output_key: str | None = None
    preprocessing: Preprocessing | None = None


def library(name: str, spec: str) -> ModuleType:
    """Import an optional library.

    Raises:
        MissingExtraError: it is not installed, or does not fit the installed PyTorch.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"`{spec}` needs the package {name}, which is not installed: pip install {name}"
        ) from error
    except RuntimeError as error:
        # torchvision built for another PyTorch (a CPU-only one, say) fails while registering.
        raise MissingExtraError(
            f"`{spec}` needs the package {name}, and the one installed does not work with "
            f"PyTorch {torch.__version__}: {told(error)}"
        ) from error


def called(spec: str, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a library's factory; its failures (an unknown name, a download) become one line."""
    try:
        return function(*args, **settings)
    except Exception as error:
        raise ModelLoadError(f"{spec} failed: {told(error)}") from error


def strip_classifier(network: nn.Module) -> tuple[str, ...]:
    """Remove the classifier of a torchvision network in place: its output is then an embedding.

    The last linear layer of the classifier becomes the identity; normalization, flattening and, in
    VGG, AlexNet and MobileNetV3, the hidden layer before it stay. A convolutional classifier
    (SqueezeNet) becomes global average pooling.

    Args:
        network: a network with a submodule ``fc``, ``classifier``, ``heads`` or ``head``.

    Returns:
        Dotted names of the parts removed.

    Raises:
        ModelLoadError: it has none of them, or no linear layer in it.
    """
    for name in ("fc", "classifier", "heads", "head"):
        part = getattr(network, name, None)
        if not isinstance(part, nn.Module):
            continue
        linear = [n for n, m in part.named_modules(prefix=name) if isinstance(m, nn.Linear)]
        if linear:
            parent, _, last = linear[-1].rpartition(".")
            setattr(network.get_submodule(parent), last, nn.Identity())
            return (linear[-1],)
        if any(isinstance(m, nn.Conv2d) for m in part.modules()):
            setattr(network, name, nn.AdaptiveAvgPool2d(1))
            return (name,)
    raise ModelLoadError(
        f"{type(network).__name__} has no classifier that can be removed (a linear layer in fc, "
        "classifier, heads or head); give a function, package.module:function, that returns the "
        "network as you want it"
    )


def share_of(side: int, scaled: int) -> float:
    """Return the ``crop_pct`` for a cut of ``side`` pixels out of a side scaled to ``scaled``."""
    share = side / scaled
    while math.floor(side / share) < scaled:  # by a rounding error
        share = math.nextafter(share, 0)
    return share
