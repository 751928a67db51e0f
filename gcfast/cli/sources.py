"""What the sources of models share: libraries, classifiers that come off, weights from files.

Weights are read as tensors alone: nothing in a file is executed.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gcfast._checks import listed
from gcfast.errors import GcfastError, MissingExtraError
from gcfast.images.named import told
from gcfast.images.preprocessing import Preprocessing

# Where training scripts nest the parameters in what they save, tried in this order.
_NESTS = ("state_dict", "model_state_dict", "model")


class ModelLoadError(GcfastError):
    """The network could not be made, or its weights do not fit it."""


@dataclass(frozen=True)
class LoadedModel:
    """A network and how its source says to use it.

    Attributes:
        module: the network, in eval mode, on the CPU.
        output_key: the key of the embedding if its output is a dict or tuple; else None.
        preprocessing: how its source says that its input must be prepared; None if it does not
            say.
        texts: from texts to their embeddings [n, D] in the space of the images', on the CPU; None
            for a network without a text tower, and where nobody asked for it.
    """

    module: nn.Module
    output_key: str | None = None
    preprocessing: Preprocessing | None = None
    texts: Callable[[Sequence[str]], Tensor] | None = None


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


def load_weights(
    network: nn.Module, path: str | os.PathLike[str], *, ignore: tuple[str, ...] = ()
) -> None:
    """Load parameters and buffers from a file into a network, all of them or none.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) are ignored on both sides. A missing
    ``num_batches_tracked`` is no mismatch: it is a counter, and older checkpoints lack it.

    Args:
        network: changed in place; left alone if anything does not fit.
        path: a ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or a dict that
            holds one as ``state_dict``, ``model_state_dict`` or ``model``.
        ignore: dotted names of parts whose entries in the file are not wanted.

    Raises:
        ModelLoadError: the file is damaged, needs code to be read, or does not fit the network.
    """
    given, own = read_weights(path), network.state_dict()
    # A network may have parts that differ in such a prefix alone; its names are then exact.
    plain = _bare if len({_bare(key) for key in own}) == len(own) else str
    found = {plain(key): value for key, value in given.items()}
    wanted = {plain(key): (key, value) for key, value in own.items()}
    for part in ignore:
        found = {
            key: value
            for key, value in found.items()
            if key in wanted or not key.startswith(part + ".")
        }
    missing = [
        key for key in wanted if key not in found and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in found if key not in wanted]
    shapes = [
        f"{key} {list(found[key].shape)} for {list(wanted[key][1].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key][1].shape
    ]
    faults = [
        f"{len(names)} {what} ({listed(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ModelLoadError(
            f"{os.fspath(path)} does not fit {type(network).__name__}: {'; '.join(faults)}"
        )
    # Not strict for the counters alone: everything else has been compared above.
    network.load_state_dict({wanted[key][0]: value for key, value in found.items()}, strict=False)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or checkpoint, by name, on the CPU.

    Raises:
        ModelLoadError: the file is damaged, needs code to be read, or holds no state dict.
    """
    where = os.fspath(path)
    try:
        if where.endswith(".safetensors"):
            return load_file(where)
        held = torch.load(where, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{where} is no checkpoint or holds more than tensors, and gcfast runs no code from a "
            "checkpoint: save the network's state_dict() alone, or as safetensors"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelLoadError(f"{where} cannot be read: {told(error)}") from error
    while isinstance(held, Mapping):
        nest = next((key for key in _NESTS if isinstance(held.get(key), Mapping)), None)
        if nest is None:
            break
        held = held[nest]
    if not isinstance(held, Mapping) or not held:
        raise ModelLoadError(f"{where} must hold a state dict, got {type(held).__name__}")
    other = [str(key) for key, value in held.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelLoadError(
            f"{where} must hold a state dict, got other things than tensors: {listed(other)}"
        )
    return {str(key): value for key, value in held.items()}


def _bare(key: str) -> str:
    """Remove the prefixes of DataParallel and torch.compile from a parameter's name."""
    key = key.replace("_orig_mod.", "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key
