"""From a model named on the command line to a network that gives embeddings.

- ``package.module:function``: the user's own, called without arguments; the working directory is
  searched first.
- ``timm/NAME``: timm, without its classifier.
- ``torchvision/NAME``: torchvision, without its classifier.
- ``hf/NAME``: transformers, see :mod:`gcfast.cli.hf`.

The three libraries are optional and imported only when they are named. Each says how pictures are
prepared for its networks. Weights from a file are read as tensors alone; nothing in the file is
executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from gcfast.cli.hf import from_transformers
from gcfast.cli.sources import (
    LoadedModel,
    ModelLoadError,
    called,
    library,
    load_weights,
    read_weights,
    share_of,
    strip_classifier,
)
from gcfast.images.named import NamedFunctionError, named_function, told
from gcfast.images.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    Preprocessing,
)

__all__ = [
    "LoadedModel",
    "ModelLoadError",
    "load_model",
    "load_weights",
    "read_weights",
    "strip_classifier",
]

Path = str | os.PathLike[str]


def load_model(
    spec: str, weights: Path | None = None, pool: str | None = None, *, texts: bool = False
) -> LoadedModel:
    """Make the network that ``spec`` names.

    Args:
        spec: ``package.module:function``, ``timm/NAME``, ``torchvision/NAME`` or ``hf/NAME``.
        weights: parameters to load, a safetensors file or a checkpoint; then no library fetches its
            own, except for ``hf/``, where NAME also says what the network is.
        pool: for ``hf/``: "class" takes the class token as the embedding, "mean" the mean of the
            patches; None takes what the model itself gives.
        texts: for ``hf/``: keep the text tower, where there is one.

    Raises:
        ValueError: ``spec`` has none of these forms, or names something that does not exist;
            ``pool`` is given for another source than ``hf/``.
        TypeError: the function does not return a module.
        FileNotFoundError: ``weights`` does not exist.
        MissingExtraError: the library that ``spec`` names is not installed.
        ModelLoadError: making the network fails, or ``weights`` is damaged or does not fit.
    """
    if weights is not None and not os.path.isfile(weights):
        raise FileNotFoundError(f"`weights` must be a file, got {os.fspath(weights)}")
    source, slash, name = spec.partition("/")
    if pool is not None and source != "hf":
        raise ValueError(f"`pool` must be left out with a model that is not hf/NAME, got {spec!r}")
    if source == "hf" and name:
        loaded = from_transformers(name, weights, pool, texts)
    elif source == "timm" and name:
        loaded = _from_timm(name, weights)
    elif source == "torchvision" and name:
        loaded = _from_torchvision(name, weights)
    elif ":" in spec and not slash:
        network = _from_function(spec)
        if weights is not None:
            load_weights(network, weights)
        loaded = LoadedModel(network, preprocessing=_timm_preprocessing(network))
    else:
        raise ValueError(
            "`model` must be package.module:function, timm/NAME, torchvision/NAME or hf/NAME, "
            f"got {spec!r}"
        )
    loaded.module.eval()
    return loaded


def _from_function(spec: str) -> nn.Module:
    """Call ``package.module:function``."""
    try:
        function = named_function(spec, "model")
    except NamedFunctionError as error:
        raise ModelLoadError(str(error)) from error
    try:
        network = function()
    except Exception as error:
        raise ModelLoadError(f"{spec} failed: {told(error)}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{spec} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _from_timm(name: str, weights: Path | None) -> LoadedModel:
    spec = f"timm/{name}"
    create = library("timm", spec).create_model
    network = called(spec, create, name, pretrained=weights is None, num_classes=0)
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    if weights is not None:
        dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        load_weights(network, weights, ignore=dropped)
    return LoadedModel(network, preprocessing=_timm_preprocessing(network))


def _timm_preprocessing(network: nn.Module) -> Preprocessing | None:
    """Return what timm's configuration of a network says; None for a network of no such source.

    Source: timm.data.resolve_data_config, with its defaults.
    """
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return None
    fits = {"squash": "stretch", "border": "pad"}
    interpolation = config.get("interpolation")
    return Preprocessing(
        size=(int(config["input_size"][-2]), int(config["input_size"][-1])),
        resize=fits.get(str(config.get("crop_mode")), "crop"),
        mean=config.get("mean") or IMAGENET_MEAN,
        std=config.get("std") or IMAGENET_STD,
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bicubic",
        crop_pct=float(config.get("crop_pct") or 0.875),
    )


def _from_torchvision(name: str, weights: Path | None) -> LoadedModel:
    spec = f"torchvision/{name}"
    models = library("torchvision.models", spec)
    network = called(spec, models.get_model, name, weights="DEFAULT" if weights is None else None)
    dropped = strip_classifier(network)
    if weights is not None:
        load_weights(network, weights, ignore=dropped)
    return LoadedModel(network, preprocessing=_torchvision_preprocessing(models, name))


def _torchvision_preprocessing(models: Any, name: str) -> Preprocessing | None:
    """Return what the default weights of a network say; None where they do not, or there are none.

    Nothing is fetched: the settings are part of torchvision.
    """
    try:
        preset = models.get_model_weights(name).DEFAULT.transforms()
        (side,), (scaled,) = preset.crop_size, preset.resize_size
        return Preprocessing(
            size=side,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
            crop_pct=share_of(side, scaled),
        )
    except (AttributeError, TypeError, ValueError):
        return None
