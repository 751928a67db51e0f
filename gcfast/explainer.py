"""The main job: build a database from labelled images, explain any image in one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from gcfast import ops
from gcfast._checks import require_int
from gcfast.build import build
from gcfast.capture import Captured
from gcfast.database import Database
from gcfast.errors import ModelMismatchError, NoDatabaseError
from gcfast.explanation import Explanation, MapOptions, Size, TripletMaps
from gcfast.export import ExportedExplainer
from gcfast.fingerprint import difference, fingerprint
from gcfast.graphs import Graphs
from gcfast.head import normalized, vjp_grad_weights
from gcfast.hot_path import Finish, Transferred, transfer
from gcfast.labels import Labels, numbers_for
from gcfast.loading import check_embeddings, require_images
from gcfast.network import Network, Reshape
from gcfast.objectives import (
    LossFunction,
    Objective,
    TripletLoss,
    gradients_of,
)
from gcfast.ops import dispatch
from gcfast.precision import full_precision
from gcfast.rows import signed_parts
from gcfast.search import Search, make_search, temperature
from gcfast.settings import Settings
from gcfast.triplets import Anchors, Cotangents, PairSource


@dataclass(frozen=True)
class _Attached:
    """A database made ready on one device; never changed, so threads share it."""

    database: Database
    device: torch.device
    channels: Tensor
    weights: Tensor
    offsets: Tensor
    labels: Tensor
    search: Search
    temperature: float


class Explainer:
    """Explains the embeddings of one network.

    Args:
        model: any ``nn.Module``: images [B, 3, h, w] → embeddings [B, D]. It is left as it was:
            hooks gone, training flags and ``requires_grad`` as before, no ``.grad`` touched. It
            runs in evaluation mode, in its own dtype, autocast respected.
        layer: dotted name or module whose output is explained; None takes the database's, or the
            last layer (outermost name) whose output is spatial with H W > 1 (``layer_name`` says
            which).
        database: a :class:`Database`, or None until ``build`` makes one.
        objective: ``TripletLoss``, ``DistanceDifference``, ``PairDistance``, or a function of
            (anchor, positive, negative), [T, D] each → loss [T].
        method: "gradcam" or "gradcam++".
        triplets: how many are drawn for a row, uniformly over its valid ones; "all" for every one.
        channels: M, how many channels a row keeps; "all" for C.
        evidence: "for" takes the channels whose growth lowers the loss (−dL/dA); "against" the
            paper's Eq. 6 to the letter.
        k: neighbours mixed for an explanation, by softmax(−distance / τ), τ the mean distance of a
            row to its k-th nearest. 1 is the paper.
        index: "exact", a FAISS factory string, or a ``faiss.Index``.
        l2_normalize: normalise the model's output (nothing changes where it is normalised).
        on_no_triplet: a row without a valid triplet takes its farthest positive and nearest
            negative, hinge ignored ("hardest"), or is left out ("skip"). A row whose label is seen
            once is always left out, and counted.
        output_key: where the embedding is in an output that is not a tensor.
        reshape: from the layer's output to [B, C, H, W]; ``TokenGrid`` for transformers.
        seed: of the draws, 0 to 2^63 − 1.
        cuda_graphs: on a CUDA device, capture :meth:`explain_batch` for each shape of images and
            replay it: for small batches, whose time is that of launching kernels. Captured again
            when a weight or the database has changed; a model that cannot be captured runs without,
            with a warning.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, by its name.
        UnsupportedModelError: a compiled or scripted model.
        ModelMismatchError: a database of another model or layer.

    Source: paper, sections 3.1 to 3.3.
    """

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
        self.network = Network(model, layer, output_key=output_key, reshape=reshape)
        self._graphs = Graphs(self.network.model) if cuda_graphs else None
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._attached: _Attached | None = None
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

    def build(
        self,
        loader: Iterable[Any],
        *,
        progress: bool = False,
        preprocessing: dict[str, Any] | None = None,
    ) -> Database:
        """Build the database from labelled images, and explain from it from now on.

        One forward pass over the images where the head is an affine map of the spatially averaged
        activations (with or without L2 norm); for any other head a second one, with
        vector-Jacobian products from the layer on. Memory: O(N D), for Grad-CAM++ O(N (D + C)),
        spilled to temporary files above gcfast.spool.SPOOL_MEMORY_BYTES.

        Args:
            loader: any iterable of (images, labels) or (images, labels, ids), a list included:
                images [B, 3, h, w] floating point, moved to the model's device and dtype; labels
                [B] whole numbers or names; ids [B] strings. It must give the same images in the
                same order each time it is gone through.
            progress: show bars on stderr.
            preprocessing: anything that JSON can hold, kept in the manifest.

        Returns:
            The database, its rows in the loader's order.

        Raises:
            TypeError, ValueError: a loader that gives something else, no labels, one class only,
                or other images the second time; NaN, with the row; more channels than C.
        """
        database = build(
            self.network, loader, self.settings, progress=progress, preprocessing=preprocessing
        )
        self._set_database(database)
        return database

    @overload
    def explain_batch(
        self,
        images: Tensor,
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        center: float = ...,
        details: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def explain_batch(
        self,
        images: Tensor,
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        center: float = ...,
        details: Literal[True],
    ) -> Explanation: ...

    @overload
    def explain_batch(
        self,
        images: Tensor,
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        center: float = ...,
        details: bool,
    ) -> Tensor | Explanation: ...

    def explain_batch(
        self,
        images: Tensor,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
        details: bool = False,
    ) -> Tensor | Explanation:
        """Heat maps of images, from one forward pass and their nearest rows' grad-weights.

        Args:
            images: [B, 3, h, w] on the model's device and in its dtype, as the model expects them.
            size: (OH, OW) or one number for both; None is the images' own.
            normalize: "max" (the largest magnitude becomes 1) or "minmax", before upsampling; None
                is raw.
            relu: keep what is positive (the paper); False keeps signed maps.
            center: how much of the rows' offsets to subtract: the response that the row's channels
                have on average over the training images. 0 is the paper; 1 sharpens most maps.
            details: return an :class:`Explanation` instead of the maps alone.

        Returns:
            [B, OH, OW] float32 on the images' device, in [0, 1] by default; zeros where nothing
            is left of a map.

        Raises:
            NoDatabaseError: there is no database yet.
            TypeError: images of another kind or dtype.
            ValueError: another rank or device; NaN in images or embeddings, with the row (on a CUDA
                device, where looking would wait for it, such an image's map is all NaN instead).

        Source: paper, section 3.3.
        """
        options = MapOptions(size, normalize, relu, center)
        images = self._checked_images("images", images)
        output_size = options.checked(images)
        attached = self._attach()
        if len(images) == 0:
            return self._nothing(images, output_size, details)
        finish = Finish(output_size, center, relu, normalize)
        run = partial(self._transferred, attached=attached, finish=finish)
        if self._graphs is None:
            out = run(images)
            return out.explanation(attached.labels) if details else out.maps
        if not images.is_cuda:
            raise ValueError(
                f"`cuda_graphs` must be False for a model on {images.device}, got True"
            )
        return self._graphs.run(
            self.network.prepared(images),
            run,
            lambda out: out.copied().explanation(attached.labels) if details else out.maps.clone(),
            owner=attached,
            key=finish,
        )

    def _transferred(
        self, images: Tensor, *, attached: _Attached, finish: Finish, waits: bool | None = None
    ) -> Transferred:
        """One forward pass, the search and the maps.

        Args:
            images: [B, 3, h, w], checked.
            attached: the database on their device.
            finish: how the maps are finished.
            waits: whether values may be looked at; None for not on a CUDA device, where that would
                wait for it.
        """
        waits = not images.is_cuda if waits is None else waits
        captured = self.network.embed(images)
        with torch.no_grad(), full_precision(images.device):
            embeddings = normalized(captured.output, self.settings.l2_normalize)
            if waits:
                check_embeddings(embeddings, images)
            return transfer(
                captured.activations,
                embeddings,
                (attached.channels, attached.weights, attached.offsets),
                finish,
                search=attached.search,
                k=self.k,
                temperature=attached.temperature,
                sparse_cam=ops.sparse_cam if waits else dispatch.sparse_cam,
                marks=not waits,
            )

    def export(
        self,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
        details: bool = False,
    ) -> ExportedExplainer:
        """The explainer as one module without hooks, which torch.compile and torch.export take.

        It maps images [B, 3, h, w] to what :meth:`explain_batch` maps them to, in one graph
        (``fullgraph=True``). Its parameters are the model's own; the database's tables are buffers.
        Where a pass has been made before (``build``, ``explain_batch``), what it has shown is used:
        channels-last input where the model takes it, and no copy of the activations where no later
        layer writes over them.

        Args:
            size: as for :meth:`explain_batch`, and fixed from now on, as are the others.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`.
            details: give (maps, embeddings, neighbors, distances, labels) instead of the maps.

        Raises:
            NoDatabaseError: there is no database yet.
            UnsupportedModelError: a model that cannot be copied.
            TypeError, ValueError: an argument of the wrong kind or out of range; an ``index`` that
                is not exact, since FAISS cannot be part of a graph.
        """
        options = MapOptions(size, normalize, relu, center)
        fixed = options.checked(torch.empty(0, 3, 1, 1))
        if self.index != "exact":
            raise ValueError(f"`index` must be 'exact' to be exported, got {self.index!r}")
        attached = self._attach()
        table = attached.database.embeddings.to(attached.device)
        tables = {
            "table": table,
            "squares": torch.linalg.vector_norm(table, dim=1).square(),
            "channels": attached.channels,
            "weights": attached.weights,
            "offsets": attached.offsets,
            "labels": attached.labels,
        }
        return ExportedExplainer(
            self.network,
            tables,
            Finish((0, 0) if size is None else fixed, center, relu, normalize),
            k=self.k,
            temperature=attached.temperature,
            l2_normalize=self.settings.l2_normalize,
            details=details,
        )

    def explain_labelled(
        self,
        images: Tensor,
        labels: Any,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
    ) -> Tensor:
        """Heat maps from the images' own triplets against the database: what transfer approximates.

        Args:
            images: as for :meth:`explain_batch`.
            labels: [B] whole numbers or names, of the database's classes.
            size: as for :meth:`explain_batch`.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`.

        Returns:
            [B, OH, OW] float32; zeros for a label that no row of the database has.

        Raises:
            NoDatabaseError, TypeError, ValueError: as :meth:`explain_batch`, and for labels that
                the database does not know.

        Source: paper, section 3.2 and its Figure 3.
        """
        options = MapOptions(size, normalize, relu, center)
        images = self._checked_images("images", images)
        output_size = options.checked(images)
        database = self._attach().database
        numbers = numbers_for(Labels.listed(labels, len(images)), database.class_names)
        if len(images) == 0:
            return images.new_zeros((0, *output_size), dtype=torch.float32)
        source = PairSource(
            self.settings.objective,
            database.embeddings,
            database.labels,
            hardest=self.settings.on_no_triplet == "hardest",
        )
        with self.network.differentiable(images) as captured:
            embeddings = normalized(captured.output, self.settings.l2_normalize)
            check_embeddings(embeddings.detach(), images)
            anchors = Anchors(
                embeddings.detach().cpu(),
                numbers,
                # None of the rows, and the same for all, so that no draw depends on the batch.
                torch.full((len(images),), len(database)),
            )
            parts = (
                part._replace(
                    values=part.values.to(images.device), valid=part.valid.to(images.device)
                )
                for part in signed_parts(source, anchors, self.settings)
            )
            weights = vjp_grad_weights(
                captured, embeddings, parts, self.settings.method, self.network
            )
        return self._own_maps(captured, weights, options, output_size)

    def explain_triplet(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
    ) -> TripletMaps:
        """Heat maps of given triplets: Grad-CAM on the objective itself, no database needed.

        The hinge of a triplet that is solved already has no gradient; it is ignored with
        ``on_no_triplet="hardest"``, and with "skip" the maps of such a triplet are zeros.

        Args:
            anchor: [B, 3, h, w], as for :meth:`explain_batch`.
            positive: [B, 3, h, w], of the anchors' labels.
            negative: [B, 3, h, w], of other labels.
            size: as for :meth:`explain_batch`.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`; above 0 it needs a database.

        Returns:
            Maps of the anchors, positives and negatives, [B, OH, OW] float32 each.

        Raises:
            NoDatabaseError: ``center`` without a database.
            TypeError, ValueError: as :meth:`explain_batch`.

        Source: paper, section 3.1.
        """
        options = MapOptions(size, normalize, relu, center)
        images = [
            self._checked_images(name, value)
            for name, value in (("anchor", anchor), ("positive", positive), ("negative", negative))
        ]
        if len({len(i) for i in images}) > 1:
            raise ValueError(
                "`anchor`, `positive` and `negative` must have the same B, got "
                + ", ".join(str(len(i)) for i in images)
            )
        sizes = [options.checked(i) for i in images]
        if len(anchor) == 0:
            return TripletMaps(
                *(
                    i.new_zeros((0, *s), dtype=torch.float32)
                    for i, s in zip(images, sizes, strict=True)
                )
            )
        settings = self.settings
        with ExitStack() as stack:
            captured = [stack.enter_context(self.network.differentiable(i)) for i in images]
            embeddings = [normalized(c.output, settings.l2_normalize) for c in captured]
            for values, given in zip(embeddings, images, strict=True):
                check_embeddings(values.detach(), given)
            with torch.enable_grad():
                leaves = [values.detach().requires_grad_() for values in embeddings]
                loss = settings.objective.loss(
                    leaves[0], leaves[1], leaves[2], settings.on_no_triplet == "skip"
                )
                cotangents = gradients_of(loss, leaves)
            maps = []
            for one, own, cotangent, output_size in zip(
                captured, embeddings, cotangents, sizes, strict=True
            ):
                valid = cotangent.new_ones((len(cotangent), 1), dtype=torch.bool)
                part = Cotangents(settings.sign * cotangent[:, None], valid, valid[:, 0].long())
                weights = vjp_grad_weights(one, own, [part], settings.method, self.network)
                maps.append(self._own_maps(one, weights, options, output_size))
        return TripletMaps(*maps)

    def _own_maps(
        self, captured: Captured, weights: Tensor, options: MapOptions, size: tuple[int, int]
    ) -> Tensor:
        """Maps from weights [B, C] of the images themselves."""
        B, C = weights.shape
        m = C if self.settings.channels == "all" else self.settings.channels
        if m > C:
            raise ValueError(f"`channels` must be at most the layer's C = {C}, got {m}")
        channels, kept = ops.top_m(weights, m)
        offsets = None
        if options.center != 0:
            mean = self._attach().database.mean_activation.to(kept.device)
            offsets = (kept * mean[channels]).sum(1)
        return ops.sparse_cam(
            captured.activations.detach(),
            torch.arange(B, device=kept.device)[:, None],
            channels,
            kept,
            size=size,
            offsets=offsets,
            center=options.center,
            relu=options.relu,
            normalize=options.normalize,
        )

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

    def _attach(self) -> _Attached:
        """The database on the model's device, with its search; made once."""
        with self._lock:
            database, attached = self._database, self._attached
            if database is None:
                raise NoDatabaseError(
                    "there is no database to explain from: call build(loader), or gcfast.load"
                )
            device = self.network.device(torch.device("cpu"))
            if attached is None or attached.device != device:
                table = database.embeddings.to(device)
                tau = temperature(table, self.k) if self.k > 1 else 1.0
                attached = self._attached = _Attached(
                    database=database,
                    device=device,
                    channels=database.channels.to(device),
                    weights=database.weights.to(device),
                    offsets=database.offsets.to(device),
                    labels=database.labels.to(device),
                    search=make_search(self.index, table),
                    temperature=tau,
                )
            return attached

    def _nothing(
        self, images: Tensor, size: tuple[int, int], details: bool
    ) -> Tensor | Explanation:
        """The explanation of no images."""
        maps = torch.zeros((0, *size), device=images.device)
        if not details:
            return maps
        dim = self._attach().database.embeddings.shape[1]
        ids = torch.zeros((0, self.k), dtype=torch.int64, device=images.device)
        return Explanation(
            maps=maps,
            embeddings=maps.new_zeros((0, dim)),
            neighbors=ids,
            distances=maps.new_zeros((0, self.k)),
            labels=ids.clone(),
            flat=torch.zeros(0, dtype=torch.bool, device=images.device),
        )
