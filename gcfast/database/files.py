"""Files that are whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gcfast.errors import GcfastError

try:
    import fcntl
except ImportError:  # on Windows, where none of this has been run
    fcntl = None  # type: ignore[assignment]

JSON_BYTES = 1 << 28  # of a file; the manifest of 10^7 rows takes some hundred kilobytes

_held: set[int] = set()  # descriptors of locked folders


def _let_go() -> None:
    """Release the locks in a forked process: a loader's worker may outlive the writer."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def require_file(path: Path) -> os.stat_result:
    """Return the status of a regular file, or of one that a link leads to.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else; to read a pipe or a device may never end.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:  # links in a circle, a name that is too long
        raise ValueError(f"it cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    return status


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, larger than JSON_BYTES, no JSON, or nested too deeply.
    """
    if (size := require_file(path).st_size) > JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {JSON_BYTES:,} are read")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader, also one after a crash, sees the old or the new."""
    staged = path.with_name(f"{path.name}.new")
    write(staged, content)
    rename(staged, path)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk; it is not complete before that."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rename(staged: Path, path: Path) -> None:
    """Rename a file within its folder, replacing what has that name, and flush the folder."""
    os.rename(staged, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder against other processes; a process that dies releases its lock.

    Args:
        folder: what to lock.
        doing: what another process does that has locked it, for the error: "building in".

    Raises:
        GcfastError: another process has locked it, or has just replaced it by another folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    process = os.getpid()
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GcfastError(f"another process is {doing} {folder}") from None
            # It may have been moved away between the two calls.
            if not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
                raise GcfastError(f"another process was {doing} {folder} and has replaced it")
        yield
    finally:
        if os.getpid() == process:
            if fcntl is not None:  # a child that was just forked has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            _held.discard(descriptor)
            os.close(descriptor)
