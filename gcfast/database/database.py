"""The database: for each training image its embedding and its few strongest grad-weights.

On disk it is a folder: ``manifest.json``, which describes everything, and shards of rows in
safetensors. Nothing in it is pickled.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcfast._checks import require_int
from gcfast.database import edit
from gcfast.database import index as stored_index
from gcfast.database.columns import Columns
from gcfast.database.compress import compressed
from gcfast.database.float16 import Conversion
from gcfast.database.ids import Ids
from gcfast.database.manifest import opened
from gcfast.database.members import Members, MembersFile, PackedMembers
from gcfast.database.shards import FIELDS, MappedFile, Shard
from gcfast.database.write import write_database
from gcfast.errors import GcfastError, NoDatabaseError
from gcfast.method.labels import label_name
from gcfast.method.proxies import Classes
from gcfast.method.settings import ELEMENTWISE

VERIFY_BYTES = 256 * 2**20  # up to which `open` compares checksums: a fifth of a second to read


class Database(Columns):
    """Rows in the order of the training images, as CPU tensors; memory-mapped if opened.

    An opened database reads a page of its rows when it is first touched, and any number of threads
    and processes may read it. ``shards`` gives the rows without joining them. Each column below is
    one tensor; where there are several shards that is a copy, made at first use and kept.

    Attributes:
        embeddings: [N, D] float32, or float16 where it is stored so.
        channels: [N, M] int64, by falling weight.
        weights: [N, M] float32, raw (the scale of the paper's Eq. 6), of the signed gradient, so
            that larger is kept for either evidence. For ``method="elementwise"``, whose rows have
            M = 0 channels, [N, D]: see ``cotangents``.
        offsets: [N] float32: sum over m of w_m times channel m's mean activation over the training
            images and pixels.
        labels: [N] int64; with names where those were strings (see :meth:`label_name`). float64
            where it was built with an objective over real-valued labels.
        triplet_counts: [N] int64, valid pairs of the row; estimates for ``estimated_counts`` of the
            rows in the report, which were not compared with all the others.
        ids: the images' names, a sequence of N strings; if opened, decoded as they are read.
        manifest: everything else, as in the manifest's JSON: settings, layer, fingerprint of the
            model, mean activation, counts of the build.
        path: the folder it was opened from or last saved to; None before that.
        classes: sums of its rows' pooled activations by class, for ``method="proxy"``, whose rows
            have M = 0 channels; None for other methods. ``proxies`` are made of them.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        ids: Sequence[str],
        manifest: dict[str, Any],
        path: Path | None = None,
        *,
        classes: Classes | None = None,
    ) -> None:
        rows = Shard(**{field: tensors[field] for field in FIELDS})
        self._fill([rows], ids, manifest, path, classes=classes)

    def _fill(
        self,
        shards: Sequence[Shard],
        ids: Sequence[str],
        manifest: dict[str, Any],
        path: Path | None = None,
        *,
        classes: Classes | None = None,
        unverified: Sequence[MappedFile] = (),
    ) -> None:
        super().__init__(shards, manifest, unverified=unverified)
        self.ids = ids
        self.path = path
        self.classes = classes
        self._checked = bool(unverified)
        self.members: Members | PackedMembers | None = None
        self._members_file: MembersFile | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path, which the other process opens.

        Raises:
            TypeError: a database that is in memory alone.
        """
        if self.path is None:
            raise TypeError("a database in memory cannot be pickled: save it, and open it there")
        return type(self).open, (os.fspath(self.path),)

    def __repr__(self) -> str:
        kept = f"M={self.m}" if self.classes is None else f"{len(self.classes.labels)} proxies"
        return f"Database({len(self)} rows, D={self.dim}, {kept}, path={self.path})"

    @property
    def class_names(self) -> list[str]:
        """Names of the labels 0, 1, …; empty where labels were numbers."""
        return list(self.manifest["class_names"])

    @property
    def report(self) -> dict[str, int]:
        """Counts of the build: images, rows, and what was left out or fell back, and why."""
        return dict(self.manifest["report"])

    @property
    def mean_activation(self) -> Tensor:
        """Mean of each channel over the training images and pixels, [C] float32."""
        return torch.tensor(self.manifest["mean_activation"], dtype=torch.float32)

    @property
    def proxies(self) -> Tensor:
        """The contrasted proxies of ``classes.labels``, [K, C] float32, see method="proxy".

        Raises:
            GcfastError: a database of another method, which has none.
            DamagedDatabaseError: as ``shards``.
        """
        self._verify()
        if self.classes is None:
            raise GcfastError(
                "a database of gradients has no class proxies: build one with method='proxy'"
            )
        return self.classes.proxies()

    @property
    def cotangents(self) -> Tensor:
        """What rows lend with method="elementwise", [N, D] float32, see there.

        Raises:
            GcfastError: a database of another method.
            DamagedDatabaseError: as ``shards``.
        """
        if self.manifest["settings"].get("method") != ELEMENTWISE:
            raise GcfastError(
                "a database of another method has no cotangents: build one with "
                "method='elementwise'"
            )
        return self.weights

    def label_name(self, label: float) -> str:
        """Return the class name of a label, or the number where labels have no names; "" for -1."""
        return label_name(label, self.manifest["class_names"])

    def members_of(self, row: int) -> list[str]:
        """Return the ids of the rows that a row of a compressed database stands for.

        Raises:
            GcfastError: the database is not compressed.
            DamagedDatabaseError: the file of the members is not what was written.
        """
        if self.members is None:
            raise GcfastError("a database that is not compressed has no members: row 0 is itself")
        require_int("row", row, 0, len(self) - 1)
        if self._members_file is not None and self._checked:
            self._members_file.verify()
        return self.members.of_center(row)

    @property
    def index_path(self) -> Path | None:
        """The file of the stored index; None where the manifest names none."""
        if self.path is None or "index" not in self.manifest:
            return None
        return self.path / str(self.manifest["index"]["file"])

    def build_index(self, factory: str) -> None:
        """Make a FAISS index of the rows and store it in the database's folder.

        Args:
            factory: a FAISS factory string, "IVF4096,PQ32" for one; trained on 2^20 rows at most.

        Raises:
            NoDatabaseError: the database is in memory only.
            MissingExtraError: FAISS is not installed.
            TypeError, ValueError: not a factory string, or too few rows to train it.
            GcfastError: the folder has changed since it was opened, or another process writes to
                it.
            OSError: the disk is full, or another failure to write; the database is as it was.
        """
        if self.path is None:
            raise NoDatabaseError("there is no folder to store an index in: save the database")
        index = stored_index.made(factory, self.shards)
        entry = stored_index.store(index, factory, self.path, self.manifest)
        self.manifest = {**self.manifest, "index": entry}

    def read_index(self) -> Any:
        """Read the stored FAISS index; compare its checksum unless ``open`` was told not to.

        Raises:
            MissingExtraError: FAISS is not installed.
            NoDatabaseError: none is stored.
            GcfastError: the rows have changed since the index was made or the database opened.
            DamagedDatabaseError: the file is missing, truncated, or not what was written.
        """
        manifest = self.manifest
        index, entry = stored_index.read(self.path, manifest, len(self), verify=self._checked)
        self.manifest = {**manifest, "index": entry}
        return index

    def compress(self, centers: int = 50, *, seed: int = 0, iterations: int = 25) -> Database:
        """Make the paper's compressed database: k-means centers of the embeddings, as rows.

        A center's grad-weights are the M highest of the mean over its rows, where a channel that a
        row did not keep counts as 0; its offset is computed from them. Its label is the most
        frequent one (ties to the smaller; the mean of real-valued labels), its id that of the row
        nearest to it. A center's cotangent is the mean of its rows'. ``members_of`` gives the ids
        of all its rows, and the manifest counts them.
        Centers are not normalized; they are searched by L2 like any rows. A calibration is dropped,
        because a distance to a center means something else: calibrate an explainer of the centers
        again. Memory: [centers, C] float64 and 256 embeddings per center.

        Args:
            centers: how many; empty ones, which FAISS rarely leaves, are dropped.
            seed: of the k-means.
            iterations: of the k-means.

        Returns:
            A database in memory; embeddings and weights are float32.

        Raises:
            MissingExtraError: FAISS is not installed.
            TypeError, ValueError: an argument out of range; a compressed database.

        Source: the paper's experiments with a database of k-means centers.
        """
        rows, ids, manifest, members = compressed(
            self.shards, self.ids, self.manifest, centers, seed=seed, iterations=iterations
        )
        # What explains stays with the classes, which the centers only name.
        one = Database(rows._asdict(), ids, manifest, classes=self.classes)
        one.members = members
        return one

    def remove(self, ids: Iterable[str], *, directions: Tensor | None = None) -> Database:
        """Return the database without the rows of some images.

        A database with a folder is changed there: shards that lose rows are written anew, and then
        the manifest, so that a reader sees the old rows or the new. The rows that stay keep their
        weights, some of which come from triplets with removed images: all count as ``older_rows``
        until ``Explainer.rebuild``. A stored index and a calibration are dropped with a warning.

        Class proxies (``classes``) stay exact: they become those of the rows that stay. What a row
        added to its class is not stored, so that without ``directions`` whole classes go alone.

        Args:
            ids: of the images, as ``ids`` has them.
            directions: [n, C], of ``method="proxy"``: what the image of each id adds to its class,
                which :meth:`gcfast.Explainer.remove` computes from the images.

        Returns:
            The changed database, opened anew; in memory where this one is. This one stays as it is.

        Raises:
            TypeError, ValueError: ids that are no strings, come twice or are of no row; all rows.
            GcfastError: a compressed database; one that another process writes to, or has changed;
                a part of a class without ``directions``.
            OSError: the disk is full, or another failure to write; the database is as it was.
        """
        return self._edited(edit.removal(self, ids, directions))

    def relabel(self, labels: Mapping[str, Any], *, directions: Tensor | None = None) -> Database:
        """Return the database with other labels for some images.

        It is written as :meth:`remove` does. A new name gets the next number, and a name that no
        row has any more keeps its own. Weights stay, and come from triplets by the labels before:
        all rows count as ``older_rows``. A calibration is dropped with a warning; a stored index
        stays. Class proxies stay exact, as by :meth:`remove`.

        Args:
            labels: the new label of each id: a name or a number, as the database's are.
            directions: as for :meth:`remove`, which :meth:`gcfast.Explainer.relabel` computes.

        Returns:
            The changed database, as :meth:`remove`.

        Raises:
            TypeError, ValueError: labels of another kind than the database's; ids that are of no
                row, or no strings.
            GcfastError, OSError: as :meth:`remove`.
        """
        return self._edited(edit.relabelling(self, labels, directions))

    @staticmethod
    def merge(
        *databases: Database,
        out: str | os.PathLike[str] | None = None,
        prefixes: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> Database:
        """Return one database of the rows of several, one after another.

        Labels are matched by name. The mean activation is that of all, each weighted by its number
        of images, and the offsets are made anew with it. No row has drawn its triplets from another
        database's images: all count as ``older_rows``. Ids of pictures in different folders
        (``preprocessing["images"]``) become paths from the folder that has them all.

        Args:
            databases: two or more, of one model, layer, settings, preprocessing and storage.
            out: the folder to write to; None keeps the rows in memory.
            prefixes: one for each database, put before its ids.
            overwrite: replace a gcfast database at ``out``.

        Raises:
            TypeError, ValueError: fewer than two databases, or other settings; an id of two rows.
            ModelMismatchError: other models.
            GcfastError: a compressed database; another process writes to ``out``.
            FileExistsError, OSError: as :meth:`save`.
        """
        for one in databases:
            if not isinstance(one, Database):
                raise TypeError(
                    f"`databases` must be gcfast.Database, got {type(one).__name__}; "
                    "gcfast.Database.open reads one"
                )
        if len(databases) < 2:
            raise ValueError(f"`databases` must be two or more, got {len(databases)}")
        merged = edit.Merged(databases, prefixes)
        if out is None:
            rows = merged.rows(0, len(merged.ids))._asdict()
            return Database(rows, merged.ids, merged.manifest, classes=merged.classes)
        target = Path(out).absolute()
        write_database(
            target,
            merged.manifest,
            merged.rows,
            merged.ids,
            None,
            merged.classes,
            overwrite=overwrite,
        )
        return Database.open(target)

    def _edited(self, change: edit.Change) -> Database:
        """Return the database with a change made, in its folder or in memory."""
        names = {"index": "the stored index", "calibration": "the calibration"}
        dropped = [names[key] for key in change.dropped if key in self.manifest]
        if self.path is None:
            parts = edit.applied(self, change)
            one = Database.__new__(Database)
            one._fill(parts.shards, parts.ids, parts.manifest, classes=change.classes)
        else:
            edit.written(self.path, self, change)
            one = Database.open(self.path)
        if dropped:
            warnings.warn(
                f"{' and '.join(dropped)} of the database held for the rows before and "
                f"{'are' if len(dropped) > 1 else 'is'} dropped: gcfast index and calibrate make "
                "them again",
                stacklevel=3,
            )
        return one

    def extended(
        self,
        rows: Shard,
        ids: Sequence[str],
        manifest: dict[str, Any],
        classes: Classes | None = None,
    ) -> Database:
        """Return a database in memory of these rows and further ones, none of them copied."""
        one = Database.__new__(Database)
        one._fill([*self.shards, rows], [*self.ids, *ids], manifest, classes=classes)
        return one

    def in_storage(self, storage: str) -> Database:
        """Return the database in memory, with embeddings and weights in float32 or float16.

        It is this database if that is its storage already. Offsets are computed again from the
        rounded weights.

        Raises:
            ValueError: another ``storage``, or weights that float16 cannot hold; it names the row.
        """
        conversion = Conversion(self.manifest, self.rows, storage)
        if not conversion.changes:
            return self
        rows = conversion.rows(0, len(self))._asdict()
        one = Database(rows, self.ids, conversion.manifest, classes=self.classes)
        one.members, one._members_file = self.members, self._members_file
        return one

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, storage: str | None = None
    ) -> None:
        """Write the database as a folder, as a whole or not at all.

        :mod:`gcfast.database.write` has the order of writing. A stored index is not copied.

        Args:
            path: the folder to make.
            overwrite: replace a gcfast database that is there.
            storage: "float32" or "float16" for embeddings and weights; None for no change. If it
                changes, this database stays as it is, and so does its ``path``.

        Raises:
            FileExistsError: ``path`` exists, and may not or must not be replaced.
            ValueError: another ``storage``, or weights that float16 cannot hold.
            DamagedDatabaseError: this database was opened and is not what was written.
            GcfastError: another process writes to the database at ``path``.
            OSError: the disk is full, or another failure to write; ``path`` is as it was.
        """
        conversion = Conversion(
            self.manifest, self.rows, self.storage if storage is None else storage
        )
        target = Path(path).absolute()
        _ = self.shards  # compares checksums, so that damage is not copied
        if self.members is not None:
            self.members_of(0)  # compares theirs
        manifest = write_database(
            target,
            conversion.manifest,
            conversion.rows,
            self.ids,
            self.members,
            self.classes,
            overwrite=overwrite,
        )
        if not conversion.changes:
            self.manifest, self.path = manifest, target

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool | None = None) -> Database:
        """Open a database folder; rows are memory-mapped and read as they are needed.

        That all shards are there, their sizes and their headers are always checked.

        Args:
            path: the folder.
            verify: whether to compare files with their checksums, which reads all of them. True:
                every file now, members and index too. False: never. None: the shards now if they
                have at most ``gcfast.database.database.VERIFY_BYTES`` together, else when rows are
                first used; members and index when they are read.

        Raises:
            NoDatabaseError: there is no database at ``path``.
            DamagedDatabaseError: the manifest or a file is missing, truncated or not as written.
            GcfastError: written by a newer version.
        """
        folder = Path(path).absolute()
        manifest, shards, members, classes = opened(Path(path))
        files = [*shards, *([] if classes is None else [classes])]
        one = cls.__new__(cls)
        one._fill(
            [shard.tensors for shard in shards],
            Ids([shard.ids for shard in shards]),
            manifest,
            folder,
            classes=None if classes is None else classes.classes,
            unverified=files if verify is not False else (),
        )
        if members is not None:
            one._members_file, one.members = members, members.members
        if verify or (verify is None and sum(file.bytes for file in files) <= VERIFY_BYTES):
            _ = one.shards
        if verify and members is not None:
            members.verify()
        if verify and "index" in manifest:
            stored_index.verify_file(folder, manifest)
        return one
