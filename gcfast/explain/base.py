"""What every call of an explainer rests on: the model, the settings and the attached database."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcfast._checks import require_int
from gcfast.builder.given.on_demand import OnDemandDatabase
from gcfast.database.database import Database
from gcfast.errors import NoDatabaseError
from gcfast.explain.attached import Attached, Passed, check_database
from gcfast.explain.cuda_graphs import Graphs
from gcfast.explain.result import Finish, MapOptions
from gcfast.explain.second_look import SecondLook
from gcfast.method.objectives import LossFunction, Objective, TripletLoss
from gcfast.method.settings import Settings
from gcfast.method.tail import Tail
from gcfast.model.finer import Refine
from gcfast.model.network import Network
from gcfast.model.tokens import Reshape
from gcfast.search.transfer import ExactTransfer


class ExplainerBase:
    """The state of an :class:`Explainer`."""

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
        ids: Any = None,
        l2_normalize: bool = True,
        on_no_triplet: str = "hardest",
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
        refine: Refine = None,
        seed: int = 0,
        requery: bool = False,
        cuda_graphs: bool | Literal["auto"] = "auto",
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
        self.ids = ids
        if ids is not None and isinstance(index, str):
            raise ValueError(
                f"`ids` must be left out with index={index!r}, which numbers rows as the database "
                "does: they are for a faiss.Index of your own"
            )
        if not isinstance(cuda_graphs, bool) and cuda_graphs != "auto":
            raise TypeError(f"`cuda_graphs` must be True, False or 'auto', got {cuda_graphs!r}")
        elementwise = self.settings.is_elementwise
        if cuda_graphs is True and elementwise:
            raise ValueError(
                "`cuda_graphs` must be 'auto' or False with method='elementwise', whose backward "
                "pass is not captured, got True"
            )
        if not isinstance(requery, bool):
            raise TypeError(f"`requery` must be a bool, got {requery!r}")
        self.requery = requery
        if requery and (why := self.unrated) is not None:
            raise ValueError(f"`requery` must be False: {why}")
        self.network = Network(model, layer, output_key=output_key, reshape=reshape, refine=refine)
        self._graphs: Graphs | None = None
        if cuda_graphs is not False and not elementwise:
            self._graphs = Graphs(self.network.model, auto=cuda_graphs == "auto")
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._attached: Attached | None = None
        if database is not None:
            self.database = database

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the model, the settings and the database's path; TypeError without."""
        own = {"_lock": None, "_attached": None, "_graphs": None}
        auto = None if self._graphs is None else self._graphs.auto
        return vars(self) | own | {"_graphs_auto": auto}

    def __setstate__(self, state: dict[str, Any]) -> None:
        auto = state.pop("_graphs_auto")
        vars(self).update(state)
        self._lock = threading.Lock()
        if auto is not None:
            self._graphs = Graphs(self.network.model, auto=auto)

    def __repr__(self) -> str:
        rows = "no database" if self._database is None else f"{len(self._database):,} rows"
        evidence = "" if self.settings.is_proxy else f"evidence={self.settings.evidence!r}, "
        refine = "" if self.network.refine is None else f"refine={self._refine!r}, "
        return (
            f"Explainer({type(self.network.model).__name__}, layer={self.layer_name!r}, "
            f"method={self.settings.method!r}, {evidence}{refine}{rows})"
        )

    @property
    def layer_name(self) -> str | None:
        """The layer that is explained; None until the first forward pass has found it."""
        return self.network.layer_name

    @property
    def database(self) -> Database | None:
        """The database that explanations rest on. Setting it checks that it is this model's.

        Raises:
            TypeError: not a database.
            ModelMismatchError: built with another model, other weights, layer or normalization.
        """
        return self._database

    @database.setter
    def database(self, database: Database) -> None:
        check_database(database, self.network, self.settings)
        if self.layer_name is None:
            self.network.set_layer(database.manifest["layer"])
        self._set_database(database)

    def _set_database(self, database: Database) -> None:
        with self._lock:
            self._database, self._attached = database, None

    def info(self) -> dict[str, Any]:
        """Return the layer, what refines its maps, the settings and the database.

        ``refine`` lists layers, coarse to fine; with "auto" it is "auto" until the first map, and
        an empty list where the model has no finer output on the way to the layer.
        """
        return {
            "layer": self.layer_name,
            "refine": self._refine,
            "channels_last": self.network.channels_last,
            "settings": self.settings.describe(),
            "k": self.k,
            "requery": self.requery,
            "index": self.index if isinstance(self.index, str) else type(self.index).__name__,
            "database": None if self._database is None else repr(self._database),
        }

    @property
    def _refine(self) -> list[str | None] | str | None:
        """The layers that refine maps, by their names; "auto" while they are not known."""
        finer = self.network.finer
        if self.network.refine is None or finer is None:
            return None if self.network.refine is None else "auto"
        return [network.layer_name for network in finer]

    def _finish(self, images: Tensor, options: MapOptions) -> Finish:
        finish = Finish.checked(images, **options)
        if not finish.relu and self.network.refine is not None:
            raise ValueError(
                "`relu` must be True with `refine`, which works on where a map is positive, got "
                "False"
            )
        return finish

    def _check_center(self, finish: Finish) -> None:
        """Refuse to center maps that are made of no channels' offsets."""
        if finish.center != 0 and self.settings.without_channels:
            why = "classes are contrasted already"
            if self.settings.is_elementwise:
                why = "rows have no channels to center"
            raise ValueError(
                f"`center` must be left out with method={self.settings.method!r}, whose {why}, "
                f"got {finish.center}"
            )

    @property
    def _exact(self) -> bool:
        return isinstance(self.index, str) and self.index == "exact"

    def _graphs_for(self, images: Tensor) -> Graphs | None:
        """Return what captures and replays on the images' device."""
        if self._graphs is None or images.is_cuda:
            return self._graphs
        if self._graphs.auto:
            return None
        raise ValueError(f"`cuda_graphs` must not be True for a model on {images.device}, got True")

    @property
    def _on_device(self) -> bool:
        """Whether search and maps need nothing of the host, and can be in a graph."""
        return self._exact and not isinstance(self._database, OnDemandDatabase)

    def _passed(self, attached: Attached, images: Tensor) -> Passed | None:
        """Run the forward pass by a graph of its own; None where it has none."""
        graphs = self._graphs_for(images)
        if graphs is None:
            return None
        return graphs.run(
            images,
            attached.passed,
            Passed.copied,
            owner=attached,
            key=("forward", self.network.channels_last),
            prepared=self.network.prepared,
        )

    @property
    def unrated(self) -> str | None:
        """Why hot pixels cannot be searched for again, in words; None where they can."""
        if self.settings.objective.real_labels:
            return f"{self.settings.objective!r} has real numbers for labels, and no classes"
        if self.k != 1:
            return f"it needs k=1, got k={self.k}"
        if not self._exact:
            return f"it needs index='exact', got {self.index!r}"
        return None

    def _tail(self, images: Tensor) -> Tail:
        return Tail.make(self.network, images, self.settings.l2_normalize)

    def attach(
        self,
        finish: Finish | None = None,
        *,
        images: Tensor | None = None,
        rates: bool = False,
    ) -> Attached:
        """Return the database on the model's device, made once.

        Args:
            finish: how maps are to be finished, to be checked.
            images: [B, 3, h, w] on the model's device; where a second look is wanted, the first
                ones are the probe of the model's head.
            rates: make a second look ready, as a calibration that has a confidence also does.

        Raises:
            NoDatabaseError, DamagedDatabaseError, MissingExtraError, TypeError, ValueError: as
                :meth:`explain_batch`.
        """
        with self._lock:
            if self._database is None:
                raise NoDatabaseError(
                    "there is no database to explain from: call build(loader), or gcfast.load"
                )
            cpu = torch.device("cpu")
            device = self.network.device(cpu) if images is None else images.device
            if self._attached is None or self._attached.device != device:
                self._attached = Attached.make(
                    self.network,
                    self._database,
                    device,
                    l2_normalize=self.settings.l2_normalize,
                    k=self.k,
                    index=self.index,
                    ids=self.ids,
                )
                self._database.warn_of_mixing(self.k, stacklevel=4)
            attached = self._attached
            look = self.requery or rates or attached.rated
            if look and attached.second is None and images is not None and len(images):
                transfer = attached.transfer
                assert isinstance(transfer, ExactTransfer)
                second = SecondLook(self._tail(images), transfer, self.requery)
                self._attached = attached = replace(attached, second=second)
        if finish is not None:
            self._check_center(finish)
        unscaled = finish is not None and finish.normalize is None and self.network.refine is None
        if unscaled:
            attached.database.require_scale()
        return attached
