"""The methods of an explainer that make its database."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

from gcfast.builder.append import append, check_appendable
from gcfast.builder.build import build
from gcfast.database.database import Database
from gcfast.errors import NoDatabaseError
from gcfast.explain.calibration import KEY
from gcfast.explain.explainer_state import ExplainerState


class Building(ExplainerState):
    """``build``, ``append`` and ``rebuild`` of :class:`gcfast.Explainer`."""

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

        One forward pass over the images where the head is an affine map of the spatially averaged
        activations (with or without L2 norm); for any other head a second one, with
        vector-Jacobian products from the layer on. Memory: O(N D), for Grad-CAM++ O(N (D + C)),
        spilled to temporary files above gcfast.builder.spool.SPOOL_MEMORY_BYTES.

        With ``out`` the spool and the rows are written as they are made, in ``out.partial``, which
        becomes ``out`` at the end: a build that is killed goes on with ``resume``, at the last
        images or the last shard of rows that were whole, and gives the same rows. Batches that are
        done are not put through the model again, but for one, which has to give the embeddings
        it gave before.

        Args:
            loader: any iterable of (images, labels) or (images, labels, ids), a list included:
                images [B, 3, h, w] floating point, moved to the model's device and dtype; labels
                [B] whole numbers or names (real numbers for a ``RankLoss``); ids [B] strings. It
                must give the same images in the same order each time it is gone through.
            progress: show bars on stderr.
            preprocessing: anything that JSON can hold, kept in the manifest.
            out: the folder to write the database to as it is made; None keeps it in memory.
            resume: go on with the unfinished build of ``out``, if there is one. With another
                ``storage`` than it had its rows are made anew, from the embeddings that it has.
            overwrite: replace a gcfast database at ``out``, once the new one is whole.
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
            OSError: the disk is full, or another failure to write; ``resume`` goes on later.
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
        rows, the mean activation and the offsets stay as they are; the manifest's ``older_rows``
        counts the rows that have not drawn from the newest ones, which :meth:`rebuild` renews. An
        image that was left out before, the only one of its label or (``on_no_triplet="skip"``) one
        without a valid triplet, has no row that could lend itself. A stored index has to be made
        anew, and so has a calibration: it was measured on the stored rows alone, so it is dropped
        with a warning, and ``explain_batch(details=True).confidence`` is None until ``calibrate``.

        A database with a folder gets new shards there and then the manifest that names them, so
        that a reader sees the old rows or all of them; one in memory stays there.

        Args:
            loader: as for :meth:`build`; one label is enough.
            progress: show bars on stderr.

        Returns:
            The database with all rows, the new ones last.

        Raises:
            NoDatabaseError: there is no database yet.
            ModelMismatchError: the model has changed since the database was built.
            TypeError, ValueError: as :meth:`build`; settings other than the database's.
            GcfastError: a compressed database; one that another process writes to, or has changed.
        """
        if self._database is None:
            raise NoDatabaseError("there is no database to append to: call build(loader) first")
        calibrated = KEY in self._database.manifest
        database = append(self._database, self.network, loader, self.settings, progress=progress)
        self._set_database(database)
        if calibrated:
            warnings.warn(
                "the database's calibration was of the rows before these and is dropped: "
                "`confidence` is None until calibrate(loader) is called again",
                stacklevel=2,
            )
        return database

    def rebuild(
        self, loader: Iterable[Any], *, progress: bool = False, resume: bool = False
    ) -> Database:
        """Build the database anew where it is, with its storage and preprocessing.

        A stored index and a calibration are of the old rows, and go with them.

        Args:
            loader: all the images, as for :meth:`build`.
            progress: show bars on stderr.
            resume: go on with an unfinished rebuild, if there is one.

        Raises:
            NoDatabaseError: there is no database yet.
            ModelMismatchError: the model has changed since the database was built.
            TypeError, ValueError: as :meth:`build`; settings other than the database's.
            GcfastError: a compressed database; and as :meth:`build`.
            FileExistsError: an unfinished rebuild that is not resumed.
        """
        old = self._database
        if old is None:
            raise NoDatabaseError("there is no database to rebuild: call build(loader) first")
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
