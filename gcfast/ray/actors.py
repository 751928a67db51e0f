"""What actors do with batches: embed, and explain."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import gcfast
from gcfast._checks import require_choice
from gcfast.builder.loader import check_embeddings, on_device
from gcfast.database.manifest import read_manifest
from gcfast.explain.result import MapOptions
from gcfast.images.preprocessing import Preprocessing
from gcfast.method.head import normalized
from gcfast.ray.pictures import ERROR, VIEW, Batch, Prepare, Prepared, spread, texts

Model = nn.Module | Callable[[], nn.Module]

MAPS = {"uint8": np.uint8, "float16": np.float16, "float32": np.float32}


class PictureActor:
    """A network on the actor's device, and pictures for it."""

    def __init__(self, prepare: Prepare, device: str | torch.device | None) -> None:
        self.prepare = prepare
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def placed(self, model: Model) -> nn.Module:
        """Make the network and put it on the device."""
        return (model if isinstance(model, nn.Module) else model()).to(self.device)

    def read(self, batch: Batch) -> tuple[Batch, Tensor, NDArray[np.bool_]]:
        """Return the other columns, images for the network, and which of the rows they are.

        Where no picture can be read, the images are one that stands for none.
        """
        if VIEW not in batch:
            batch = self.prepare(batch)
        views, good = batch[VIEW], np.asarray(batch[ERROR] == "")
        rest = {name: column for name, column in batch.items() if name != VIEW}
        return rest, self.prepare.normalized(views[good] if good.any() else views[:1]), good


class Embed(PictureActor):
    """Embeddings of pictures, for ``Dataset.map_batches`` with a pool of actors.

    A batch loses the column of pictures and gets ``embedding`` (float32 [n, D]), and ``error`` and
    ``doubt`` as :class:`Prepare` has them; an unreadable picture's embedding is NaN.

    Args:
        model: the network, or a function without arguments that makes it; the function is what
            actors of large models are better given.
        layer: as for :class:`gcfast.Explainer`.
        preprocessing: as for :class:`Prepare`.
        image: the column of pictures; not needed where :class:`Prepare` went before.
        strict: raise for a picture that cannot be read.
        device: of the network; None for the actor's GPU, if it has one.
        l2_normalize: normalize the network's output.
        **settings: ``output_key`` and ``reshape`` of :class:`gcfast.Explainer`.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as :class:`gcfast.Explainer`.
        UnreadableImageError: as :class:`Prepare`.
    """

    def __init__(
        self,
        model: Model,
        layer: str | None = None,
        *,
        preprocessing: Prepared,
        image: str = "image",
        strict: bool = False,
        device: str | torch.device | None = None,
        l2_normalize: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(Prepare(preprocessing, image=image, strict=strict), device)
        settings["l2_normalize"] = self.l2_normalize = l2_normalize
        self.network = gcfast.Explainer(self.placed(model), layer, **settings).network

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with embeddings in place of pictures."""
        rest, images, good = self.read(batch)
        images = on_device(images, self.network)
        embeddings = normalized(self.network.embed(images).output, self.l2_normalize).cpu()
        if good.any():
            check_embeddings(embeddings, images)
        values = embeddings.numpy()[: good.sum()]
        return rest | {"embedding": spread(values, good, np.nan)}


class Explain(PictureActor):
    """Heat maps of pictures, for ``Dataset.map_batches`` with a pool of actors.

    A batch loses the column of pictures and gets

    - ``map``, [n, OH, OW]: of "uint8" 255 is 1;
    - ``neighbor`` (its id), ``neighbor_row``, ``distance`` and ``label`` (its name) of the nearest
      row; "", -1, NaN and "" where there is none;
    - ``flat``: whether the map is zero everywhere;
    - ``confidence``, NaN without a calibration;
    - ``error`` and ``doubt``, as :class:`Prepare` has them. An unreadable picture has a map of
      zeros.

    Args:
        model: as for :class:`Embed`.
        database: its folder, which every node sees.
        preprocessing: as for :class:`Prepare`; None for what the database was built with.
        image: the column of pictures; not needed where :class:`Prepare` went before.
        maps: "uint8", "float16" or "float32".
        strict: raise for a picture that cannot be read.
        device: of the network; None for the actor's GPU, if it has one.
        options: ``size``, ``normalize``, ``relu`` and ``center``; see
            :class:`gcfast.explain.result.MapOptions`.
        **settings: as for :func:`gcfast.load`.

    Raises:
        TypeError, ValueError: an argument out of range; maps that "uint8" cannot hold; a database
            that does not say how its pictures were prepared.
        GcfastError: as :func:`gcfast.load`.
        UnreadableImageError: as :class:`Prepare`.
    """

    def __init__(
        self,
        model: Model,
        database: str | os.PathLike[str],
        *,
        preprocessing: Prepared | None = None,
        image: str = "image",
        maps: str = "uint8",
        strict: bool = False,
        device: str | torch.device | None = None,
        options: MapOptions | None = None,
        **settings: Any,
    ) -> None:
        self.options: MapOptions = {} if options is None else options
        self.maps = check_maps(maps, self.options)
        kept = read_manifest(Path(database)).get("preprocessing") or {}
        if preprocessing is None:
            preprocessing = stored_preprocessing(kept)
        super().__init__(Prepare(preprocessing, image=image, strict=strict), device)
        if kept.get("tokens") is not None:
            settings.setdefault("reshape", gcfast.TokenGrid(prefix=kept["tokens"]))
        self.explainer = gcfast.load(database, self.placed(model), **settings)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with maps in place of pictures."""
        rest, images, good = self.read(batch)
        images = on_device(images, self.explainer.network)
        why = self.explainer.explain_batch(images, details=True, **self.options)
        database = self.explainer.database
        assert database is not None
        near = why.neighbors[:, 0].cpu()
        distances = torch.where(near >= 0, why.distances[:, 0].cpu(), torch.nan)
        confidence = distances * torch.nan if why.confidence is None else why.confidence.cpu()
        maps = why.maps.cpu()
        if self.maps == "uint8":
            maps = maps.mul(255).round_().to(torch.uint8)
        columns: dict[str, tuple[NDArray[Any], Any]] = {
            "map": (maps.numpy().astype(MAPS[self.maps], copy=False), 0),
            "neighbor": (texts([database.ids[row] if row >= 0 else "" for row in near]), ""),
            "neighbor_row": (near.numpy(), -1),
            "distance": (distances.float().numpy(), np.nan),
            "label": (texts([names[0] for names in why.label_names]), ""),
            "flat": (why.flat.cpu().numpy(), True),
            "confidence": (confidence.float().numpy(), np.nan),
        }
        n = good.sum()
        return rest | {name: spread(v[:n], good, fill) for name, (v, fill) in columns.items()}


def stored_preprocessing(kept: dict[str, Any]) -> Preprocessing:
    """Return how a database says that its pictures were prepared.

    Args:
        kept: of its manifest.

    Raises:
        ValueError: it does not say.
    """
    if not kept:
        raise ValueError(
            "`preprocessing` must be given: the database does not say how its pictures were "
            "prepared"
        )
    return Preprocessing.from_dict(kept)


def check_maps(maps: str, options: MapOptions) -> str:
    """Return the dtype of maps; raises ValueError for one that cannot hold them."""
    require_choice("maps", maps, tuple(MAPS))
    if maps == "uint8" and (options.get("normalize", "max") is None or not options.get("relu", 1)):
        raise ValueError(
            "`maps` must be 'float32' or 'float16' for maps that are raw or signed, got 'uint8'"
        )
    return maps
