"""Networks of transformers, by the name or folder of a checkpoint: ``hf/NAME``.

The embedding is what the checkpoint was trained to give: of an image classifier what its last
linear layer sees, of a model of images and text (CLIP, SigLIP) the projected image embedding, of
any other the pooled output. Where a part of the network would be left random, it is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gcfast._checks import listed
from gcfast.cli.sources import (
    LoadedModel,
    ModelLoadError,
    called,
    library,
    read_weights,
    share_of,
    strip_classifier,
)
from gcfast.images.preprocessing import INTERPOLATIONS, Preprocessing

# Parts of a model of images and text that the image does not reach.
_OTHER_TOWER = ("text_", "logit_", "txt_")
_PROJECTIONS = ("visual_projection", "vision_projection", "vision_proj")
_CONFIG = "preprocessor_config.json"


class ImageTower(nn.Module):
    """The image half of a model of images and text: pixel values → projected embedding [B, D]."""

    def __init__(self, vision_model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.projection = vision_model, projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, h, w]."""
        projected: Tensor = self.projection(self.vision_model(pixel_values).pooler_output)
        return projected


class Pooled(nn.Module):
    """A backbone whose embedding is its class token, or the mean of its patches."""

    def __init__(self, backbone: nn.Module, pool: str) -> None:
        super().__init__()
        self.backbone, self.pool = backbone, pool
        if getattr(backbone, "pooler", None) is not None:
            setattr(backbone, "pooler", None)  # noqa: B010 - its type is a module

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, h, w].

        Raises:
            ValueError: a class token of a backbone that has none.
        """
        tokens: Tensor = self.backbone(pixel_values).last_hidden_state
        if tokens.ndim == 4:  # [B, C, H, W]
            tokens = tokens.flatten(2).transpose(1, 2)
            patches = tokens.shape[1]
        else:
            side = getattr(self.backbone.config, "patch_size", 1)
            height, width = (side, side) if isinstance(side, int) else side
            h, w = pixel_values.shape[-2:]
            patches = min(tokens.shape[1], (h // height) * (w // width))
        if self.pool == "mean":
            return tokens[:, -patches:].mean(1)
        if patches == tokens.shape[1]:
            raise ValueError('`pool` must be "mean" for a model without a class token')
        return tokens[:, 0]


class TextTower:
    """The text half of a model of images and text: texts → projected embeddings [n, D]."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, on the CPU; what is too long is cut off."""
        config = self.network.config.get_text_config()
        tokens = self.tokenizer(
            list(texts),
            # SigLIP was trained on texts of one length, and has no mask for what is filled in.
            padding="max_length" if "siglip" in config.model_type else True,
            truncation=True,
            max_length=config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            found = self.network.get_text_features(**tokens)
        embeddings: Tensor = getattr(found, "pooler_output", found)
        return embeddings


def from_transformers(
    name: str, weights: str | os.PathLike[str] | None, pool: str | None, texts: bool = False
) -> LoadedModel:
    """Make the network of a checkpoint; raises as :func:`gcfast.cli.models.load_model`."""
    spec = f"hf/{name}"
    transformers = library("transformers", spec)
    config = called(spec, transformers.AutoConfig.from_pretrained, name)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    auto = transformers.AutoModel
    classifier = "ForImageClassification" in architecture and pool is None
    if classifier:
        auto = transformers.AutoModelForImageClassification
    elif architecture.endswith("VisionModelWithProjection") and pool is None:
        auto = getattr(transformers, architecture)
    settings: dict[str, Any] = {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, unless it is the classifier
    }
    source: str | None = name
    if weights is not None:
        # The library's own loader: it knows the names that parameters had in earlier versions.
        source, settings["config"], settings["state_dict"] = None, config, read_weights(weights)
        if hasattr(auto, "from_config"):
            with torch.device("meta"):
                auto = type(called(spec, auto.from_config, config))
    network, found = called(spec, auto.from_pretrained, source, **settings)
    dropped = strip_classifier(network) if classifier else ()
    loaded = _embedding(network, architecture, classifier, pool)
    random = [
        key if isinstance(key, str) else key[0]
        for key in (*found["missing_keys"], *found["mismatched_keys"])
    ]
    what = spec if weights is None else os.fspath(weights)
    tower = None
    if texts and pool is None and hasattr(network, "get_text_features"):
        tokenizer = called(spec, transformers.AutoTokenizer.from_pretrained, name)
        tower = TextTower(network, tokenizer)
    _refuse_random(
        what, network, random, (*dropped, *_not_used(network, loaded.module, tower is not None))
    )
    loaded = replace(loaded, texts=tower)
    return replace(loaded, preprocessing=_preprocessing(transformers, name, weights))


def _embedding(
    network: nn.Module, architecture: str, classifier: bool, pool: str | None
) -> LoadedModel:
    """Return the module that gives the embedding, and where it is in its output."""
    tower = getattr(network, "vision_model", network)
    if classifier:
        return LoadedModel(network, "logits")
    if architecture.endswith("VisionModelWithProjection") and pool is None:
        return LoadedModel(network, "image_embeds")
    if not isinstance(getattr(network, "text_model", None), nn.Module):
        tower = network
    assert isinstance(tower, nn.Module)
    if pool is not None:
        return LoadedModel(Pooled(tower, pool))
    if tower is network:
        return LoadedModel(network, "pooler_output")
    projections = [getattr(network, name, None) for name in _PROJECTIONS]
    projection = next((p for p in projections if isinstance(p, nn.Module)), None)
    if projection is None:  # SigLIP: the tower's own head is the projection
        return LoadedModel(tower, "pooler_output")
    return LoadedModel(ImageTower(tower, projection))


def _not_used(network: nn.Module, module: nn.Module, texts: bool) -> tuple[str, ...]:
    """Return the beginnings of the parameters' names that no embedding uses."""
    if module is network:
        return ()
    other = ("logit_",) if texts else _OTHER_TOWER
    return (*other, "pooler.", "vision_model.pooler.")


def _refuse_random(
    what: str, network: nn.Module, missing: Iterable[str], unused: tuple[str, ...]
) -> None:
    """Raise ModelLoadError where parameters that matter are missing, or are of another shape."""
    random = sorted(key for key in missing if not key.startswith(unused))
    if not random:
        return
    if all("pooler." in key for key in random):
        raise ModelLoadError(
            f"{what} was saved without a pooler, and a random one would give random embeddings: "
            "--pool class takes the class token, --pool mean the mean of the patches"
        )
    raise ModelLoadError(
        f"{what} lacks parameters of {type(network).__name__}, and random ones would give random "
        f"embeddings: {listed(random)}"
    )


def _preprocessing(
    transformers: ModuleType, name: str, weights: str | os.PathLike[str] | None
) -> Preprocessing | None:
    """Return the settings of the model's image processor, if ``Preprocessing`` can express them.

    A ``preprocessor_config.json`` in the folder of ``weights`` comes first.
    """
    beside = None if weights is None else Path(weights).absolute().parent / _CONFIG
    for file in (beside, Path(name) / _CONFIG):
        if file is not None and file.is_file():
            with contextlib.suppress(ValueError):
                return preprocessing_of(json.loads(file.read_text("utf-8")))
    # A repository without a processor, or one that needs packages that are not installed, is
    # common; the options of the command line then say how images are prepared.
    with contextlib.suppress(Exception):
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        described = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
        return preprocessing_of(described)
    return None


def preprocessing_of(settings: Mapping[str, Any]) -> Preprocessing | None:
    """Return what an image processor's settings mean; None where it does something else."""
    if not settings.get("image_mean") and settings.get("do_normalize", True):
        return None
    size, crop = (_sides(settings.get(key)) for key in ("size", "crop_size"))
    cut = settings.get("do_center_crop", False) and crop is not None
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    shortest = isinstance(settings.get("size"), Mapping) and "shortest_edge" in settings["size"]
    if isinstance(settings.get("size"), int):  # as older files have it, whose classes differ
        shortest = kind.startswith("ConvNext") or (cut and not kind.startswith("DeiT"))
    share: float | None = None
    if not settings.get("do_resize", True) or (size is None and not cut):
        return None
    if kind.startswith("ConvNext") and shortest:  # its own rule, by the size
        assert size is not None
        resize, out = ("crop", size) if size[0] < 384 else ("stretch", size)
        share = settings.get("crop_pct") or 224 / 256 if resize == "crop" else None
    elif cut:
        assert crop is not None
        resize, out = ("crop" if shortest or size is None else "stretch"), crop
        scaled = size or crop
        if scaled[0] < out[0] or scaled[1] < out[1]:
            return None
        share = share_of(min(out), min(scaled))
    elif shortest:
        return None  # pictures of many shapes
    else:
        assert size is not None
        resize, out = "stretch", size
    # x · factor, less an offset, then the mean and the deviation: all in units of [0, 1].
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    offset = 1 if settings.get("rescale_offset") else 0
    normal = settings.get("do_normalize", True)
    mean = [(m + offset) / (255 * factor) for m in (settings["image_mean"] if normal else (0,) * 3)]
    std = [s / (255 * factor) for s in (settings["image_std"] if normal else (1,) * 3)]
    way = settings.get("resample", 2)
    names = {int(Image.Resampling[name.upper()]): name for name in INTERPOLATIONS}
    return Preprocessing(
        size=out,
        resize=resize,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=names.get(way, "bilinear"),
        crop_pct=share,
    )


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (H, W) of a size as image processors write it."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        height, width = size.get("height", side), size.get("width", side)
        if height and width:
            return int(height), int(width)
    return None
