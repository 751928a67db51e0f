"""Batches in two steps, the second one delayed, so that work in between can overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


def overlapped(
    batches: Iterable[_Batch], begin: Callable[[_Batch], Callable[[], _Result]], depth: int
) -> Iterator[_Result]:
    """Yield results in the order of the batches, each finished once ``depth`` more have begun.

    To the caller this is the loop ``for batch in batches: yield begin(batch)()``, except that
    batches are read ahead: an exception, of the iterable or of ``begin``, comes after the results
    of the batches before it.

    Args:
        batches: read as results are taken.
        begin: begins a batch; what it returns finishes it, and is dropped with the generator.
        depth: how many batches are between the two.
    """
    begun: deque[Callable[[], _Result]] = deque()
    remaining = iter(batches)
    failure: Exception | None = None
    while failure is None:
        try:
            batch = next(remaining)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        try:
            begun.append(begin(batch))
        except Exception as error:
            failure = error
        del batch  # only what has begun may keep it alive
        if len(begun) > depth:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()
    if failure is not None:
        raise failure
