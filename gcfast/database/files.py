"""Files that are whole or not there: written, flushed to the disk and renamed."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gcfast.errors import GcfastError

try:
    import fcntl
except ImportError:  # on Windows, where none of this has been run
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()  # descriptors of locked folders


def _let_go() -> None:
    """A forked process (a loader's worker) may live longer than the work that the lock is for."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk; not whole before it returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads it, also after a crash, sees the old or the new."""
    beside = path.with_name(f"{path.name}.new")
    write(beside, content)
    os.rename(beside, path)
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
    """Hold a folder against other processes; a process that dies lets it go.

    Args:
        folder: what is held.
        doing: what the other process does, for the error: "building in".

    Raises:
        GcfastError: another process holds it, or put another folder in its place just now.
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


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder beside a place, to be filled and moved there; what is left of it goes.

    Those that killed processes left beside this place, which nobody holds any more, go first.

    Raises:
        OSError: it cannot be made.
    """
    prefix = f".{target.name}.gcfast-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        if fcntl is not None:  # or one that is being filled could not be told
            with suppress(OSError, GcfastError), locked(left, "writing to"):
                shutil.rmtree(left)
    with ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            stack.callback(remove, folder)
            # Until it is held, another process may take it for one that was left, and remove it.
            with suppress(FileNotFoundError, GcfastError):
                stack.enter_context(locked(folder, "writing to"))
                break
        open_permissions(folder)
        yield folder


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to its name; what has that name goes when the new one is there.

    Where the system can, the two are exchanged in one step, so that there is no moment, and no
    crash, without a folder of that name. The old one is then for a moment at ``folder``.

    Args:
        folder: flushed but for its list of names.
        target: the name.

    Raises:
        GcfastError: another process writes to what has that name.
    """
    sync_folder(folder)
    if target.exists():
        # Whoever adds to the old folder would do so by its name, and so to the new one.
        with locked(target, "writing to"):
            if _exchange(folder, target):
                try:
                    sync_folder(target.parent)
                except OSError:
                    _exchange(folder, target)
                    raise
                remove(folder)
                return
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / target.name)
            try:
                os.rename(folder, target)
            except OSError:
                os.rename(old / target.name, target)
                old.rmdir()
                raise
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, target)
    sync_folder(target.parent)


def remove(folder: Path) -> None:
    """Remove a folder, or the link in its place, as far as that is possible."""
    with suppress(OSError):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Give each the other's name, in one step; False where the system has none for that."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library before 2018
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0)


def open_permissions(folder: Path) -> None:
    """Give a folder made by ``tempfile`` the permissions that one made by mkdir has."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(folder, 0o777 & ~mask)
