"""Files that tensors are mapped from: to read past the end of one that was cut short is a crash."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gcfast.errors import DamagedDatabaseError

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when its tensors were asked about."""

    path: str
    device: int
    inode: int
    bytes: int  # from its start to the end of the last tensor in it

    def check(self) -> None:
        """Raise DamagedDatabaseError where the file was deleted or cut short since.

        A file that was replaced by another of its name is no damage: the old one, which is what is
        mapped, lives on.
        """
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            raise DamagedDatabaseError(
                f"the shard {self.path} was deleted while the database was open"
            ) from None
        if (now.st_dev, now.st_ino) == (self.device, self.inode) and now.st_size < self.bytes:
            raise DamagedDatabaseError(
                f"the shard {self.path} was truncated while the database was open: its rows take "
                f"{self.bytes} bytes, it has {now.st_size}"
            )


class _Mapping(NamedTuple):
    start: int
    end: int
    offset: int
    path: str


class Mappings:
    """This process's mapped files, as they are now; none where the system does not list them."""

    def __init__(self) -> None:
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
            files.append(SourceFile(path, now.st_dev, now.st_ino, end))
        return files
