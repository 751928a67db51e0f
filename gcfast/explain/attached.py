"""A network and its database, made ready to explain images on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.database.database import Database
from gcfast.errors import ModelMismatchError
from gcfast.explain.calibration import Calibration
from gcfast.explain.maps import CHECKED, TRUSTED, Explained, explained, on_images, proxies_of
from gcfast.explain.result import Explanation, Finish, ObjectMaps
from gcfast.explain.second_look import SecondLook, of_the_rest
from gcfast.method.elementwise import gradients_at_layer
from gcfast.method.head import normalized
from gcfast.method.proxies import Proxies
from gcfast.method.settings import ELEMENTWISE, Settings
from gcfast.method.tail import Tail
from gcfast.model.capture import Captured
from gcfast.model.fingerprint import check_model
from gcfast.model.network import Network
from gcfast.ops.precision import full_precision
from gcfast.search.faiss_gpu import on_gpu
from gcfast.search.transfer import ExactTransfer, Transfer, make_transfer
from gcfast.search.transferred import Transferred


class Passed(NamedTuple):
    """What the forward pass of a batch gave."""

    captured: Captured
    embeddings: Tensor  # [B, D] float32

    def copied(self) -> Passed:
        """The same in memory of its own, for passes that are not differentiated."""
        captured = self.captured
        return Passed(
            captured._replace(
                output=captured.output.clone(),
                activations=captured.activations.clone(),
                finer=tuple(finer.clone() for finer in captured.finer),
            ),
            self.embeddings.clone(),
        )


@dataclass(frozen=True, eq=False)
class Attached:
    """From checked images to maps; never changed, so threads share it."""

    network: Network
    l2_normalize: bool
    database: Database
    device: torch.device
    transfer: Transfer
    calibration: Calibration | None
    proxies: Proxies | None  # of the database's classes, for method="proxy"
    second: SecondLook | None = None  # made when images are at hand, where it is wanted

    @classmethod
    def make(
        cls,
        network: Network,
        database: Database,
        device: torch.device,
        *,
        l2_normalize: bool,
        k: int,
        index: Any,
        ids: Any = None,
    ) -> Attached:
        """Read the database's tables or its index, which may take long.

        Args:
            network: the database's, see :func:`check_database`.
            database: the rows.
            device: the network's.
            l2_normalize: normalize the network's output.
            k: neighbors.
            index: as for :class:`gcfast.Explainer`.
            ids: as there.

        Raises:
            DamagedDatabaseError: the stored index or the calibration cannot be read.
            MissingExtraError, TypeError, ValueError: as
                :func:`gcfast.search.faiss_search.open_index`.
        """
        if isinstance(index, str) and index == "stored":
            index = database.read_index()
            if device.type == "cuda":
                index = on_gpu(index, device, k + 1)
        calibration = Calibration.from_manifest(database.manifest)
        transfer = make_transfer(database, device, k, index, ids)
        proxies = proxies_of(database, device)
        if proxies is not None and transfer.labels is not None:
            proxies = proxies.of_rows(transfer.labels)
        return cls(
            network=network,
            l2_normalize=l2_normalize,
            database=database,
            device=device,
            transfer=transfer,
            calibration=None if calibration is None else calibration.to(device),
            proxies=proxies,
        )

    @property
    def elementwise(self) -> bool:
        """Whether rows lend cotangents."""
        return bool(self.database.manifest["settings"].get("method") == ELEMENTWISE)

    @property
    def rated(self) -> bool:
        """Whether explanations have a confidence: calibrated, with an exact search for one row."""
        fitted = self.calibration is not None and self.calibration.right is not None
        return fitted and isinstance(self.transfer, ExactTransfer) and self.transfer.k == 1

    def explain(
        self,
        images: Tensor,
        finish: Finish,
        *,
        waits: bool | None = None,
        finer: bool = True,
        rates: bool = False,
        passed: Passed | None = None,
    ) -> Explained:
        """Run the forward pass, the search and the maps.

        Args:
            images: [B, 3, h, w], checked.
            finish: how the maps are finished.
            waits: whether values may be looked at; None for not on a CUDA device, where looking
                would wait for the device.
            finer: refine the maps, where the network says by what.
            rates: give the log-ratios that a confidence rests on; needs ``second``.
            passed: the forward pass, where it has been made.
        """
        waits = not images.is_cuda if waits is None else waits
        captured, embeddings = passed or self.passed(images, waits=waits, finer=finer)
        with torch.no_grad(), full_precision(images.device):
            found = self.transfer(embeddings)
            return self._finished(captured, images, embeddings, found, finish, rates, waits)

    def begin(
        self,
        images: Tensor,
        finish: Finish,
        *,
        rates: bool = False,
        passed: Passed | None = None,
    ) -> Callable[[], Explained]:
        """Run the forward pass and start the transfer; what is returned waits for it.

        Args:
            images: [B, 3, h, w], checked.
            finish: how the maps are finished.
            rates: as for :meth:`explain`.
            passed: as for :meth:`explain`.
        """
        waits = not images.is_cuda
        captured, embeddings = passed or self.passed(images)
        with torch.no_grad(), full_precision(images.device):
            found = self.transfer.start(embeddings)

        def finished() -> Explained:
            with torch.no_grad(), full_precision(embeddings.device):
                return self._finished(captured, images, embeddings, found(), finish, rates, waits)

        return finished

    def passed(self, images: Tensor, *, waits: bool | None = None, finer: bool = True) -> Passed:
        """Run the forward pass; arguments as for :meth:`explain`."""
        captured = self._captured(images, finer)
        with torch.no_grad():
            embeddings = normalized(captured.output, self.l2_normalize)
            if not images.is_cuda if waits is None else waits:
                check_embeddings(embeddings, images)
        return Passed(captured, embeddings)

    def empty(self, size: tuple[int, int]) -> Explained:
        """Return what :meth:`explain` would give for no images."""
        ids = torch.zeros((0, self.transfer.k), dtype=torch.int64, device=self.device)
        maps = torch.zeros((0, *size), device=self.device)
        return Explained(
            maps=maps,
            embeddings=maps.new_zeros((0, self.database.dim)),
            neighbors=ids,
            distances=maps.new_zeros(ids.shape),
            labels=ids.to(self.database.labels.dtype),
            ratios=maps.new_zeros(0) if isinstance(self.transfer, ExactTransfer) else None,
        )

    def result(self, out: Explained, details: bool) -> Tensor | Explanation:
        """Return the maps, or with ``details`` everything that they rest on."""
        if not details:
            return out.maps
        names = self.database.manifest["class_names"]
        return out.explanation(self.transfer.labels, self.calibration, names)

    def _captured(self, images: Tensor, finer: bool = True) -> Captured:
        """Run the forward pass; with a graph from the layer on, where cotangents go back on it."""
        if not self.elementwise:
            return self.network.embed(images, finer=finer)
        with self.network.differentiable(images, finer=finer) as captured:
            return captured

    def _finished(
        self,
        captured: Captured,
        images: Tensor,
        embeddings: Tensor,
        found: Transferred,
        finish: Finish,
        rates: bool,
        waits: bool,
    ) -> Explained:
        """Make the maps of what was found, after a second look where one is wanted."""
        found, ratios = self._looked_again(
            captured, images, embeddings, found, finish, rates, waits
        )
        out = self._maps(captured, embeddings, found, finish, waits)
        return out._replace(ratios=ratios)

    def _looked_again(
        self,
        captured: Captured,
        images: Tensor,
        embeddings: Tensor,
        found: Transferred,
        finish: Finish,
        rates: bool,
        waits: bool,
    ) -> tuple[Transferred, Tensor | None]:
        """Return what is found after a second look, and its log-ratios; see :class:`SecondLook`."""
        if self.second is None or not (self.second.requery or rates):
            return found, None
        coarse = self._coarse(captured, embeddings, found, finish, waits)
        return self.second.again(
            found, coarse, captured.activations, images, embeddings, rates=rates, waits=waits
        )

    def _coarse(
        self,
        captured: Captured,
        embeddings: Tensor,
        found: Transferred,
        finish: Finish,
        waits: bool,
    ) -> Tensor:
        """Return the maps [B, H, W] in [0, 1] at the activations' own resolution."""
        size = (captured.activations.shape[2], captured.activations.shape[3])
        finish = finish._replace(size=size, normalize="max", relu=True)
        captured = captured._replace(share=(1.0, 1.0), finer=())
        return self._maps(captured, embeddings, found, finish, waits).maps

    def objects(self, images: Tensor, finish: Finish, count: int, tail: Tail) -> ObjectMaps:
        """See :meth:`gcfast.Explainer.explain_objects`; images checked and not none."""
        waits = not images.is_cuda
        captured, embeddings = self.passed(images)
        seen: list[Tensor] = []
        parts: list[Explained] = []
        with torch.no_grad(), full_precision(images.device):
            for number in range(count):
                if number:
                    embeddings = of_the_rest(tail, seen, captured.activations, images)
                found = self.transfer(embeddings)
                found, _ = self._looked_again(
                    captured, images, embeddings, found, finish, False, waits
                )
                seen.append(self._coarse(captured, embeddings, found, finish, waits))
                parts.append(self._maps(captured, embeddings, found, finish, waits))
        return ObjectMaps(
            torch.stack([part.maps for part in parts], 1),
            torch.stack([part.neighbors[:, 0] for part in parts], 1),
            torch.stack([part.distances[:, 0] for part in parts], 1),
            torch.stack([part.labels_from(self.transfer.labels)[:, 0] for part in parts], 1),
        )

    def _maps(
        self,
        captured: Captured,
        embeddings: Tensor,
        found: Transferred,
        finish: Finish,
        waits: bool,
    ) -> Explained:
        dense = self.elementwise or self.proxies is not None
        cam: Any = ops.dense_cam if dense else ops.sparse_cam

        def pull_back(cotangents: Tensor) -> Tensor:
            return gradients_at_layer(self.network, captured, cotangents, self.l2_normalize)

        return explained(
            captured.activations,
            embeddings,
            found,
            finish,
            cam=on_images(
                cam if waits else cam.trusted,
                captured.share,
                captured.finer,
                CHECKED if waits else TRUSTED,
            ),
            marks=not waits,
            proxies=self.proxies,
            pull_back=pull_back if self.elementwise else None,
        )


def check_database(database: Database, network: Network, settings: Settings) -> None:
    """Refuse a database that was built with another model.

    Raises:
        TypeError: not a database.
        ModelMismatchError: built with another model, other weights, layer or normalization, or by
            a method whose rows lend something else.
    """
    if not isinstance(database, Database):
        raise TypeError(
            f"`database` must be a gcfast.Database, got {type(database).__name__}; "
            "gcfast.Database.open reads one"
        )
    manifest = database.manifest
    layer = manifest["layer"]
    if network.layer_name is None and not network.has_layer(layer):
        raise ModelMismatchError(
            f"the database was built with the layer {layer!r}, which the model lacks"
        )
    check_model(manifest["fingerprint"], network)
    if network.layer_name is not None and layer != network.layer_name:
        raise ModelMismatchError(
            f"the database was built with the layer {layer!r}, not with {network.layer_name!r}"
        )
    l2_normalize = settings.l2_normalize
    if manifest["settings"]["l2_normalize"] != l2_normalize:
        raise ModelMismatchError(
            f"the database was built with l2_normalize={not l2_normalize}, not with {l2_normalize}"
        )
    method = manifest["settings"]["method"]
    if settings.kind != replace(settings, method=method).kind:
        raise ModelMismatchError(
            f"the database was built with method={method!r}, not with {settings.method!r}: give "
            "the Explainer that method, or open it by gcfast.load"
        )
