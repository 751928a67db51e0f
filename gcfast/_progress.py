"""How far long work has come: a bar on a terminal, else a line every half minute; and the log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from gcfast._log import tell

LINE_SECONDS = 30.0

Item = TypeVar("Item")


class Progress:
    """Show how many of a number of things are done, and how long the others will take.

    Args:
        what: what is done.
        unit: the things, in the plural.
        total: how many there are; None where that is not known.
        show: whether to show anything.
    """

    def __init__(self, what: str, unit: str, *, total: int | None, show: bool) -> None:
        self.done = 0
        self.what, self.unit, self.total = what, unit, total
        self._bar: tqdm[Any] | None = None
        self._lines = show and not sys.stderr.isatty()
        if show and not self._lines:
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False)
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        tell("progress", f"{self.what} begins", unit=self.unit, total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        finished = kind is None or kind is GeneratorExit
        self._log("ended" if finished else "stopped", time.monotonic() - self._began)

    def update(self, count: int = 1) -> None:
        """Count further things as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        if (now := time.monotonic()) - self._told >= LINE_SECONDS:
            self._told = now
            self._log("goes on", now - self._began)
            if self._lines:
                print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _log(self, how: str, seconds: float) -> None:
        facts = {"unit": self.unit, "done": self.done, "total": self.total}
        tell("progress", f"{self.what} {how}", **facts, seconds=round(seconds, 3))

    def _line(self, seconds: float) -> str:
        if self.total is None:
            return f"{self.what}: {self.done:,} {self.unit} in {tqdm.format_interval(seconds)}"
        left = (self.total - self.done) * seconds / max(self.done, 1)
        return (
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit} in "
            f"{tqdm.format_interval(seconds)}, {tqdm.format_interval(left)} left"
        )


def tracked(
    items: Iterable[Item], what: str, unit: str, *, total: int | None = None, show: bool
) -> Iterator[Item]:
    """Yield the items, and show how many of them have been; see :class:`Progress`.

    Without a ``total`` it is what the items say themselves.
    """
    with Progress(what, unit, total=total or length(items), show=show) as progress:
        for item in items:
            yield item
            progress.update()


def length(items: Iterable[Any]) -> int | None:
    """Return how many items there are, if they say so before they come."""
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterator; a DataLoader over a stream
        return None
