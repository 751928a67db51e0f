"""The ids of a database's rows: kept as bytes, decoded as they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 65_536  # ids that are decoded at once where all of them are gone through


class IdTable(NamedTuple):
    """Ids as bytes, one after another."""

    ends: Tensor  # [n] int64: where each id ends
    content: Tensor  # uint8

    def decoded(self, start: int, stop: int) -> list[str]:
        """Return these ids as strings."""
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
        """Return a table of these ids."""
        encoded = [i.encode(errors="surrogateescape") for i in ids]
        ends = np.cumsum([len(i) for i in encoded], dtype=np.int64)
        content = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        return cls(torch.from_numpy(ends), torch.from_numpy(content))


def rising(ends: Tensor, last: int) -> bool:
    """Whether these are the ends of consecutive parts, the last of which is ``last``."""
    if not len(ends) or int(ends[-1]) != last:
        return False
    # NumPy: PyTorch has no threads in a forked process.
    return bool((np.diff(ends.numpy(), prepend=0) >= 0).all())


def repeated(*parts: Sequence[str]) -> tuple[str, int, int] | None:
    """Return the first id that comes again in these sequences, and its two places in them.

    Places are numbered through all sequences. Only a hash of each id is held, and no more than
    AT_ONCE ids as strings.
    """
    hashes = np.fromiter(
        (
            hash(name)
            for part in parts
            for start in range(0, len(part), AT_ONCE)
            for name in part[start : start + AT_ONCE]
        ),
        dtype=np.int64,
        count=sum(map(len, parts)),
    )
    order = hashes.argsort(kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    for at in same[order[same + 1].argsort()].tolist():  # the first that comes again
        one, two = int(order[at]), int(order[at + 1])
        names = [_at(parts, one), _at(parts, two)]
        if names[0] == names[1]:  # and not their hashes alone
            return names[0], one, two
    return None


def _at(parts: Sequence[Sequence[str]], number: int) -> str:
    for part in parts:
        if number < len(part):
            return part[number]
        number -= len(part)
    raise IndexError(number)


class Ids(Sequence[str]):
    """Ids in tables: a sequence that decodes only what is read.

    Args:
        tables: the ids, in order.
    """

    def __init__(self, tables: Sequence[IdTable]) -> None:
        self._tables = tables
        self._starts = [0, *accumulate(len(table.ends) for table in tables)]

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
            out += self._tables[number].decoded(start - first, min(stop, end) - first)
            start, number = end, number + 1
        return out

    def __iter__(self) -> Iterator[str]:
        for table in self._tables:
            yield from table.decoded(0, len(table.ends))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Ids, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(i) for i in self[:3])
        return f"Ids({len(self)}: {shown}{', …' if len(self) > 3 else ''})"
