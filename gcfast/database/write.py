"""Writing a database folder: one protocol for build, save, append, rebuild, index and compress.

What is in a folder::

    manifest.json                what the database is; name, size and checksum of each of its files
    rows-00000.safetensors, …    the rows, a file for each shard
    classes-….safetensors        the sums that class proxies are made of
    members-….safetensors        which rows the centers of a compressed database stand for
    index-….faiss                a FAISS index of the rows
    build.json, head.safetensors, spool-…    an unfinished build (gcfast.builder.resumable)
    ….new                        a file that is being written

In which order it is written:

1. The writer locks the folder, so that there is one at a time; the lock of a process that dies is
   released. The first file in a new folder is ``manifest.json.new``: the sign that it is ours.
2. Each new file is written as ``….new``, flushed to the disk and renamed to a name that nothing in
   use has. No file that a reader may have opened is changed.
3. The commit: the new manifest takes the name ``manifest.json``, in one rename. A reader sees the
   old database or the new one; the files that it has mapped stay readable after their deletion.
4. Every file that belongs to neither the database nor an unfinished build is deleted. What a
   killed writer leaves is deleted by the next one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from gcfast._log import tell
from gcfast.database import files, shards
from gcfast.database.files import read_json
from gcfast.database.ids import IdTable
from gcfast.database.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    encoded,
    named_files,
    read_manifest,
)
from gcfast.database.members import Members, PackedMembers
from gcfast.database.shards import Shard
from gcfast.errors import GcfastError, NoDatabaseError
from gcfast.method.proxies import Classes

# "{}" stands for a part of the checksum; files from before had none.
MEMBERS = "members-{}.safetensors"
CLASSES = "classes-{}.safetensors"
INDEX = "index-{}.faiss"
HEAD = "head.safetensors"
SPOOL = "spool-"
SHARD = re.compile(r"rows-(\d{5,})\.safetensors")
UNFINISHED = re.compile(r"build\.json|head\.safetensors|spool-\w+|.+\.new")
OURS = re.compile(
    r"((manifest|build)\.json|head\.safetensors|spool-\w+|rows-\d{5,}\.safetensors"
    r"|(members|classes)(-[0-9a-f]{16})?\.safetensors|index(-[0-9a-f]{16})?\.faiss)(\.new)?"
    r"|\.nfs[0-9a-f]+"  # what NFS makes of a deleted file that a reader has open
)

Entry = dict[str, Any]  # what a manifest says of a file
Checked = TypeVar("Checked")


def check_target(
    target: Path,
    *,
    overwrite: bool,
    resume: bool | None = None,
    name: str = "path",
    remedies: tuple[str, str] = ("overwrite=True", "resume=True"),
) -> None:
    """Check that a database may be written at ``target``: only a database is ever replaced.

    Args:
        target: the folder.
        overwrite: whether to replace a database that is there.
        resume: whether a build continues an unfinished one; None for another writer, which leaves
            an unfinished rebuild where it is.
        name: what the caller calls the folder.
        remedies: what the caller's user says for ``overwrite`` and for ``resume``.

    Raises:
        FileExistsError: something is there that may not be replaced, or is not a gcfast database
            and nothing else.
        ValueError: a path that safetensors cannot open.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` must be a path in UTF-8, got {str(target)!r}") from None
    if not os.path.lexists(target):
        return
    names = [file.name for file in target.iterdir()] if target.is_dir() else [""]
    strange = sorted(file for file in names if not OURS.fullmatch(file))
    if _is_database(target):
        if not overwrite:
            raise FileExistsError(
                f"`{name}` must not exist, got the database {target}; {remedies[0]} replaces it"
            )
        if target.is_symlink():
            raise FileExistsError(
                f"`{name}` must not be a link, got {target}: give {target.resolve()}, to which it "
                "leads, or remove it"
            )
        if strange:
            raise FileExistsError(
                f"`{name}` must hold a gcfast database alone to be replaced, {target} also holds "
                f"{', '.join(strange[:3])}{' …' if len(strange) > 3 else ''}"
            )
    elif strange or MANIFEST in names or not _begun(names, resume):
        raise FileExistsError(f"`{name}` must not exist, got {target}, not a gcfast database")
    elif resume is None:
        resume = False
    if resume is False and STATE in names:
        raise FileExistsError(
            f"`{name}` must not be an unfinished build, got {target}; {remedies[1]} continues it"
        )


@contextmanager
def writing(folder: Path, check: Callable[[], Checked]) -> Iterator[Checked]:
    """Lock a database folder, make it where it is missing, and leave no file that is not in use.

    Args:
        folder: the database's.
        check: raises where the folder may not be written to; called before it is made, and again
            once it is locked.

    Yields:
        What ``check`` returned.

    Raises:
        GcfastError: another process writes to it.
        OSError: it cannot be made.
    """
    check()
    with disk_errors(folder):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    doing = "building in" if (folder / STATE).exists() else "writing to"
    with files.locked(folder, doing):
        if new and not any(folder.iterdir()):
            (folder / f"{MANIFEST}.new").touch()
        checked = check()
        before = _of_database(folder)
        try:
            if new:
                with disk_errors(folder):
                    files.sync_folder(folder.parent)
            yield checked
        except BaseException:
            # After a crash the old manifest may be back, if its replacement was not flushed.
            _clear(folder, before | in_use(folder))
            with suppress(OSError):
                folder.rmdir()  # succeeds where nothing is left in it
            raise
        _clear(folder, in_use(folder))


@contextmanager
def disk_errors(folder: Path, what: str = "database") -> Iterator[None]:
    """Say of an error to write a file what could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write the {what} {folder}: {error.strerror or error}"
        ) from error


def write_file(folder: Path, name: str, fill: Callable[[Callable[[bytes], None]], Any]) -> Entry:
    """Write a file that no manifest names yet, flushed to the disk.

    Args:
        folder: the database's.
        name: the file's; "{}" in it stands for a part of the checksum.
        fill: passes the content to the function that it is given, piece by piece.

    Returns:
        The manifest's entry: name, size and checksum.
    """
    staged, digest = folder / f"{name.replace('-{}', '')}.new", hashlib.sha256()
    with staged.open("wb") as file:

        def write(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        fill(write)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    path = folder / name.format(digest.hexdigest()[:16])
    files.rename(staged, path)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> Entry:
    """Write a safetensors file; as :func:`write_file`."""
    return write_file(folder, name, lambda write: write(safetensors.torch.save(tensors)))


def write_shard(folder: Path, number: int, rows: Shard, ids: Sequence[str]) -> Entry:
    """Write rows as the shard of this number; returns the manifest's entry."""
    tensors = {name: value.contiguous() for name, value in rows._asdict().items()}
    table = IdTable.encoded(ids)
    tensors |= {"id_ends": table.ends, "id_bytes": table.content}
    name = f"rows-{number:05d}.safetensors"
    entry = {"rows": len(ids)} | write_tensors(folder, name, tensors)
    tell("database", "shard written", folder=os.fspath(folder), file=name, rows=len(ids))
    return entry


def next_number(folder: Path) -> int:
    """Return the number of the next shard: above those of all that are in use."""
    shards = [match for name in in_use(folder) if (match := SHARD.fullmatch(name))]
    return max((int(match[1]) for match in shards), default=-1) + 1


def commit(folder: Path, manifest: dict[str, Any], *, build: bool = False) -> None:
    """Replace the manifest: from now on readers find the files that it names.

    Args:
        folder: the database's.
        manifest: the new one.
        build: whether it is that of the folder's unfinished build. Its state then becomes the
            manifest: until the rename it can be resumed, and after it nothing of its own is left.

    Raises:
        OSError: the manifest cannot be written; the old one is back in its place.
    """
    path, content = folder / MANIFEST, encoded(manifest)
    before = path.read_bytes() if path.exists() else None
    staged = folder / (STATE if build else f"{MANIFEST}.new")
    if build:
        files.replace(staged, content)
        _clear(folder, in_use(folder))
    else:
        files.write(staged, content)
    try:
        files.rename(staged, path)
    except OSError:
        if not staged.exists():  # it was renamed, but that was not flushed to the disk
            with suppress(OSError):
                files.replace(staged, content)
                path.unlink() if before is None else files.replace(path, before)
        raise


def write_database(
    target: Path,
    manifest: dict[str, Any],
    rows: Callable[[int, int], Shard],
    ids: Sequence[str],
    members: Members | PackedMembers | None,
    classes: Classes | None,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a whole database.

    Args:
        target: the folder.
        manifest: of the database, without its files.
        rows: returns the rows from one number to another.
        ids: theirs.
        members: of a compressed database.
        classes: of one of class proxies.
        overwrite: replace a database that is there.

    Returns:
        The manifest as written.

    Raises:
        FileExistsError, ValueError: as :func:`check_target`.
        GcfastError: another process writes there.
        OSError: the disk is full, or another failure to write; ``target`` is as it was.
    """
    with (
        writing(target, lambda: check_target(target, overwrite=overwrite)),
        disk_errors(target),
    ):
        first, entries = next_number(target), []
        for number, start in enumerate(range(0, len(ids), shards.SHARD_ROWS), first):
            stop = start + shards.SHARD_ROWS
            entries.append(write_shard(target, number, rows(start, stop), ids[start:stop]))
        # The database may have been opened in an older format.
        manifest = manifest | {"format_version": FORMAT_VERSION, "shards": entries}
        if members is not None:
            packed = members.packed() if isinstance(members, Members) else members
            entry = write_tensors(target, MEMBERS, packed._asdict())
            manifest["members"] = entry | {"packed": True}
        if classes is not None:
            manifest["classes"] = write_tensors(target, CLASSES, classes._asdict())
        commit(target, manifest)
    return manifest


def state_of(folder: Path) -> dict[str, Any] | None:
    """Return the state of the unfinished build in a folder, None where there is none.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    try:
        state = read_json(folder / STATE)
    except FileNotFoundError:
        return None
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} must be an object, got {state!r:.60}")
    return state


def in_use(folder: Path) -> set[str]:
    """Return the names of the files of a folder's database and of its unfinished build."""
    every = {file.name for file in folder.iterdir()}
    try:
        state = state_of(folder)
        if state is None:
            return _of_database(folder)
        # A build's state names its shards with a few words on each.
        names = {STATE, *(shard.get("entry", shard)["file"] for shard in state["shards"])}
        if state["format"] == FORMAT:
            names |= named_files(state)
        else:
            names |= {file for file in every if file == HEAD or file.startswith(SPOOL)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return every  # a damaged state is for the user to settle
    return names | _of_database(folder)


def _of_database(folder: Path) -> set[str]:
    """Return the names of the files of a folder's database; all of them if it is damaged."""
    try:
        return named_files(read_manifest(folder))
    except NoDatabaseError:
        return set()
    except GcfastError:
        return {file.name for file in folder.iterdir()}


def _clear(folder: Path, kept: set[str]) -> None:
    """Delete our files, except those kept."""
    for file in folder.iterdir():
        if OURS.fullmatch(file.name) and file.name not in kept:
            with suppress(OSError):
                file.unlink()


def _begun(names: list[str], resume: bool | None) -> bool:
    """Whether a folder without a manifest is what a killed writer left."""
    # Empty is what a build leaves that was killed as it made the folder.
    return any(map(UNFINISHED.fullmatch, names)) or (bool(resume) and not names)


def _is_database(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
        return isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except (OSError, ValueError):
        return False
