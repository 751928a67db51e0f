"""Shards: the rows of a database in safetensors files, memory-mapped and told apart from damage."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gcfast.database import files as durable
from gcfast.database.mapped import SourceFile, check_files
from gcfast.errors import DamagedDatabaseError


class Shard(NamedTuple):
    """Consecutive rows of a database, as CPU tensors, each contiguous; memory-mapped if opened.

    With float16 storage ``weights`` and ``offsets`` are multiplied by the database's
    ``weight_scale``, so that small weights keep their digits: maps that are normalised come out
    the same, raw ones are divided by it.
    """

    embeddings: Tensor  # [n, D] float32 or float16
    channels: Tensor  # [n, M] int64, by falling weight
    weights: Tensor  # [n, M] float32 or float16
    offsets: Tensor  # [n] float32
    labels: Tensor  # [n] int64; float64 where they are real numbers
    triplet_counts: Tensor  # [n] int64


FIELDS = Shard._fields
SHARD_ROWS = 16_384  # about 18 MB with D = 128 and M = 50, and what a killed build loses at most
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
ALLOWED: dict[str, tuple[str, ...]] = {
    "embeddings": ("F32", "F16"),
    "channels": ("I64",),
    "weights": ("F32", "F16"),
    "offsets": ("F32",),
    "labels": ("I64", "F64"),
    "triplet_counts": ("I64",),
    "id_ends": ("I64",),
    "id_bytes": ("U8",),
}


class MappedFile:
    """A safetensors file of a database, mapped at once, so that it outlasts a replacement.

    Mapping reads nothing but the header; a page is read when it is first touched.

    Args:
        folder: the database's.
        entry: the manifest's words on the file.
        allowed: the tensors that it has to have, and of which types.

    Raises:
        DamagedDatabaseError: the file is missing, has another size than was written, or other
            tensors.
    """

    KIND = "file"

    def __init__(
        self, folder: Path, entry: dict[str, Any], allowed: dict[str, tuple[str, ...]]
    ) -> None:
        self.path = folder / entry["file"]
        self.bytes: int = entry["bytes"]
        self.sha256: str = entry["sha256"]
        self._check_size()
        try:
            # The library settles that the header is sound; where the tensors lie it does not say.
            with safetensors.safe_open(self.path, framework="pt") as file:
                names = set(file.keys())
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                # Copy on write: a tensor cannot be read-only, and the file must stay as it is.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(content) != self.bytes:
                raise ValueError("it changed its size")
            missing = sorted(allowed.keys() - names)
            if missing:
                raise KeyError(missing[0])
            self.columns = {
                name: _tensor(content, 8 + size, name, header[name], types)
                for name, types in allowed.items()
            }
        # RuntimeError: PyTorch's, where the file has gone since it was looked at.
        except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
            raise DamagedDatabaseError(
                f"the {self.KIND} {self.path} cannot be read: {error}"
            ) from error
        self.source = SourceFile(
            str(self.path), status.st_dev, status.st_ino, self.bytes, self.KIND
        )
        self.verified = False
        self._content = content
        self._lock = threading.Lock()

    def _check_size(self) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise DamagedDatabaseError(f"the {self.KIND} {self.path} is missing") from None
        if size != self.bytes:
            raise DamagedDatabaseError(
                f"the {self.KIND} {self.path} is truncated or changed: {self.bytes} bytes were "
                f"written, it has {size}"
            )

    def verify(self) -> None:
        """Compare the content with its checksum, once; raises DamagedDatabaseError."""
        with self._lock:
            if self.verified:
                return
            # The mapping, not the path, where another database may lie by now.
            digest = hashlib.sha256(self._content).hexdigest()
            if digest != self.sha256:
                raise DamagedDatabaseError(
                    f"the {self.KIND} {self.path} is changed: its checksum differs"
                )
            # The pages that hashing read count as ours until they are given back.
            self._content.madvise(mmap.MADV_DONTNEED)
            self.verified = True


class ShardFile(MappedFile):
    """One shard on the disk; raises as :class:`MappedFile`, and where it has other rows."""

    KIND = "shard"

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        super().__init__(folder, entry, ALLOWED)
        columns = dict(self.columns)
        self.ids = IdTable(columns["id_ends"], columns.pop("id_bytes"))
        lengths = {len(tensor) for tensor in columns.values()}
        if lengths != {entry["rows"]}:
            raise DamagedDatabaseError(
                f"the shard {self.path} must hold {entry['rows']} rows, got {sorted(lengths)}"
            )
        self.tensors = Shard(**{name: columns[name] for name in FIELDS})


class IdTable(NamedTuple):
    """Ids as bytes one after another."""

    ends: Tensor  # [n] int64: where each id ends
    content: Tensor  # uint8

    def decoded(self, start: int, stop: int) -> list[str]:
        """These ids as strings."""
        if start >= stop:
            return []
        first = int(self.ends[start - 1]) if start else 0
        ends = [first, *self.ends[start:stop].tolist()]
        content = self.content[first : ends[-1]].numpy().tobytes()
        # A file name that is not UTF-8 comes as surrogates and keeps its bytes.
        return [
            content[a - first : b - first].decode(errors="surrogateescape")
            for a, b in pairwise(ends)
        ]

    @classmethod
    def encoded(cls, ids: Sequence[str]) -> IdTable:
        """A table of these ids."""
        encoded = [i.encode(errors="surrogateescape") for i in ids]
        ends = np.cumsum([len(i) for i in encoded], dtype=np.int64)
        content = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        return cls(torch.from_numpy(ends), torch.from_numpy(content))


class Ids(Sequence[str]):
    """Ids in tables: a sequence that is decoded where it is read.

    Args:
        tables: the ids, in order.
        sources: the file of each table, looked at before the table is read; none in memory.

    Raises:
        DamagedDatabaseError: as ids are read, where the file of their table was deleted or cut off.
    """

    def __init__(self, tables: list[IdTable], sources: Sequence[SourceFile] = ()) -> None:
        self._tables, self._sources = tables, sources
        self._starts = [0]
        for table in tables:
            self._starts.append(self._starts[-1] + len(table.ends))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, where: int) -> str: ...

    @overload
    def __getitem__(self, where: slice) -> list[str]: ...

    def __getitem__(self, where: int | slice) -> str | list[str]:
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            if step == 1:
                return self._range(start, stop)
            return [self[row] for row in range(start, stop, step)]
        row = where + len(self) if where < 0 else where
        if not 0 <= row < len(self):
            raise IndexError(f"`ids` has {len(self)} elements, got {where}")
        return self._range(row, row + 1)[0]

    def _range(self, start: int, stop: int) -> list[str]:
        out: list[str] = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[number : number + 2]
            out += self._table(number).decoded(start - first, min(stop, end) - first)
            start, number = end, number + 1
        return out

    def _table(self, number: int) -> IdTable:
        check_files(self._sources[number : number + 1])
        return self._tables[number]

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._tables)):
            table = self._table(number)
            yield from table.decoded(0, len(table.ends))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Ids, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(i) for i in self[:3])
        return f"Ids({len(self)}: {shown}{', …' if len(self) > 3 else ''})"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"rows-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, rows: Shard, ids: Sequence[str]) -> dict[str, Any]:
    """Write a shard under its own name, flushed to the disk; returns the manifest's entry.

    Nothing refers to it before a manifest does, so a part of one that a crash leaves does no harm.
    """
    tensors = {name: value.contiguous() for name, value in rows._asdict().items()}
    table = IdTable.encoded(ids)
    tensors |= {"id_ends": table.ends, "id_bytes": table.content}
    return {"rows": len(ids)} | write_tensors(folder / shard_name(number), tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, flushed to the disk; returns the manifest's entry."""
    content = safetensors.torch.save(tensors)
    durable.write(path, content)
    return {
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _tensor(
    content: mmap.mmap, base: int, name: str, entry: dict[str, Any], allowed: tuple[str, ...]
) -> Tensor:
    if entry["dtype"] not in allowed:
        raise ValueError(f"{name!r} must be {' or '.join(allowed)}, got {entry['dtype']}")
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    start, stop = entry["data_offsets"]
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    count = (stop - start) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=base + start).view(shape)
