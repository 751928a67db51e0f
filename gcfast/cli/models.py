"""From a model named on the command line to a network that gives embeddings.

- ``package.module:function``: the user's own, called without arguments; the working directory is
  searched first.
- ``timm/NAME``: timm, without its classifier.
- ``torchvision/NAME``: torchvision, without its classifier.
- ``hf/NAME``: transformers, the pooled output of AutoModel.

The three libraries are optional and imported only when they are named. Weights from a file are read
as tensors alone; nothing in the file is executed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gcfast._checks import listed
from gcfast.errors import GcfastError, MissingExtraError
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
    """

    module: nn.Module
    output_key: str | None = None
    preprocessing: Preprocessing | None = None


def load_model(spec: str, weights: str | os.PathLike[str] | None = None) -> LoadedModel:
    """Make the network that ``spec`` names.

    Args:
        spec: ``package.module:function``, ``timm/NAME``, ``torchvision/NAME`` or ``hf/NAME``.
        weights: parameters to load, a safetensors file or a checkpoint; then no library fetches its
            own, except for ``hf/``, where NAME also says what the network is.

    Raises:
        ValueError: ``spec`` has none of these forms, or names something that does not exist.
        TypeError: the function does not return a module.
        FileNotFoundError: ``weights`` does not exist.
        MissingExtraError: the library that ``spec`` names is not installed.
        ModelLoadError: making the network fails, or ``weights`` is damaged or does not fit.
    """
    if weights is not None and not os.path.isfile(weights):
        raise FileNotFoundError(f"`weights` must be a file, got {os.fspath(weights)}")
    source, slash, name = spec.partition("/")
    if slash and name and source in _SOURCES:
        loaded, dropped = _SOURCES[source](name, weights is None)
    elif ":" in spec and not slash:
        loaded, dropped = LoadedModel(_from_function(spec)), ()
    else:
        raise ValueError(
            "`model` must be package.module:function, timm/NAME, torchvision/NAME or hf/NAME, "
            f"got {spec!r}"
        )
    if weights is not None:
        load_weights(loaded.module, weights, ignore=dropped)
    loaded.module.eval()
    return loaded


def _from_function(spec: str) -> nn.Module:
    """Call ``package.module:function``."""
    where, _, name = spec.partition(":")
    here = os.getcwd()
    # As with ``python -m``, the user's own files are found as well as the installed packages. The
    # entry stays, since the function may import more later.
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        # The user's module may exist and import one that does not: that is another error.
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise ValueError(
                f"`model` must name a module that can be imported, found no {error.name} in {here} "
                "or among the installed packages"
            ) from error
        raise ModelLoadError(f"importing {where} failed: {_told(error)}") from error
    except Exception as error:
        raise ModelLoadError(f"importing {where} failed: {_told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(name, names) or sorted(names)[:5]
        raise ValueError(
            f"`model` must name a function of {where}, it has no {name or 'empty name'}"
            + (f" (but {', '.join(close)})" if close else "")
        )
    try:
        network = function()
    except Exception as error:
        raise ModelLoadError(f"{spec} failed: {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{spec} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _told(error: BaseException) -> str:
    """Return an error of other code in one line, with the place it came from."""
    text = " ".join(str(error).split()) or "no reason given"
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" ({os.path.basename(last.filename)}, line {last.lineno})" if last else ""
    return f"{type(error).__name__}: {text}{place}"


def _library(name: str, spec: str) -> ModuleType:
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
            f"PyTorch {torch.__version__}: {_told(error)}"
        ) from error


def _called(spec: str, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a library's factory; its failures (an unknown name, a download) become one line."""
    try:
        return function(*args, **settings)
    except Exception as error:
        raise ModelLoadError(f"{spec} failed: {_told(error)}") from error


def _from_timm(name: str, pretrained: bool) -> tuple[LoadedModel, tuple[str, ...]]:
    spec = f"timm/{name}"
    timm = _library("timm", spec)
    network = _called(spec, timm.create_model, name, pretrained=pretrained, num_classes=0)
    config = getattr(network, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    preprocessing = None
    if config.get("input_size") and config.get("mean") and config.get("std"):
        preprocessing = Preprocessing(
            size=int(config["input_size"][-1]), mean=config["mean"], std=config["std"]
        )
    return LoadedModel(network, preprocessing=preprocessing), dropped


def _from_torchvision(name: str, pretrained: bool) -> tuple[LoadedModel, tuple[str, ...]]:
    spec = f"torchvision/{name}"
    models = _library("torchvision.models", spec)
    network = _called(spec, models.get_model, name, weights="DEFAULT" if pretrained else None)
    return LoadedModel(network), strip_classifier(network)


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


def _from_transformers(name: str, pretrained: bool) -> tuple[LoadedModel, tuple[str, ...]]:
    spec = f"hf/{name}"
    transformers = _library("transformers", spec)
    if pretrained:
        network = _called(spec, transformers.AutoModel.from_pretrained, name)
    else:
        config = _called(spec, transformers.AutoConfig.from_pretrained, name)
        network = _called(spec, transformers.AutoModel.from_config, config)
    # A model of images and text (CLIP, SigLIP) needs both; its vision tower is a network of its
    # own.
    tower = getattr(network, "vision_model", None)
    network = tower if isinstance(tower, nn.Module) else network
    return LoadedModel(network, "pooler_output", _hf_preprocessing(transformers, name)), ()


def _hf_preprocessing(transformers: ModuleType, name: str) -> Preprocessing | None:
    """Return the settings of the model's image processor, if ``Preprocessing`` can express them."""
    processor = None
    # A repository without a processor, or one that needs packages that are not installed, is
    # common; the options of the command line then say how images are prepared.
    with contextlib.suppress(Exception):
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    if processor is None or not getattr(processor, "image_mean", None):
        return None
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    if not side:
        return None
    crop = getattr(processor, "do_center_crop", False)
    return Preprocessing(
        size=int(side),
        resize="crop" if crop else "stretch",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


_SOURCES: dict[str, Callable[[str, bool], tuple[LoadedModel, tuple[str, ...]]]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_transformers,
}


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
        raise ModelLoadError(f"{where} cannot be read: {_told(error)}") from error
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
