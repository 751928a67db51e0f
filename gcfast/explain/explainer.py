"""The main class: build a database from labelled images, explain any image in one forward pass."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from gcfast._checks import require_int
from gcfast.builder.append import append, check_appendable
from gcfast.builder.build import build
from gcfast.builder.reread import reread
from gcfast.database.database import Database
from gcfast.database.manifest import CALIBRATION
from gcfast.errors import NoDatabaseError
from gcfast.explain.attached import Attached, check_database
from gcfast.explain.calibration import Fidelity, calibrated, transfer_fidelity
from gcfast.explain.cuda_graphs import Graphs
from gcfast.explain.export import ExportedExplainer
from gcfast.explain.own_maps import labelled_maps, proxy_maps, triplet_maps
from gcfast.explain.result import Explanation, Finish, MapOptions, ObjectMaps, TripletMaps
from gcfast.explain.second_look import SecondLook
from gcfast.explain.stream import overlapped
from gcfast.method.labels import numbers_like
from gcfast.method.objectives import LossFunction, Objective, TripletLoss
from gcfast.method.settings import Settings
from gcfast.method.tail import Tail
from gcfast.model.finer import Refine
from gcfast.model.network import Network
from gcfast.model.tokens import Reshape
from gcfast.search.transfer import ExactTransfer

STREAM_DEPTH = 1  # batches that wait for their transfer while the next one is in the model


class Explainer:
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
        method: "gradcam" or "gradcam++"; or "proxy", which goes beyond the paper: the contrasted
            proxy of the nearest row's class weighs the channels (:mod:`gcfast.method.proxies`).
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
            captured runs without graphs, with one warning. Needs ``index="exact"``, without which
            "auto" is False.

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
        if cuda_graphs is True and not self._exact:
            raise ValueError("`index` must be 'exact' with `cuda_graphs`, which FAISS cannot be in")
        if not isinstance(requery, bool):
            raise TypeError(f"`requery` must be a bool, got {requery!r}")
        self.requery = requery
        if requery and (why := self.unrated) is not None:
            raise ValueError(f"`requery` must be False: {why}")
        self.network = Network(model, layer, output_key=output_key, reshape=reshape, refine=refine)
        self._graphs: Graphs | None = None
        if cuda_graphs is not False and self._exact:
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

    def build(
        self,
        loader: Iterable[Any],
        *,
        progress: bool = False,
        preprocessing: dict[str, Any] | None = None,
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        storage: str = "float32",
    ) -> Database:
        """Build the database from labelled images, and explain from it from now on.

        This takes one forward pass over the images if the head is an affine map of the spatially
        averaged activations (with or without L2 norm), otherwise two, the second with
        vector-Jacobian products from the layer on; class proxies take one in any case. Memory is
        O(N D), for Grad-CAM++ and class proxies O(N (D + C)), spilled to temporary files above
        gcfast.builder.spool.SPOOL_MEMORY_BYTES.

        With ``out`` the embeddings and the rows are written there as they are made, and are a
        database once the manifest is written at the end. If the build is killed, ``resume``
        continues it after the last complete write and gives the same rows. Finished batches do not
        go through the model again, except one, which must give the embeddings it gave before. A
        database that is to be replaced can be read until then; no other process can write to it.

        Args:
            loader: any iterable of (images, labels) or (images, labels, ids), a list included:
                images [B, 3, h, w] floating point, moved to the model's device and dtype; labels
                [B] whole numbers or names (real numbers for a ``RankLoss``); ids [B] strings. It
                must give the same images in the same order in every pass.
            progress: show bars on stderr, or where that is no terminal a line every half minute.
            preprocessing: anything that JSON can hold, kept in the manifest.
            out: the folder to write the database to as it is made; None keeps it in memory.
            resume: continue the unfinished build of ``out``, if there is one. With another
                ``storage`` its rows are made again from its embeddings.
            overwrite: replace a gcfast database at ``out``, once the new one is complete.
            storage: "float32" or "float16" for the rows' embeddings and weights.

        Returns:
            The database, its rows in the loader's order.

        Raises:
            TypeError, ValueError: a loader that gives something else, no labels, one class only,
                or other images the second time; NaN, with the row; more channels than C; an
                unfinished build with other settings; weights that float16 cannot hold.
            ModelMismatchError: the unfinished build is of another model.
            FileExistsError: something is at ``out``, or an unfinished build that is not resumed.
            DamagedDatabaseError: a file of the unfinished build is missing or cut off.
            GcfastError: another process is building there, or writes to what is to be replaced.
            OSError: the disk is full, or another failure to write; ``resume`` continues later.
        """
        database = build(
            self.network,
            loader,
            self.settings,
            progress=progress,
            preprocessing=preprocessing,
            out=out,
            resume=resume,
            overwrite=overwrite,
            storage=storage,
        )
        self._set_database(database)
        return database

    def append(self, loader: Iterable[Any], *, progress: bool = False) -> Database:
        """Add rows for further images to the database, and explain from it from now on.

        The new rows draw their triplets from the stored and the new embeddings together. Stored
        rows, the mean activation and the offsets do not change; the manifest's ``older_rows``
        counts the rows that have not drawn from the newest ones, which :meth:`rebuild` renews. An
        image that was left out before still has no row. A stored index must be made again. A
        calibration was measured on the stored rows alone: it is dropped with a warning.

        A database with a folder gets new shards there and then the manifest that names them, so
        that a reader sees the old rows or all of them; no other process can write to it meanwhile.

        Args:
            loader: as for :meth:`build`; one label is enough.
            progress: as for :meth:`build`.

        Returns:
            The database with all rows, the new ones last.

        Raises:
            NoDatabaseError: there is no database yet.
            ModelMismatchError: the model has changed since the database was built.
            TypeError, ValueError: as :meth:`build`; settings other than the database's.
            GcfastError: a compressed database; one that another process writes to, or has changed.
        """
        stored = self._to_edit("append to")
        dropped = CALIBRATION in stored.manifest
        database = append(stored, self.network, loader, self.settings, progress=progress)
        self._set_database(database)
        if dropped:
            warnings.warn(
                "the database's calibration was of the rows before these and is dropped: "
                "`confidence` and `fidelity` are None until calibrate(loader) is called again",
                stacklevel=2,
            )
        return database

    def remove(self, loader: Iterable[Any]) -> Database:
        """Take the rows of given images out of the database, and explain from the rest.

        For ``method="proxy"``, whose classes lose what these images added to them; where whole
        classes go, and for gradients, :meth:`Database.remove` needs the ids alone.

        Args:
            loader: (images, labels, ids) as for :meth:`build`, of the rows that go; their labels
                are not looked at.

        Returns:
            The changed database.

        Raises:
            NoDatabaseError: there is no database yet.
            ModelMismatchError: the model has changed since the database was built.
            TypeError, ValueError: as :meth:`build`; ids of no row, or an image with another
                embedding than its row's.
            GcfastError, OSError: as :meth:`Database.remove`.
        """
        database = self._to_edit("remove from")
        given = reread(database, self.network, loader, self.settings)
        database = database.remove(given.ids, directions=given.directions)
        self._set_database(database)
        return database

    def relabel(self, loader: Iterable[Any]) -> Database:
        """Give the rows of given images the labels that the loader has for them.

        For ``method="proxy"``, as :meth:`remove`; otherwise :meth:`Database.relabel` will do.

        Args:
            loader: (images, new labels, ids) as for :meth:`build`, of the rows that change.

        Returns:
            The changed database.

        Raises:
            NoDatabaseError, ModelMismatchError, TypeError, ValueError, GcfastError, OSError: as
                :meth:`remove`.
        """
        database = self._to_edit("relabel")
        given = reread(database, self.network, loader, self.settings)
        labels = dict(zip(given.ids, given.labels, strict=True))
        database = database.relabel(labels, directions=given.directions)
        self._set_database(database)
        return database

    def _to_edit(self, what: str) -> Database:
        if self._database is None:
            raise NoDatabaseError(f"there is no database to {what}: call build(loader) first")
        return self._database

    def rebuild(
        self, loader: Iterable[Any], *, progress: bool = False, resume: bool = False
    ) -> Database:
        """Replace the database by a new build in the same place, storage and preprocessing.

        A stored index and a calibration belong to the old rows and are dropped with them.

        Args:
            loader: all the images, as for :meth:`build`.
            progress: as for :meth:`build`.
            resume: continue an unfinished rebuild, if there is one.

        Raises:
            NoDatabaseError: there is no database yet.
            ModelMismatchError: the model has changed since the database was built.
            TypeError, ValueError: as :meth:`build`; settings other than the database's.
            GcfastError: a compressed database; and as :meth:`build`.
            FileExistsError: an unfinished rebuild that is not resumed.
        """
        old = self._to_edit("rebuild")
        check_appendable(old, self.network, self.settings)
        return self.build(
            loader,
            progress=progress,
            preprocessing=old.manifest.get("preprocessing"),
            out=old.path,
            resume=resume,
            overwrite=old.path is not None,
            storage=old.storage,
        )

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
        if not self._replays(images):
            return attached.result(attached.explain(images, finish, rates=rates), details)
        assert self._graphs is not None
        return self._graphs.run(
            self.network.prepared(images),
            lambda images: attached.explain(images, finish, rates=rates),
            lambda out: attached.result(out.copied() if details else out.copied_maps(), details),
            owner=attached,
            key=(finish, rates),
        )

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
            if len(images) == 0 or self._replays(images):
                explained = self.explain_batch(images, details=details, **options)
                return lambda: explained
            finish = self._finish(images, options)
            attached = self.attach(finish, images=images)
            finished = attached.begin(images, finish, rates=details and attached.rated)
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

    def explain_labelled(
        self, images: Tensor, labels: Any, **options: Unpack[MapOptions]
    ) -> Tensor:
        """Return maps from the images' own triplets against the database, which transfer estimates.

        With ``method="proxy"`` the proxies of the given labels make them, whatever is nearest.

        Args:
            images: as for :meth:`explain_batch`.
            labels: [B] whole numbers or names, of the database's classes; real numbers for a
                ``RankLoss``.
            **options: as for :meth:`explain_batch`.

        Returns:
            [B, OH, OW] float32; zeros for a label that no row of the database has.

        Raises:
            NoDatabaseError, TypeError, ValueError: as :meth:`explain_batch`, and for labels that
                the database does not know; an objective over the other kind of labels than the
                database has.

        Source: paper, section 3.2 and its Figure 3.
        """
        images = self.network.checked("images", images)
        finish = self._finish(images, options)
        attached = self.attach(finish)
        database = attached.database
        if attached.proxies is not None:
            names, rows = database.class_names, database.labels
            numbers = numbers_like(rows, names, labels, len(images), real_labels=False)
            return proxy_maps(self.network, attached.proxies, images, numbers, finish)
        return labelled_maps(self.network, self.settings, database, images, labels, finish)

    def explain_triplet(
        self, anchor: Tensor, positive: Tensor, negative: Tensor, **options: Unpack[MapOptions]
    ) -> TripletMaps:
        """Return maps of given triplets: Grad-CAM on the objective itself, no database needed.

        The hinge of a triplet that is solved already has no gradient; it is ignored with
        ``on_no_triplet="hardest"``, and with "skip" the maps of such a triplet are zeros.

        Args:
            anchor: [B, 3, h, w], as for :meth:`explain_batch`.
            positive: [B, 3, h, w], of the anchors' labels.
            negative: [B, 3, h, w], of other labels.
            **options: as for :meth:`explain_batch`; ``center`` other than 0 needs a database.

        Returns:
            Maps of the anchors, positives and negatives, [B, OH, OW] float32 each.

        Raises:
            NoDatabaseError: ``center`` without a database.
            TypeError, ValueError: as :meth:`explain_batch`; ``method="proxy"``.

        Source: paper, section 3.1.
        """
        if self.settings.is_proxy:
            raise ValueError(
                "`method` must be 'gradcam' or 'gradcam++' to explain a triplet, got 'proxy', "
                "which has no gradient: explain_labelled shows what speaks for a class"
            )
        self._finish(torch.empty(0, 3, 1, 1), options)
        return triplet_maps(
            self.network,
            self.settings,
            (anchor, positive, negative),
            lambda: self.attach().database.mean_activation,
            options,
        )

    def export(self, *, details: bool = False, **options: Unpack[MapOptions]) -> ExportedExplainer:
        """Return the explainer as one module without hooks, for torch.compile and torch.export.

        It maps images [B, 3, h, w] to what :meth:`explain_batch` maps them to, in one graph
        (``fullgraph=True``). Its parameters are the model's own; the database's tables are buffers.
        If a pass was made before (``build``, ``explain_batch``), what it showed is used:
        channels-last input where the model takes it, and no copy of the activations where no later
        layer writes over them.

        Args:
            details: give (maps, embeddings, neighbors, distances, labels) instead of the maps.
            **options: as for :meth:`explain_batch`, and fixed from now on.

        Raises:
            NoDatabaseError: there is no database yet.
            UnsupportedModelError: a model that cannot be copied.
            TypeError, ValueError: an argument of the wrong kind or out of range; an ``index`` that
                is not exact, since FAISS cannot be part of a graph; with ``refine``, no map made
                before.
        """
        finish = self._finish(torch.empty(0, 3, 1, 1), options)
        if not self._exact:
            raise ValueError(f"`index` must be 'exact' to be exported, got {self.index!r}")
        if self.requery:
            raise ValueError("`requery` must be False to be exported, got True")
        attached = self.attach(finish)
        transfer = attached.transfer
        assert isinstance(transfer, ExactTransfer)
        finer = self.network.finer
        if finer is None or any(network.clone is None for network in finer):
            raise ValueError(
                "`refine` must be known from a pass before it is exported, which layers and how: "
                "call explain_batch on an image first"
            )
        return ExportedExplainer(
            self.network,
            transfer,
            finish._replace(size=(0, 0)) if options.get("size") is None else finish,
            proxies=attached.proxies,
            l2_normalize=self.settings.l2_normalize,
            details=details,
        )

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

    def _finish(self, images: Tensor, options: MapOptions) -> Finish:
        finish = Finish.checked(images, **options)
        if not finish.relu and self.network.refine is not None:
            raise ValueError(
                "`relu` must be True with `refine`, which works on where a map is positive, got "
                "False"
            )
        return finish

    @property
    def _exact(self) -> bool:
        return isinstance(self.index, str) and self.index == "exact"

    def _replays(self, images: Tensor) -> bool:
        """Whether a CUDA graph may stand for the forward pass and the maps."""
        if self._graphs is None or images.is_cuda:
            return self._graphs is not None
        if self._graphs.auto:
            return False
        raise ValueError(f"`cuda_graphs` must not be True for a model on {images.device}, got True")

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
            images: [B, 3, h, w]; where a second look is wanted, the first ones are the probe of the
                model's head.
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
            device = self.network.device(torch.device("cpu"))
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
            attached = self._attached
            look = self.requery or rates or attached.rated
            if look and attached.second is None and images is not None and len(images):
                transfer = attached.transfer
                assert isinstance(transfer, ExactTransfer)
                second = SecondLook(self._tail(images), transfer, self.requery)
                self._attached = attached = replace(attached, second=second)
        if finish is not None and finish.center != 0 and attached.proxies is not None:
            raise ValueError(
                "`center` must be left out with method='proxy', whose classes are contrasted "
                f"already, got {finish.center}"
            )
        return attached
