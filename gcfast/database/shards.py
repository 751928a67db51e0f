"""The files of a database in safetensors, memory-mapped: shards of its rows, and class sums."""

from __future__ import annotations

import hashlib
import math
import threading
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from gcfast.database.files import require_file
from gcfast.database.ids import IdTable, rising
from gcfast.errors import DamagedDatabaseError
from gcfast.method.proxies import Classes


class Shard(NamedTuple):
    """Consecutive rows of a database, as CPU tensors, each contiguous; memory-mapped if opened.

    With float16 storage ``weights`` and ``offsets`` are multiplied by the database's
    ``weight_scale``, so that small weights keep their digits: maps that are normalized come out
    the same, raw ones are divided by it.

    Rows of ``method="elementwise"`` keep no channels: their weights are a cotangent, [n, D].
    """

    embeddings: Tensor  # [n, D] float32 or float16
    channels: Tensor  # [n, M] int64, by falling weight
    weights: Tensor  # [n, M] float32 or float16
    offsets: Tensor  # [n] float32
    labels: Tensor  # [n] int64; float64 where they are real numbers
    triplet_counts: Tensor  # [n] int64


FIELDS = Shard._fields


def offsets_of(channels: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """Return the offsets [n] float32 of rows; 0 of those that keep no channels.

    Args:
        channels: [n, M] int64.
        weights: [n, M].
        mean: [C], the mean activation.
    """
    if not channels.shape[1]:
        return torch.zeros(len(channels))
    return (weights.double() * mean.double()[channels]).sum(1).float()


SHARD_ROWS = 16_384  # about 18 MB with D = 128 and M = 50, and what a killed build loses at most
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
TABLES = ("embeddings", "channels", "weights")  # with more than a number a row
COLUMNS: dict[str, tuple[str, ...]] = {
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
    """A safetensors file of a database, memory-mapped: it outlasts deletion and replacement.

    Opening reads the header alone; a page of a column is read when it is first touched. The
    mapping is copy-on-write: to write to a column leaves the file as it is.

    Args:
        folder: the database's.
        entry: the manifest's entry for the file.
        columns: the tensors it must have, and the dtypes allowed for each.

    Raises:
        DamagedDatabaseError: the file is missing, has another size than was written, or does not
            hold these tensors.
    """

    KIND = "file"

    def __init__(
        self, folder: Path, entry: dict[str, Any], columns: dict[str, tuple[str, ...]]
    ) -> None:
        self.path = folder / entry["file"]
        self.bytes: int = entry["bytes"]
        self.sha256: str = entry["sha256"]
        self._check_size()
        try:
            self.columns = _mapped_columns(self.path, self._mapping(), columns)
            # A mapping of its own gives back the pages that hashing reads; and the path may lead
            # to another database by then.
            self._unverified: Tensor | None = self._mapping()
        # RuntimeError: PyTorch's, where the file has gone or shrunk since its size was compared.
        except (safetensors.SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise DamagedDatabaseError(
                f"the {self.KIND} {self.path} cannot be read: {error}"
            ) from error
        self._lock = threading.Lock()

    def _mapping(self) -> Tensor:
        return torch.from_file(str(self.path), size=self.bytes, dtype=torch.uint8, device="cpu")

    def _check_size(self) -> None:
        try:
            size = require_file(self.path).st_size
        except FileNotFoundError:
            raise DamagedDatabaseError(f"the {self.KIND} {self.path} is missing") from None
        except ValueError as error:
            raise DamagedDatabaseError(f"the {self.KIND} {self.path}: {error}") from error
        if size != self.bytes:
            raise DamagedDatabaseError(
                f"the {self.KIND} {self.path} is truncated or changed: {self.bytes} bytes were "
                f"written, it has {size}"
            )

    def verify(self) -> None:
        """Compare the content with its checksum, and its numbers with what they may be, once.

        Raises:
            DamagedDatabaseError: they differ.
        """
        with self._lock:
            content = self._unverified
            if content is None:
                return
            if hashlib.sha256(content.numpy().data).hexdigest() != self.sha256:
                raise DamagedDatabaseError(
                    f"the {self.KIND} {self.path} is changed: its checksum differs"
                )
            self._check_numbers({n: _same(column, content) for n, column in self.columns.items()})
            self._unverified = None

    def _check_numbers(self, columns: dict[str, Tensor]) -> None:
        """Raise DamagedDatabaseError where a number cannot be one."""


def _same(column: Tensor, content: Tensor) -> Tensor:
    """The column in another mapping of its file."""
    start = column.storage_offset() * column.element_size()
    return content[start : start + column.nbytes].view(column.dtype).view(column.shape)


def _mapped_columns(
    path: Path, content: Tensor, columns: dict[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Return the columns as views of a file's bytes; raises ValueError where they are others.

    :meth:`safe_open.get_tensor` would touch a page of each: 3.6 GiB resident for the 10 million
    rows of bench/memory.py, where the page cache has large folios.
    """
    file: Any
    with safetensors.safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.offset_keys()}
    views, end = {}, len(content)
    # In a sound safetensors file they follow one another without gaps, up to the end.
    for name, part in reversed(parts.items()):
        allowed = columns.get(name, tuple(DTYPES))
        if part.get_dtype() not in allowed:
            raise ValueError(f"{name!r} must be {' or '.join(allowed)}, got {part.get_dtype()}")
        dtype, shape = DTYPES[part.get_dtype()], part.get_shape()
        start = end - math.prod(shape) * dtype.itemsize
        views[name] = content[start:end].view(dtype).view(shape)
        end = start
    missing = sorted(columns.keys() - views.keys())
    if missing:
        raise ValueError(f"it lacks {missing[0]!r}")
    return {name: views[name] for name in columns}


class ShardFile(MappedFile):
    """One shard on disk.

    Args:
        folder: the database's.
        entry: the manifest's entry for the file.
        C: channels of the layer.
        names: how many classes have names; 0 where labels are numbers.

    Raises:
        DamagedDatabaseError: as :class:`MappedFile`, or it has another number of rows.
    """

    KIND = "shard"

    def __init__(self, folder: Path, entry: dict[str, Any], C: int, names: int) -> None:
        super().__init__(folder, entry, COLUMNS)
        self._limits = C, names
        lengths = {t.shape[:1].numel() for name, t in self.columns.items() if name != "id_bytes"}
        if lengths != {entry["rows"]}:
            raise DamagedDatabaseError(
                f"the shard {self.path} must hold {entry['rows']} rows, got {sorted(lengths)}"
            )
        wrong = [n for n, t in self.columns.items() if t.ndim != 1 + (n in TABLES)]
        # Transferred cotangents stand in the place of weights, without channels.
        if not wrong:
            M, width = (self.columns[name].shape[1] for name in TABLES[1:])
            wrong = [] if M in (0, width) else ["channels", "weights"]
        if wrong:
            raise DamagedDatabaseError(
                f"the shard {self.path} must hold a table of rows, got another shape of "
                f"{', '.join(wrong)}"
            )
        self.ids = IdTable(self.columns["id_ends"], self.columns["id_bytes"])
        self.tensors = Shard(**{name: self.columns[name] for name in FIELDS})

    def _check_numbers(self, columns: dict[str, Tensor]) -> None:
        # A kernel that is given a channel that there is not would read beyond the activations.
        C, names = self._limits
        self._within("channels", columns["channels"], C)
        if names and not columns["labels"].is_floating_point():
            self._within("labels", columns["labels"], names)
        ends, count = columns["id_ends"], len(columns["id_bytes"])
        if len(ends) and not rising(ends, count):
            raise DamagedDatabaseError(
                f"the shard {self.path} must have ids that follow one another, up to byte {count}"
            )

    def _within(self, name: str, column: Tensor, limit: int) -> None:
        if column.numel() == 0:
            return
        numbers = column.numpy()  # not PyTorch, which has no threads in a forked process
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= limit:
            raise DamagedDatabaseError(
                f"the shard {self.path} must have {name} from 0 to {limit - 1}, got "
                f"{low if low < 0 else high}"
            )


class ClassesFile(MappedFile):
    """The class sums on disk.

    Raises:
        DamagedDatabaseError: as :class:`MappedFile`, or its columns do not fit together, or the
            layer.
    """

    KIND = "classes file"

    def __init__(self, folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
        columns: dict[str, tuple[str, ...]] = {
            "labels": ("I64",),
            "sums": ("F64",),
            "counts": ("I64",),
        }
        super().__init__(folder, entry, columns)
        self.classes = Classes(**self.columns)
        labels, C = self.classes.labels, len(manifest["mean_activation"])
        K = labels.numel()
        shapes = [tuple(column.shape) for column in self.classes]
        if shapes != [(K,), (K, C), (K,)] or not bool((labels.diff() > 0).all()):
            raise DamagedDatabaseError(
                f"the classes file {self.path} must hold rising labels, and a count and {C} sums "
                f"for each, got {shapes}"
            )
