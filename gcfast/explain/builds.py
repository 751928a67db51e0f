"""The calls of an explainer that make and change its database."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

from gcfast._log import told
from gcfast.builder.append import append, check_appendable
from gcfast.builder.build import build
from gcfast.builder.given.build import Given, build_from_embeddings
from gcfast.builder.given.sample import MIN_COSINE
from gcfast.builder.reread import reread
from gcfast.database.database import Database
from gcfast.database.manifest import CALIBRATION
from gcfast.errors import NoDatabaseError
from gcfast.explain.base import ExplainerBase


class DatabaseCalls(ExplainerBase):
    """Build, append, remove, relabel, rebuild."""

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
        vector-Jacobian products from the layer on; class proxies and ``method="elementwise"`` take
        one in any case. Memory is O(N D), for Grad-CAM++ and class proxies O(N (D + C)), spilled
        to temporary files above gcfast.builder.spool.SPOOL_MEMORY_BYTES.

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
        facts = {"method": self.settings.method, "out": out and os.fspath(out), "resume": resume}
        with told("build", "build", **facts) as found:
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
            found |= {"layer": self.layer_name, **database.report}
        self._set_database(database)
        return database

    def build_from_embeddings(
        self,
        embeddings: Any,
        labels: Any = None,
        *,
        sample: Any,
        check: Any,
        ids: Any = None,
        norms: Any = None,
        pooled: Any = None,
        min_cosine: float = MIN_COSINE,
        rows: str = "all",
        progress: bool = False,
        preprocessing: dict[str, Any] | None = None,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        storage: str = "float32",
    ) -> Database:
        """Build the database from embeddings that exist already; no image of theirs is run.

        For a model whose head is an affine map of the spatially averaged activations (with or
        without L2 norm), rows follow from the embeddings, but for a positive factor each, which is
        1 / |u|, the length of the embedding before it was normalized. Channels, their order and
        normalized maps of one neighbor are those of :meth:`build`. Without ``norms`` and ``pooled``
        (and where the embeddings are of unit length, so that they do not tell) the database says
        that its rows are ``relative``: ``normalize=None`` is then refused, and k > 1 warned of.
        With ``method="elementwise"`` any head will do, rows are those of :meth:`build`, and nothing
        beyond embeddings and labels is needed.

        Args:
            embeddings: [N, D] floating point, as the model gives them or normalized; or a
                ``faiss.Index`` of any kind that gives its vectors back, which stays as it is. What
                it compresses is taken as it decodes it. An array of unit vectors in float32 is not
                copied: leave it as it is.
            labels: [N], as the labels of a loader; or a mapping, from the index's ids where an
                index has ids other than 0 to N - 1 (its rows are then in the order of these), from
                ``ids`` elsewhere. Where there are none: "neighbors" or "neighbors:K" (each row's K
                nearest are its positives, 5 if not said, all others its negatives), or
                "kmeans:CENTERS" (its cluster's rows are). What needs true labels then refuses.
            sample: a few hundred images [n, 3, h, w] or batches of them, of the same kind: the
                head is found with the first, offsets are made with the mean activation of all.
            check: (images [n, 3, h, w], rows [n]), at least two of the embedded images and their
                rows, by number (an index's id) or by id. They are embedded and compared: nothing
                else shows that the embeddings are this model's.
            ids: [N] strings; None takes an index's ids, or the rows' numbers.
            norms: [N], |u| of each image, or a multiple of it.
            pooled: [N, C], each image's activations averaged over their places: ``norms`` and the
                mean activation are then computed from it. ``method="gradcam++"`` and "proxy" need
                it; the latter takes any head.
            min_cosine: of an image of ``check`` and its row, both less the mean of all rows, at
                least. Below SAME_COSINE of :mod:`gcfast.builder.given.sample` there is a warning.
            rows: "all" makes every row now. "on-demand" makes none: a row is made when an image's
                search first finds it, and kept; it is the one that "all" makes, but for rounding.
                Whatever needs all rows makes them (``save``, ``compress``, a column of the
                database). In memory alone, without CUDA graphs and export.
            progress: as for :meth:`build`.
            preprocessing: as for :meth:`build`.
            out: the folder to write the database to; None keeps it in memory.
            overwrite: replace a gcfast database at ``out``.
            storage: as for :meth:`build`.

        Returns:
            The database.

        Raises:
            TypeError, ValueError: columns of another kind or length; embeddings that the images of
                ``check`` do not have, with the cosine found; another head; as :meth:`build`.
            FileExistsError, GcfastError, OSError: as :meth:`gcfast.Database.save`.
        """
        with told("build", "build from embeddings", out=out and os.fspath(out)) as found:
            database = build_from_embeddings(
                self.network,
                Given(embeddings, labels, ids, norms, pooled),
                self.settings,
                sample=sample,
                check=check,
                min_cosine=min_cosine,
                preprocessing=preprocessing,
                out=out,
                overwrite=overwrite,
                storage=storage,
                rows=rows,
                progress=progress,
            )
            found |= database.report
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
        with told("build", "append", rows=len(stored)) as found:
            database = append(stored, self.network, loader, self.settings, progress=progress)
            found |= database.report
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
