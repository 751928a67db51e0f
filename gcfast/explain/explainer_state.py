"""What an explainer holds: the network, the settings, and the database made ready."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gcfast._checks import require_int
from gcfast.builder.loader import require_images
from gcfast.database.database import Database
from gcfast.errors import ModelMismatchError, NoDatabaseError
from gcfast.explain.calibration import Calibration
from gcfast.explain.cuda_graphs import Graphs
from gcfast.explain.transfer import Transfer, make_transfer
from gcfast.method.objectives import LossFunction, Objective, TripletLoss
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import difference, fingerprint
from gcfast.model.network import Network, Reshape

if TYPE_CHECKING:
    from gcfast.explain.explainer import Explainer


@dataclass(frozen=True)
class Attached:
    """A database made ready on one device; never changed, so threads share it."""

    database: Database
    device: torch.device
    transfer: Transfer
    calibration: Calibration | None

    def confidence(self, distances: Tensor) -> Tensor | None:
        """What is to be expected of maps at distances [B, K] of their rows."""
        return None if self.calibration is None else self.calibration.confidence(distances[:, 0])


class ExplainerState:
    """The part of an :class:`gcfast.Explainer` that its methods share."""

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        database: Database | None = None,
        *,
        objective: Objective | LossFunction | None = None,
        method: str = "gradcam",
        triplets: int | str = 50,
        channels: int | str = 50,
        evidence: str = "for",
        k: int = 1,
        index: Any = "exact",
        l2_normalize: bool = True,
        on_no_triplet: str = "hardest",
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
        seed: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        self.settings = Settings.checked(
            objective=TripletLoss() if objective is None else objective,
            method=method,
            triplets=triplets,
            channels=channels,
            evidence=evidence,
            l2_normalize=l2_normalize,
            on_no_triplet=on_no_triplet,
            seed=seed,
        )
        self.k = require_int("k", k, 1)
        self.index = index
        if not isinstance(cuda_graphs, bool):
            raise TypeError(f"`cuda_graphs` must be a bool, got {cuda_graphs!r}")
        if cuda_graphs and not self._indexed("exact"):
            raise ValueError("`index` must be 'exact' with `cuda_graphs`, which FAISS cannot be in")
        self.network = Network(model, layer, output_key=output_key, reshape=reshape)
        self._graphs = Graphs(self.network.model) if cuda_graphs else None
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._attached: Attached | None = None
        if database is not None:
            self.database = database

    @property
    def layer_name(self) -> str | None:
        """The layer that is explained; None until the first forward pass has found it."""
        return self.network.layer_name

    @property
    def database(self) -> Database | None:
        """The database that explanations rest on. Setting it checks that it is this model's.

        Raises:
            TypeError: not a database.
            ModelMismatchError: built with another model, other weights, layer or normalisation.
        """
        return self._database

    @database.setter
    def database(self, database: Database) -> None:
        if not isinstance(database, Database):
            raise TypeError(
                f"`database` must be a gcfast.Database, got {type(database).__name__}; "
                "gcfast.Database.open reads one"
            )
        manifest = database.manifest
        if self.layer_name is None and not self.network.has_layer(manifest["layer"]):
            raise ModelMismatchError(
                f"the database was built with the layer {manifest['layer']!r}, which the model "
                "lacks"
            )
        differs = difference(manifest["fingerprint"], fingerprint(self.network.model))
        if differs:
            raise ModelMismatchError(
                f"the database was built with another model than this one: {differs}"
            )
        if self.layer_name is not None and manifest["layer"] != self.layer_name:
            raise ModelMismatchError(
                f"the database was built with the layer {manifest['layer']!r}, "
                f"not with {self.layer_name!r}"
            )
        if manifest["settings"]["l2_normalize"] != self.settings.l2_normalize:
            raise ModelMismatchError(
                f"the database was built with l2_normalize={not self.settings.l2_normalize}, "
                f"not with {self.settings.l2_normalize}"
            )
        if self.layer_name is None:
            self.network.set_layer(manifest["layer"])
        self._set_database(database)

    def _set_database(self, database: Database) -> None:
        with self._lock:
            self._database, self._attached = database, None
        database.explainer = weakref.ref(cast("Explainer", self))

    def info(self) -> dict[str, Any]:
        """The layer, the memory format the model is run in, the settings and the database."""
        return {
            "layer": self.layer_name,
            "channels_last": self.network.channels_last,
            "settings": self.settings.describe(),
            "k": self.k,
            "index": self.index if isinstance(self.index, str) else type(self.index).__name__,
            "database": None if self._database is None else repr(self._database),
        }

    def _checked_images(self, name: str, images: Tensor) -> Tensor:
        images = require_images(name, images)
        device = self.network.device(images.device)
        if images.device != device:
            raise ValueError(
                f"`{name}` must be on the model's device, {device}, got {images.device}"
            )
        dtype = self.network.dtype()
        autocast = torch.is_autocast_enabled(images.device.type)
        if dtype is not None and images.dtype != dtype and not autocast:
            wanted, got = (str(d).removeprefix("torch.") for d in (dtype, images.dtype))
            raise TypeError(f"`{name}` must have the model's dtype, {wanted}, got {got}")
        return images

    def _attach(self) -> Attached:
        """The database with its transfer to the model's device; made once."""
        with self._lock:
            database, attached = self._database, self._attached
            if database is None:
                raise NoDatabaseError(
                    "there is no database to explain from: call build(loader), or gcfast.load"
                )
            device = self.network.device(torch.device("cpu"))
            if attached is None or attached.device != device:
                index = database.read_index() if self._indexed("stored") else self.index
                calibration = Calibration.from_manifest(database.manifest)
                attached = self._attached = Attached(
                    database=database,
                    device=device,
                    transfer=make_transfer(database, device, self.k, index),
                    calibration=None if calibration is None else calibration.to(device),
                )
            return attached

    def _indexed(self, how: str) -> bool:
        return isinstance(self.index, str) and self.index == how
