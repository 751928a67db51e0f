"""The main class: build a database from labelled images, explain any image in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gcfast._checks import require_int
from gcfast.database.manifest import CALIBRATION
from gcfast.explain.builds import DatabaseCalls
from gcfast.explain.calibration import Fidelity, calibrated, transfer_fidelity
from gcfast.explain.direct.calls import DirectCalls
from gcfast.explain.exported.calls import ExportCalls
from gcfast.explain.maps import Explained
from gcfast.explain.result import Explanation, MapOptions, ObjectMaps
from gcfast.explain.stream import overlapped

STREAM_DEPTH = 1  # batches that wait for their transfer while the next one is in the model


class Explainer(DatabaseCalls, DirectCalls, ExportCalls):
    """Explain the embeddings of one network.

    Args:
        model: any ``nn.Module``: images [B, 3, h, w] → embeddings [B, D]. It is left as it was:
            hooks gone, training flags and ``requires_grad`` as before, no ``.grad`` touched. It
            runs in evaluation mode, in its own dtype, and autocast is respected.
        layer: dotted name or module whose output is explained; None takes the database's, or the
            last layer (outermost name) whose output is spatial with H W > 1 (``layer_name`` says
            which).
        database: a :class:`Database`, or None until ``build`` makes one.
        objective: ``TripletLoss``, ``DistanceDifference``, ``PairDistance``, ``RankLoss`` (labels
            are then real numbers), or a function of (anchor, positive, negative), [T, D] each →
            loss [T].
        method: "gradcam" or "gradcam++"; or, beyond the paper, "proxy": the contrasted proxy of
            the nearest row's class weighs the channels (:mod:`gcfast.method.proxies`); or
            "elementwise": the nearest row lends its cotangent on the embedding, which is pulled
            back at the image itself (:mod:`gcfast.method.elementwise`).
            It needs classes, and takes no ``objective``, ``triplets``, ``channels``, ``evidence``
            or ``on_no_triplet``.
        triplets: how many are drawn for a row, uniformly over its valid ones; "all" for every one.
        channels: M, how many channels a row keeps; "all" for C.
        evidence: "for" takes the channels whose growth lowers the loss (−dL/dA); "against" is the
            paper's Eq. 6 to the letter.
        k: neighbors mixed for an explanation, by softmax(−distance / τ), τ the mean distance of a
            row to its k-th nearest. 1 is the paper.
        index: "exact", a FAISS factory string, a ``faiss.Index``, or "stored" for the one in the
            database's folder (``gcfast index``). That an index of your own holds the database's
            rows is checked on a spread of them before the first explanation, and their number with
            every batch; an empty one is copied, and the copy filled.
        ids: [N] whole numbers, the id of each row in an index of your own that has other ids
            (``IndexIDMap``, ``add_with_ids``); None where they are the rows' numbers.
        l2_normalize: normalize the model's output (no change where it is normalized already).
        on_no_triplet: a row without a valid triplet takes its farthest positive and nearest
            negative, hinge ignored ("hardest"), or is left out ("skip"). A row whose label is seen
            once is always left out, and counted.
        output_key: where the embedding is in an output that is not a tensor.
        reshape: from the layer's output to [B, C, H, W]; ``TokenGrid`` for transformers.
        refine: earlier layers whose outputs refine every map, coarse to fine: names or modules, or
            "auto" for the last ones at 2 and at 4 times the layer's resolution on the way to it
            (``info`` says which; none in a transformer whose tokens are as many everywhere). None
            is the paper. Taken from each image's own forward pass: nothing of it is in a database,
            see :func:`gcfast.ops.refine`. Maps are then finer and ``relu`` must be True; without
            ``normalize`` their scale is that of the refined map, in [0, 1].
        seed: of the draws, 0 to 2^63 − 1.
        requery: embed the hot pixels of each map by themselves and search again; where another
            class is 1.25 times nearer to them, it explains the image. Beyond the paper; for images
            of several objects. Needs k=1, index="exact" and classes.
        cuda_graphs: on a CUDA device, capture :meth:`explain_batch` for a shape of images and
            replay it: "auto" where launching kernels takes longer than running them, as the first
            calls of a shape tell; True for every shape, False for none. Captured again when a
            weight, a flag of the model or the database has changed; a model that cannot be
            captured runs without graphs, with one warning. With a FAISS index, which cannot be in a
            graph, and with rows on demand, the forward pass alone is captured.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, by its name.
        UnsupportedModelError: a compiled or scripted model.
        ModelMismatchError: a database of another model or layer.

    Source: paper, sections 3.1 to 3.3.
    """

    @overload
    def explain_batch(
        self, images: Tensor, *, details: Literal[False] = ..., **options: Unpack[MapOptions]
    ) -> Tensor: ...

    @overload
    def explain_batch(
        self, images: Tensor, *, details: Literal[True], **options: Unpack[MapOptions]
    ) -> Explanation: ...

    @overload
    def explain_batch(
        self, images: Tensor, *, details: bool, **options: Unpack[MapOptions]
    ) -> Tensor | Explanation: ...

    def explain_batch(
        self, images: Tensor, *, details: bool = False, **options: Unpack[MapOptions]
    ) -> Tensor | Explanation:
        """Return heat maps of images, from one forward pass and their nearest rows' grad-weights.

        Args:
            images: [B, 3, h, w] on the model's device and in its dtype, as the model expects them.
            details: return an :class:`Explanation` instead of the maps alone.
            **options: ``size``, ``normalize``, ``relu`` and ``center``, see
                :class:`gcfast.explain.result.MapOptions`.

        Returns:
            [B, OH, OW] float32 on the images' device, in [0, 1] by default; zeros where the map
            has no positive value.

        Raises:
            NoDatabaseError: there is no database yet.
            TypeError: images of another kind or dtype.
            ValueError: another rank or device; NaN in images or embeddings, with the row (on a CUDA
                device, where looking would wait for it, such an image's map is all NaN instead).

        Source: paper, section 3.3.
        """
        images = self.network.checked("images", images)
        finish = self._finish(images, options)
        attached = self.attach(finish, images=images)
        if len(images) == 0:
            return attached.result(attached.empty(finish.size), details)
        rates = details and attached.rated
        graphs = self._graphs_for(images)
        if graphs is None or not self._on_device:
            passed = self._passed(attached, images)
            out = attached.explain(images, finish, rates=rates, passed=passed)
            return attached.result(out, details)
        out = graphs.run(
            images,
            lambda images: attached.explain(images, finish, rates=rates),
            Explained.copied if details else Explained.copied_maps,
            owner=attached,
            key=(finish, rates, self.network.channels_last),
            prepared=self.network.prepared,
        )
        return attached.result(out, details)

    @overload
    def explain_stream(
        self,
        batches: Iterable[Tensor],
        *,
        details: Literal[False] = ...,
        **options: Unpack[MapOptions],
    ) -> Iterator[Tensor]: ...

    @overload
    def explain_stream(
        self, batches: Iterable[Tensor], *, details: Literal[True], **options: Unpack[MapOptions]
    ) -> Iterator[Explanation]: ...

    def explain_stream(
        self, batches: Iterable[Tensor], *, details: bool = False, **options: Unpack[MapOptions]
    ) -> Iterator[Tensor] | Iterator[Explanation]:
        """Explain one batch after another; with an index, search while the model runs.

        Each batch gives what :meth:`explain_batch` gives, in order. The index of batch i is
        searched, and its rows are gathered, in the background of the forward pass of batch i + 1;
        until then the activations of batch i are kept, so STREAM_DEPTH + 1 batches are held at
        most.

        Args:
            batches: any iterable of images as for :meth:`explain_batch`; read STREAM_DEPTH batches
                ahead of what is yielded.
            details: as for :meth:`explain_batch`.
            **options: as for :meth:`explain_batch`.

        Yields:
            Maps or explanations, one for each batch. An exception, of the iterable or of a batch,
            comes after the explanations of the batches before it.

        Raises:
            NoDatabaseError: there is no database yet; at once.
            TypeError, ValueError: as :meth:`explain_batch`.
        """
        self.attach(self._finish(torch.empty(0, 3, 1, 1), options))

        def begin(images: Tensor) -> Callable[[], Tensor | Explanation]:
            images = self.network.checked("images", images)
            whole = self._on_device and self._graphs_for(images) is not None
            if len(images) == 0 or whole:
                explained = self.explain_batch(images, details=details, **options)
                return lambda: explained
            finish = self._finish(images, options)
            attached = self.attach(finish, images=images)
            passed = self._passed(attached, images)
            finished = attached.begin(
                images, finish, rates=details and attached.rated, passed=passed
            )
            return lambda: attached.result(finished(), details)

        return overlapped(batches, begin, STREAM_DEPTH)  # type: ignore[return-value]

    def explain_objects(
        self, images: Tensor, objects: int = 2, **options: Unpack[MapOptions]
    ) -> ObjectMaps:
        """Return a map, a neighbor and a label for each of several objects of an image.

        The first is as :meth:`explain_batch` gives it. For each further one the activations are
        averaged over what the maps so far leave cold (weights Π (1 − map)⁴), embedded by the rest
        of the model, and searched for. An image of fewer objects gets maps of the same object, or
        of what is around it: look at the distances. Beyond the paper.

        Args:
            images: as for :meth:`explain_batch`.
            objects: how many, at least 1.
            **options: as for :meth:`explain_batch`.

        Raises:
            NoDatabaseError: there is no database yet.
            TypeError, ValueError: as :meth:`explain_batch`; tokens that the model does not average,
                which cannot be embedded in part.
        """
        images = self.network.checked("images", images)
        count = require_int("objects", objects, 1)
        finish = self._finish(images, options)
        attached = self.attach(finish, images=images)
        if len(images) == 0:
            none = attached.empty(finish.size)
            shape = (0, count)
            return ObjectMaps(
                none.maps.new_zeros((*shape, *finish.size)),
                none.neighbors.new_zeros(shape),
                none.distances.new_zeros(shape),
                none.labels_from(None).new_zeros(shape),
            )
        second = attached.second
        tail = self._tail(images) if second is None else second.tail
        return attached.objects(images, finish, count, tail)

    def calibrate(self, loader: Iterable[Any], *, progress: bool = False) -> Fidelity:
        """Learn from labelled held-out images what a distance says of a map; kept in the database.

        From then on ``explain_batch(details=True)`` gives

        - ``.confidence``, how probable it is that the map shows its own class: from the embedding
          of the map's hot pixels and how much nearer it is to that class than to any other
          (index="exact", k=1);
        - ``.fidelity``, the expected cosine between the map and the one that the image's own
          triplets would give, from the distance to the row.

        Print the result before relying on them: it says how well each tells right from wrong, and
        what a random row's map would have given. Save the database to keep it. The calibration
        belongs to these rows: ``append`` (with a warning), ``rebuild`` and ``Database.compress``
        drop it.

        Args:
            loader: as for :meth:`build`, of images that the database was not built from; images of
                classes that it does not know are left out and counted.
            progress: as for :meth:`build`.

        Returns:
            What was measured, with a random row's agreement next to it, see
            :class:`gcfast.explain.calibration.Fidelity`.

        Raises:
            NoDatabaseError: there is no database yet.
            TypeError, ValueError: as :meth:`explain_labelled`; fewer than ten images, or mostly
                images of the database.
        """
        self.attach()
        fidelity = transfer_fidelity(self, loader, progress=progress)
        attached = self.attach()
        calibration = calibrated(fidelity)
        attached.database.manifest[CALIBRATION] = calibration.to_dict()
        with self._lock:
            if self._attached is attached:  # its index stays, which may have taken long to make
                self._attached = replace(attached, calibration=calibration.to(attached.device))
        return fidelity
