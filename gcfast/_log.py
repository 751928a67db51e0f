"""One log of long work, by the standard library's ``logging``.

Records are of the logger "gcfast" and its children. Each is an event with facts: a line of text
such as "build ended: rows=120, seconds=3.4", whose attribute ``facts`` holds them as a dictionary
({"event": "build ended", "rows": 120, …}) for handlers that keep structure. Nothing is written
unless the program sets up a handler.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error")

ROOT = logging.getLogger("gcfast")
ROOT.addHandler(logging.NullHandler())


def tell(logger: str, event: str, level: int = logging.INFO, /, **facts: Any) -> None:
    """Log an event of the logger "gcfast.LOGGER"."""
    to = ROOT.getChild(logger)
    if to.isEnabledFor(level):
        text = ", ".join(f"{name}={_shown(value)}" for name, value in facts.items())
        line = f"{event}: {text}" if text else event
        to.log(level, "%s", line, extra={"facts": {"event": event, **facts}})


@contextmanager
def told(logger: str, what: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Log that work begins and how it ends, with what is put in the dictionary meanwhile."""
    tell(logger, f"{what} begins", **facts)
    began = time.monotonic()
    found: dict[str, Any] = {}
    try:
        yield found
    except BaseException as error:
        found |= {"seconds": _seconds(began), "error": f"{type(error).__name__}: {error}"}
        tell(logger, f"{what} failed", logging.ERROR, **found)
        raise
    tell(logger, f"{what} ended", **found, seconds=_seconds(began))


def _shown(value: Any) -> str:
    """A value in a line of text: an error of several lines, and names that are not UTF-8, too."""
    return " ".join(str(value).splitlines()).encode(errors="backslashreplace").decode()


def _seconds(began: float) -> float:
    return round(time.monotonic() - began, 3)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, event and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **getattr(record, "facts", {"event": record.getMessage()}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: a path that is not UTF-8 is escaped


@contextmanager
def written(level: str | None, path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Write the log while the block runs.

    Args:
        level: one of LEVELS, for lines on standard error; None writes none there.
        path: a file that lines of JSON are added to, of this level and above ("info" without one).

    Raises:
        OSError: the file cannot be written to.
    """
    handlers: list[logging.Handler] = []
    if level is not None:
        lines = logging.StreamHandler()
        lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(lines)
    if path is not None:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(JsonLines())
        handlers.append(file)
    before = ROOT.level, ROOT.propagate
    if handlers:
        ROOT.setLevel((level or "info").upper())
    ROOT.propagate = level is None and ROOT.propagate  # not twice on standard error
    for handler in handlers:
        ROOT.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            ROOT.removeHandler(handler)
            handler.close()
        ROOT.setLevel(before[0])
        ROOT.propagate = before[1]
