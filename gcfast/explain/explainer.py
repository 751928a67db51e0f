"""The main job: build a database from labelled images, explain any image in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.explain.building import Building
from gcfast.explain.calibration import KEY, Fidelity, calibrated, transfer_fidelity
from gcfast.explain.explainer_state import Attached
from gcfast.explain.export import ExportedExplainer
from gcfast.explain.maps import Explained, Finish, Transferred, explained
from gcfast.explain.own_maps import OwnMaps
from gcfast.explain.result import Explanation, MapOptions, Size
from gcfast.explain.stream import overlapped
from gcfast.explain.transfer import ExactTransfer
from gcfast.method.head import normalized
from gcfast.model.capture import Captured
from gcfast.ops import dispatch
from gcfast.ops.precision import full_precision

STREAM_DEPTH = 1  # batches that wait for their transfer while the next one is in the model


class Explainer(Building, OwnMaps):
    """Explains the embeddings of one network.

    Args:
        model: any ``nn.Module``: images [B, 3, h, w] → embeddings [B, D]. It is left as it was:
            hooks gone, training flags and ``requires_grad`` as before, no ``.grad`` touched. It
            runs in evaluation mode, in its own dtype, autocast respected.
        layer: dotted name or module whose output is explained; None takes the database's, or the
            last layer (outermost name) whose output is spatial with H W > 1 (``layer_name`` says
            which).
        database: a :class:`Database`, or None until ``build`` makes one.
        objective: ``TripletLoss``, ``DistanceDifference``, ``PairDistance``, ``RankLoss`` (labels
            are then real numbers), or a function of (anchor, positive, negative), [T, D] each →
            loss [T].
        method: "gradcam" or "gradcam++".
        triplets: how many are drawn for a row, uniformly over its valid ones; "all" for every one.
        channels: M, how many channels a row keeps; "all" for C.
        evidence: "for" takes the channels whose growth lowers the loss (−dL/dA); "against" the
            paper's Eq. 6 to the letter.
        k: neighbours mixed for an explanation, by softmax(−distance / τ), τ the mean distance of a
            row to its k-th nearest. 1 is the paper.
        index: "exact", a FAISS factory string, a ``faiss.Index``, or "stored" for the one in the
            database's folder (``gcfast index``).
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
        finish = Finish(options.checked(images), center, relu, normalize)
        attached = self._attach()
        if len(images) == 0:
            return self._nothing(images, finish.size, details, attached)
        run = partial(self._explained, attached=attached, finish=finish)
        if self._graphs is None:
            return _result(run(images), attached, details)
        if not images.is_cuda:
            raise ValueError(
                f"`cuda_graphs` must be False for a model on {images.device}, got True"
            )
        return self._graphs.run(
            self.network.prepared(images),
            run,
            lambda out: _result(out.copied(), attached, details),
            owner=attached,
            key=finish,
        )

    @overload
    def explain_stream(
        self,
        batches: Iterable[Tensor],
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        center: float = ...,
        details: Literal[False] = ...,
    ) -> Iterator[Tensor]: ...

    @overload
    def explain_stream(
        self,
        batches: Iterable[Tensor],
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        center: float = ...,
        details: Literal[True],
    ) -> Iterator[Explanation]: ...

    def explain_stream(
        self,
        batches: Iterable[Tensor],
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
        details: bool = False,
    ) -> Iterator[Tensor] | Iterator[Explanation]:
        """Explain one batch after another; with an index, searching while the model runs.

        What :meth:`explain_batch` gives for each batch, in order. The index of batch i is searched,
        and its rows are gathered, in the background of the forward pass of batch i + 1; until then
        the activations of batch i are kept, so STREAM_DEPTH + 1 batches are held at most.

        Args:
            batches: any iterable of images as for :meth:`explain_batch`; read STREAM_DEPTH batches
                ahead of what is yielded.
            size: as for :meth:`explain_batch`.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`.
            details: as for :meth:`explain_batch`.

        Yields:
            Maps or explanations, one for each batch. An exception, of the iterable or of a batch,
            comes after the explanations of the batches before it.

        Raises:
            NoDatabaseError: there is no database yet; at once.
            TypeError, ValueError: as :meth:`explain_batch`.
        """
        options = MapOptions(size, normalize, relu, center)
        self._attach()

        def begin(images: Tensor) -> Callable[[], Tensor | Explanation]:
            return self._begin(images, options, details)

        return overlapped(batches, begin, STREAM_DEPTH)  # type: ignore[return-value]

    def _begin(
        self, images: Tensor, options: MapOptions, details: bool
    ) -> Callable[[], Tensor | Explanation]:
        """The forward pass of a batch; its transfer is under way, and waited for by the result."""
        if self._graphs is not None:
            at_once = self.explain_batch(images, **vars(options), details=details)
            return lambda: at_once
        images = self._checked_images("images", images)
        finish = Finish(options.checked(images), options.center, options.relu, options.normalize)
        attached = self._attach()
        if len(images) == 0:
            return lambda: self._nothing(images, finish.size, details, attached)
        waits = not images.is_cuda
        captured = self.network.embed(images)
        with torch.no_grad(), full_precision(images.device):
            embeddings = self._normalized(captured, images, waits)
            pending = attached.transfer.start(embeddings)
        activations = captured.activations

        def finished() -> Tensor | Explanation:
            with torch.no_grad(), full_precision(embeddings.device):
                out = _maps(activations, embeddings, pending.wait(), finish, waits)
            return _result(out, attached, details)

        return finished

    def _explained(
        self, images: Tensor, *, attached: Attached, finish: Finish, waits: bool | None = None
    ) -> Explained:
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
            embeddings = self._normalized(captured, images, waits)
            found = attached.transfer(embeddings)
            return _maps(captured.activations, embeddings, found, finish, waits)

    def _normalized(self, captured: Captured, images: Tensor, waits: bool) -> Tensor:
        """The embeddings [B, D] of images that were checked."""
        embeddings = normalized(captured.output, self.settings.l2_normalize)
        if waits:
            check_embeddings(embeddings, images)
        return embeddings

    def _nothing(
        self, images: Tensor, size: tuple[int, int], details: bool, attached: Attached
    ) -> Tensor | Explanation:
        """The explanation of no images."""
        maps = torch.zeros((0, *size), device=images.device)
        if not details:
            return maps
        ids = torch.zeros((0, self.k), dtype=torch.int64, device=images.device)
        embeddings = maps.new_zeros((0, attached.database.dim))
        labels = ids.to(attached.database.shards[0].labels.dtype)
        distances = maps.new_zeros((0, self.k))
        return Explanation(
            maps=maps,
            embeddings=embeddings,
            neighbors=ids,
            distances=distances,
            labels=labels,
            flat=torch.zeros(0, dtype=torch.bool, device=images.device),
            confidence=attached.confidence(distances),
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
        if not self._indexed("exact"):
            raise ValueError(f"`index` must be 'exact' to be exported, got {self.index!r}")
        attached = self._attach()
        transfer = attached.transfer
        assert isinstance(transfer, ExactTransfer)
        return ExportedExplainer(
            self.network,
            transfer,
            Finish((0, 0) if size is None else fixed, center, relu, normalize),
            l2_normalize=self.settings.l2_normalize,
            details=details,
        )

    def calibrate(self, loader: Iterable[Any]) -> Fidelity:
        """Learn from labelled held-out images what a distance says of a map; kept in the database.

        From then on ``explain_batch(details=True).confidence`` is the expected cosine between the
        map and the one that the image's own triplets would give. Print what is returned before
        relying on it: where agreement does not fall with distance, or a random row's map agrees as
        well, a confidence says little. Save the database to keep it. The calibration is of these
        very rows: ``append`` (with a warning), ``rebuild`` and ``Database.compress`` leave it
        behind.

        Args:
            loader: as for :meth:`build`, of images that the database was not built from; images of
                classes that it does not know are left out and counted.

        Returns:
            What was measured, a random row's agreement beside it, see
            :class:`gcfast.explain.calibration.Fidelity`.

        Raises:
            NoDatabaseError: there is no database yet.
            TypeError, ValueError: as :meth:`explain_labelled`; fewer than ten images, or mostly
                images of the database.
        """
        attached = self._attach()
        fidelity = transfer_fidelity(self, loader)
        calibration = calibrated(fidelity)
        attached.database.manifest[KEY] = calibration.to_dict()
        with self._lock:
            if self._attached is attached:  # its index stays, which may have taken long to make
                self._attached = replace(attached, calibration=calibration.to(attached.device))
        return fidelity


def _maps(
    activations: Tensor, embeddings: Tensor, found: Transferred, finish: Finish, waits: bool
) -> Explained:
    return explained(
        activations,
        embeddings,
        found,
        finish,
        sparse_cam=ops.sparse_cam if waits else dispatch.sparse_cam,
        marks=not waits,
    )


def _result(out: Explained, attached: Attached, details: bool) -> Tensor | Explanation:
    if not details:
        return out.maps
    return out.explanation(attached.transfer.labels, attached.confidence)
