"""Columns that grow row by row, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcfast.database.write import SPOOL, disk_errors
from gcfast.errors import DamagedDatabaseError

SPOOL_MEMORY_BYTES = 2 * 2**30


class Spool:
    """Results of the forward pass that the rows are made from: named columns.

    Args:
        memory_bytes: how much is held in memory, None for SPOOL_MEMORY_BYTES; what comes after goes
            to a temporary folder, and the finished columns are then memory-mapped from there.
        folder: where to make the temporary folder; None for the system's default.
    """

    def __init__(self, memory_bytes: int | None = None, folder: str | Path | None = None) -> None:
        self.memory_bytes = SPOOL_MEMORY_BYTES if memory_bytes is None else memory_bytes
        self.folder = folder
        self.held = 0
        self._parts: dict[str, list[Tensor]] = {}
        self._shapes: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._rows: dict[str, int] = {}
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def add(self, **columns: Tensor) -> None:
        """Append rows: CPU tensors."""
        for name, rows in columns.items():
            rows = rows.detach().contiguous()
            self._shapes.setdefault(name, (rows.dtype, rows.shape[1:]))
            self._rows[name] = self._rows.get(name, 0) + len(rows)
            self._parts.setdefault(name, []).append(rows)
            self.held += rows.nbytes
        if self.held > self.memory_bytes:
            self._spill()

    @property
    def spilled(self) -> bool:
        """Whether anything went to the disk."""
        return self._directory is not None

    def has(self, name: str) -> bool:
        """Whether there is a column of this name."""
        return name in self._shapes

    def column(self, name: str) -> Tensor:
        """One whole column; the parts held so far are joined once."""
        if self.spilled:
            self._spill()
            dtype, shape = self._shapes[name]
            count = self._rows[name] * shape.numel()
            if count == 0:
                return torch.empty((self._rows[name], *shape), dtype=dtype)
            flat = torch.from_file(str(self._file(name)), shared=False, size=count, dtype=dtype)
            return flat.view(self._rows[name], *shape)
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = parts = [torch.cat(parts)]
        return parts[0]

    def drop(self, *names: str) -> None:
        """Forget columns that are no longer needed."""
        for name in names:
            self.held -= sum(part.nbytes for part in self._parts.pop(name, []))
            if self.spilled and name in self._rows:
                self._delete(name)
            self._rows.pop(name, None)
            self._shapes.pop(name, None)

    def close(self) -> None:
        """Remove the temporary files; columns taken before stay usable."""
        self._parts.clear()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _spill(self) -> None:
        try:
            self._append()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot spool to temporary files, {error.strerror or error}: "
                f"TMPDIR can name a larger place than {self.folder or tempfile.gettempdir()}",
            ) from error

    def _append(self) -> None:
        for name, parts in self._parts.items():
            if not parts:
                continue
            with self._file(name).open("ab") as file:
                for part in parts:
                    file.write(part.numpy().tobytes())  # a view would need unit strides
            parts.clear()
        self.held = 0

    def _delete(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="gcfast-spool-", dir=self.folder)
        return Path(self._directory.name) / name


def one_table(parts: Sequence[Tensor]) -> Tensor:
    """Join tensors [·, D] of any precision to one of float32, in one copy.

    Args:
        parts: on the CPU, memory-mapped or not.

    Returns:
        [N, D]: in memory up to SPOOL_MEMORY_BYTES, beyond that mapped from a temporary file, which
        has no name any more.

    Raises:
        OSError: the disk is full, or another failure to write the file.
    """
    count, width = sum(len(part) for part in parts), parts[0].shape[1]
    if 4 * count * width > SPOOL_MEMORY_BYTES:
        spool = Spool(0)
        try:
            for part in parts:
                spool.add(rows=part.float())
            return spool.column("rows")
        finally:
            spool.close()
    table = torch.empty((count, width))
    filled = 0
    for part in parts:
        table[filled : filled + len(part)] = part
        filled += len(part)
    return table


class KeptSpool(Spool):
    """A spool in files of a given folder, which outlast the process.

    What was added counts once :meth:`commit` has flushed it and its result is stored; whatever a
    killed process wrote after that is cut off when the spool is opened again.

    Args:
        folder: where the files are, one for each column.
        columns: what ``commit`` returned last; None where nothing was committed.
        read: only read what was committed, while another process may write.

    Raises:
        DamagedDatabaseError: a file is missing, or shorter than was committed.
    """

    def __init__(
        self, folder: Path, columns: dict[str, Any] | None = None, *, read: bool = False
    ) -> None:
        super().__init__()
        self._home = folder
        for name, column in (columns or {}).items():
            dtype, shape = getattr(torch, column["dtype"]), torch.Size(column["shape"])
            self._shapes[name], self._rows[name] = (dtype, shape), column["rows"]
        for file in [] if read else folder.glob(f"{SPOOL}*"):
            if file.name.removeprefix(SPOOL) not in self._rows:
                file.unlink()
        for name, (dtype, shape) in self._shapes.items():
            size = self._rows[name] * shape.numel() * dtype.itemsize
            file = self._file(name)
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise DamagedDatabaseError(
                    f"{file} is truncated: {size} bytes were written, it has {found}"
                )
            if found > size and not read:
                os.truncate(file, size)

    @property
    def spilled(self) -> bool:
        """Always: nothing is held after a commit."""
        return True

    def commit(self) -> dict[str, Any]:
        """Flush everything to the disk; returns what a later process continues from."""
        self._append()
        for name in self._shapes:
            with self._file(name).open("ab") as file:
                os.fsync(file.fileno())
        return {
            name: {
                "rows": self._rows[name],
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
            }
            for name, (dtype, shape) in self._shapes.items()
        }

    def _spill(self) -> None:
        with disk_errors(self._home):
            self._append()

    def _delete(self, name: str) -> None:
        """Leave the file: what was committed last has the column."""

    def _file(self, name: str) -> Path:
        return self._home / f"{SPOOL}{name}"
