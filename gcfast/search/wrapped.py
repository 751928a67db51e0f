"""FAISS indices that are searched in another way than by themselves."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np


class Wrapped:
    """An index that is searched in another way."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)


class Overridden(Wrapped):
    """An index whose class overrides ``search`` in Python: calls that."""

    def search_c(self, n: int, queries: Any, k: int, distances: Any, ids: Any) -> None:
        """As FAISS's: through pointers."""
        D, I = self.index.search(_view(queries, ctypes.c_float, n, self.index.d), k)  # noqa: E741
        _view(distances, ctypes.c_float, n, k)[:] = D
        _view(ids, ctypes.c_int64, n, k)[:] = I


class Numbered(Wrapped):
    """An index that has ids of its own: returns the rows' numbers.

    Args:
        index: the index.
        numbers: [N] int64, the id of each row.
    """

    def __init__(self, index: Any, numbers: np.ndarray[Any, Any]) -> None:
        super().__init__(index)
        self._order = numbers.argsort()
        self._sorted = numbers[self._order]

    def search_c(self, n: int, queries: Any, k: int, distances: Any, ids: Any) -> None:
        """As FAISS's: through pointers."""
        self.index.search_c(n, queries, k, distances, ids)
        found = _view(ids, ctypes.c_int64, n, k)
        places = np.searchsorted(self._sorted, found).clip(max=len(self._sorted) - 1)
        known = self._sorted[places] == found
        strange = found[~known & (found != -1)]
        if len(strange):
            raise ValueError(f"`ids` must name every row of `index`, it returned {strange[0]}")
        found[:] = np.where(known, self._order[places], -1)


def numbered(index: Any, numbers: np.ndarray[Any, Any] | None) -> Any:
    """Return the index, and as one that returns the rows' numbers if it has ids of its own."""
    return index if numbers is None else Numbered(index, numbers)


def overrides_search(index: Any) -> bool:
    """Whether the class of an index is the caller's and has a ``search`` of its own."""
    for kind in type(index).__mro__:
        if "search" in vars(kind):
            return not str(getattr(vars(kind)["search"], "__module__", "")).startswith("faiss")
    return False


def _view(pointer: Any, kind: Any, *shape: int) -> np.ndarray[Any, Any]:
    whole = (kind * math.prod(shape)).from_address(int(pointer))
    return np.ctypeslib.as_array(whole).reshape(shape)
