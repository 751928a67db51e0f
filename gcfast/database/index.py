"""A FAISS index of a database's rows, kept in its folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gcfast._extras import import_faiss
from gcfast.database.files import require_file
from gcfast.database.manifest import read_manifest, require_same_rows
from gcfast.database.shards import Shard
from gcfast.database.write import INDEX, commit, disk_errors, write_file, writing
from gcfast.errors import DamagedDatabaseError, GcfastError, NoDatabaseError

Used = TypeVar("Used")

AGAIN = "gcfast index, or Database.build_index, makes it again"
TRAINING_ROWS = 2**20  # an index is trained on at most so many, evenly spread


def made(factory: str, shards: list[Shard], *, name: str = "factory") -> Any:
    """Make a FAISS index of all rows, in order.

    Args:
        factory: a FAISS factory string.
        shards: the rows.
        name: what the caller calls the string.

    Raises:
        MissingExtraError: FAISS is not installed.
        TypeError: not a string.
        ValueError: an unknown factory string, or too few rows to train it.
    """
    faiss = import_faiss(name)
    if not isinstance(factory, str):
        raise TypeError(f"`{name}` must be a FAISS factory string, got {factory!r}")
    try:
        index = faiss.index_factory(shards[0].embeddings.shape[1], factory)
    except RuntimeError as error:
        raise ValueError(
            f"`{name}` must be a FAISS factory string, got {factory!r}: {error}"
        ) from error
    try:
        if not index.is_trained:
            index.train(as_array(spread(shards, TRAINING_ROWS)))
    except RuntimeError as error:
        count = sum(len(shard.labels) for shard in shards)
        raise ValueError(
            f"`{name}` must be trainable on the database's {count} rows, got {factory!r}: {error}"
        ) from error
    for shard in shards:
        index.add(as_array(shard.embeddings))
    return index


def store(index: Any, factory: str, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Store an index in a database folder, as :mod:`gcfast.database.write` describes.

    Args:
        index: of the database's rows.
        factory: what it was made with.
        folder: the database's.
        manifest: of the rows that are indexed.

    Returns:
        What the manifest says of it.

    Raises:
        GcfastError: the database has changed, or another process writes to it.
        OSError: the disk is full, or another failure to write; the database is as it was.
    """
    faiss = import_faiss("factory")

    def fill(write: Callable[[bytes], None]) -> None:
        try:
            # FAISS's own files end silently short where the last of them cannot be written.
            faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        except RuntimeError as error:
            raise OSError(None, f"FAISS: {error}") from error

    with (
        writing(folder, lambda: require_same_rows(folder, manifest)) as stored,
        disk_errors(folder, "index of"),
    ):
        entry = write_file(folder, INDEX, fill) | {"factory": factory, "rows": index.ntotal}
        commit(folder, stored | {"index": entry})
    return entry


def read(
    folder: Path | None, manifest: dict[str, Any], rows: int, *, verify: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the stored index and its entry; see :meth:`gcfast.Database.read_index`."""
    faiss = import_faiss("index")
    return _newest(folder, manifest, lambda f, entry: _read(faiss, f, entry, rows, verify=verify))


def verify_file(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the file of an index with its size and checksum; FAISS does not read it.

    Raises:
        DamagedDatabaseError: it is missing, truncated, or not what was written.
    """

    def read_all(folder: Path, entry: dict[str, Any]) -> None:
        with _opened(folder, entry, verify=True):
            pass

    try:
        _newest(folder, manifest, read_all)
    except DamagedDatabaseError:
        raise
    except GcfastError:
        pass  # the folder has another database by now, or this one without an index


def _newest(
    folder: Path | None,
    manifest: dict[str, Any],
    use: Callable[[Path, dict[str, Any]], Used],
) -> tuple[Used, dict[str, Any]]:
    """Return what is made of the stored index, and its entry.

    The given manifest may be older than the folder's: if its index is gone, the newer one's of the
    same rows is used.
    """
    entry = manifest.get("index")
    none = (
        f"there is no index with the database {folder or 'in memory'}: gcfast index, or "
        "Database.build_index, makes one"
    )
    if folder is None or entry is None:
        raise NoDatabaseError(none)
    while True:
        try:
            return use(folder, entry), entry
        except DamagedDatabaseError:
            try:
                now = read_manifest(folder)
            except GcfastError:
                now = manifest
            if now.get("index") == entry:
                raise
            require_same_rows(folder, manifest)
            if "index" not in now:  # a database is saved without it
                raise NoDatabaseError(none) from None
            entry = now["index"]


def _read(faiss: Any, folder: Path, entry: dict[str, Any], rows: int, *, verify: bool) -> Any:
    if entry["rows"] != rows:
        raise GcfastError(
            f"the index of {folder} was made of {entry['rows']} rows and the database has {rows}: "
            f"{AGAIN}"
        )
    with _opened(folder, entry, verify=verify) as file:
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except RuntimeError as error:
            raise DamagedDatabaseError(
                f"the index {file.name} cannot be read: {error}; {AGAIN}"
            ) from error


@contextmanager
def _opened(folder: Path, entry: dict[str, Any], *, verify: bool) -> Iterator[IO[bytes]]:
    """Open the file of an index; raises DamagedDatabaseError where it is not what was written."""
    path = folder / entry["file"]
    try:
        require_file(path)  # to open a pipe may never end
        file = path.open("rb")
    except FileNotFoundError:
        raise DamagedDatabaseError(f"the index {path} is missing; {AGAIN}") from None
    except ValueError as error:
        raise DamagedDatabaseError(f"the index {path}: {error}; {AGAIN}") from error
    # One descriptor for all: the file may be deleted at any moment.
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise DamagedDatabaseError(
                f"the index {path} is truncated or changed: {entry['bytes']} bytes were "
                f"written, it has {size}; {AGAIN}"
            )
        if verify:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DamagedDatabaseError(
                    f"the index {path} is changed: its checksum differs; {AGAIN}"
                )
            file.seek(0)
        yield file


def spread_rows(count: int, most: int) -> Tensor:
    """Return the numbers of at most ``most`` rows of ``count``, evenly spread."""
    most = min(count, most)
    return torch.linspace(0, count - 1, most, dtype=torch.float64).round().long()


def spread(shards: list[Shard], most: int) -> Tensor:
    """Return the stored embeddings of at most ``most`` rows, evenly spread over the shards."""
    return rows_at(shards, spread_rows(sum(len(shard.labels) for shard in shards), most).numpy())


def rows_at(
    shards: list[Shard], numbers: np.ndarray[Any, Any], column: str = "embeddings"
) -> Tensor:
    """Return a column [n, D] of the rows of these numbers, as it is stored."""
    where, first = torch.from_numpy(numbers), 0
    one: Tensor = getattr(shards[0], column)
    out = one.new_empty((len(where), one.shape[1]))
    for shard in shards:
        inside = (where >= first) & (where < first + len(shard.labels))
        out[inside] = getattr(shard, column)[where[inside] - first]
        first += len(shard.labels)
    return out


def as_array(rows: Tensor) -> np.ndarray[Any, Any]:
    """Return embeddings as the array that FAISS takes."""
    return np.ascontiguousarray(rows.detach().float().numpy())
