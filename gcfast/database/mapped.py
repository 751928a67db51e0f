"""Files that tensors are mapped from: to read past the end of one that was cut short is a crash."""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gcfast.database.manifest import MANIFEST
from gcfast.errors import DamagedDatabaseError

# What takes an old database's place renames that one away first, where the system cannot exchange
# the two: how often, and how far apart, a manifest is looked for before it counts as gone.
MOVING_TRIES = 20
MOVING_SECONDS = 0.01
MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when its tensors were mapped or asked about."""

    path: str
    device: int
    inode: int
    bytes: int  # from its start to the end of what is read of it
    kind: str = "shard"


def check_files(files: Iterable[SourceFile]) -> None:
    """Raise DamagedDatabaseError where a file was deleted or cut short since.

    The rule, which csrc/mapped_file.cpp has for the transfer engine: a file of that name that is
    another one is no damage, and none of that name is none either where the folder's manifest does
    not name it, for then another database has taken the place of this one. What is mapped lives on
    in both cases. A name that is gone though the manifest has it, or with the whole folder, was
    deleted.
    """
    manifests: dict[bytes, set[bytes] | None] = {}
    for file in files:
        try:
            now = os.stat(file.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise DamagedDatabaseError(
                    f"the {file.kind} {file.path} cannot be looked at any more: {error.strerror}"
                ) from error
            if not _replaced(file.path, manifests):
                raise DamagedDatabaseError(
                    f"the {file.kind} {file.path} was deleted or moved away while the database was "
                    "open"
                ) from None
            continue
        if (now.st_dev, now.st_ino) == (file.device, file.inode) and now.st_size < file.bytes:
            raise DamagedDatabaseError(
                f"the {file.kind} {file.path} was truncated while the database was open: "
                f"{file.bytes} bytes of it are in use, it has {now.st_size}"
            )


def _replaced(path: str, manifests: dict[bytes, set[bytes] | None]) -> bool:
    """Whether the manifest beside a file that is gone is there and does not name it."""
    folder, name = os.path.split(os.fsencode(path))
    named = manifests.get(folder)
    if named is None or name in named:  # it may be another one by now
        named = manifests[folder] = _named(folder)
    return named is not None and name not in named


def _named(folder: bytes) -> set[bytes] | None:
    """What stands in quotes in a folder's manifest (and between them); None without one."""
    for attempt in range(MOVING_TRIES):
        if attempt:
            time.sleep(MOVING_SECONDS)
        with suppress(OSError):
            return set(Path(os.fsdecode(folder), MANIFEST).read_bytes().split(b'"'))
    return None


class _Mapping(NamedTuple):
    start: int
    end: int
    offset: int
    path: str


class Mappings:
    """This process's mapped files, as they are now; none where the system does not list them.

    Args:
        known: files that go by the names they have here: the system has a file's name of this
            moment, which is another while a database that was replaced is being removed.
    """

    def __init__(self, known: Iterable[SourceFile] = ()) -> None:
        self._known = {(file.device, file.inode): file.path for file in known}
        self._mappings: list[_Mapping] = []
        if not MAPS.exists():
            return
        for line in MAPS.read_bytes().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(b"/"):
                start, end = (int(a, 16) for a in fields[0].split(b"-"))
                path = os.fsdecode(fields[5].replace(rb"\012", b"\n"))
                self._mappings.append(_Mapping(start, end, int(fields[2], 16), path))
        self._starts = [m.start for m in self._mappings]  # the system lists them in order

    def files(self, tensors: Iterable[Tensor]) -> list[SourceFile]:
        """The files that the tensors are mapped from; those deleted already cannot be cut short."""
        ends: dict[str, int] = {}
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.numel() == 0 or not self._mappings:
                continue
            address = tensor.data_ptr()
            mapping = self._mappings[bisect_right(self._starts, address) - 1]
            if mapping.start <= address < mapping.end:
                extent = sum(
                    (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                )
                end = address - mapping.start + mapping.offset
                end += (extent + 1) * tensor.element_size()
                ends[mapping.path] = max(ends.get(mapping.path, 0), end)
        files = []
        for path, end in ends.items():
            try:
                now = os.stat(path)
            except FileNotFoundError:
                continue
            path = self._known.get((now.st_dev, now.st_ino), path)
            files.append(SourceFile(path, now.st_dev, now.st_ino, end))
        return files
