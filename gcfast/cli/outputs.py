"""What the commands write: checks of the output folder, lists of what was left out, maps."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcfast._log import tell
from gcfast.images.folder import in_words


def check_folder(out: Path, force: bool, outputs: Sequence[str]) -> None:
    """Check that the files ``outputs`` may be written into ``out``.

    Raises:
        FileExistsError: it is a file, or holds something and ``--force`` is not given.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"`--out` must be a folder, {out} is a file")
    taken = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if taken and not force:
        raise FileExistsError(
            f"`--out` must be a new or empty folder, {out} holds {', '.join(taken[:3])}"
            f"{' …' if len(taken) > 3 else ''}; --force writes "
            f"{', '.join(outputs)} into it anyway"
        )


def tell_left_out(what: str, listed: Sequence[tuple[str, str]]) -> None:
    """Count and list (name, reason) of what was left out, on standard error."""
    if listed:
        tell("pictures", what, count=len(listed))
        print(f"{what}: {len(listed)}", file=sys.stderr)
        for name, reason in listed:
            print(f"  {name}: {reason}", file=sys.stderr)


def tell_passed_over(passed_over: Counter[str], by_content: Counter[str]) -> None:
    """Count by ending what is no picture, and what is one by its content, on standard error."""
    for what, counts in (
        ("files passed over, since they are no pictures that can be read", passed_over),
        ("pictures recognised by their content, not their ending", by_content),
    ):
        if counts:
            print(f"{what}: {counts.total()} ({in_words(counts)})", file=sys.stderr)


def tell_doubts(doubts: Sequence[tuple[str, int]]) -> None:
    """Say what was assumed about pictures, and of how many, on standard error."""
    for text, count in doubts:
        text = text.replace("`depth`", "build --depth")
        print(f"warning: {text}: {count} pictures", file=sys.stderr)


class JsonRows:
    """A JSON array of objects, written one on a line as they come; complete also after an error.

    Args:
        path: the file; it is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._file.write("[")
        self._count = 0

    def __enter__(self) -> JsonRows:
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Append an object."""
        self._file.write(",\n" if self._count else "\n")
        self._file.write(json.dumps(row))  # ASCII: a name that is not UTF-8 is escaped
        self._count += 1

    def __exit__(self, *_: object) -> None:
        """Close the array."""
        with self._file:
            self._file.write("\n]\n")


class MapWriter:
    """An ``.npy`` file of maps, float32 [B, OH, OW], written in batches; B is known at the end.

    NumPy leaves room in the header for the first dimension to grow, so the header is written twice.

    Args:
        path: the file; it is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._shape: tuple[int, ...] = (0, 0)
        self._count = 0
        self._data_at = 0

    def __enter__(self) -> MapWriter:
        return self

    def write(self, maps: NDArray[np.float32]) -> None:
        """Append maps, float32 [B, OH, OW] with the OH and OW of the first call.

        Raises:
            ValueError: OH or OW differ from the first call's.
        """
        if not self._data_at:
            self._shape = maps.shape[1:]
            self._header()
            self._data_at = self._file.tell()
        if maps.shape[1:] != self._shape:
            raise ValueError(
                f"`maps` must have shape [B, {self._shape[0]}, {self._shape[1]}], "
                f"got {list(maps.shape)}"
            )
        self._file.write(np.ascontiguousarray(maps, "<f4").tobytes())
        self._count += len(maps)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the header, also after an error: the maps written so far are then readable."""
        with self._file:
            self._file.seek(0)
            self._header()

    def _header(self) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer,
            {"descr": "<f4", "fortran_order": False, "shape": (self._count, *self._shape)},
        )
        self._file.write(buffer.getvalue())
