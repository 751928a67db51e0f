"""What goes on beside requests: a database is exchanged, memory is given back."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcfast.database.manifest import MANIFEST

_LONGEST_PAUSE = 60.0  # seconds between tries of a database that cannot be opened

State = tuple[int, int, int] | None  # of the manifest: inode, time, size


class Watcher:
    """A thread that calls ``reload`` when a database's manifest may have changed, or when woken.

    Args:
        folder: the database's; a link is followed at every look. None: only :meth:`wake` reloads.
        every: seconds between looks; 0: only :meth:`wake` reloads.
        reload: called with whether it was woken; returns whether it went well. Where it did not,
            it is called again after 2, 4, 8 … looks, a minute at most: the files of a copied folder
            may come after its manifest. The first look calls it in any case: the database may have
            changed after it was opened.
    """

    def __init__(self, folder: Path | None, every: float, reload: Callable[[bool], bool]) -> None:
        self.folder, self.every, self.reload = folder, every, reload
        self._event = threading.Event()
        self._woken = self._stopped = False
        self._seen: State = None
        self._failures, self._again = 0, math.inf
        self._thread = threading.Thread(target=self._watch, name="gcfast-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Reload now; may be called by a signal handler."""
        self._woken = True
        self._event.set()

    def close(self) -> None:
        """Stop the thread; a reload that has begun ends first."""
        self._stopped = True
        self._event.set()
        self._thread.join()

    def _state(self) -> State:
        if self.folder is None:
            return None
        try:
            found = os.stat(self.folder / MANIFEST)
        except OSError:  # between the removal of one folder and the renaming of another
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _watch(self) -> None:
        while True:
            self._event.wait(self.every or None)
            self._event.clear()
            if self._stopped:
                return
            woken, self._woken = self._woken, False
            state = self._state()
            changed = state not in (None, self._seen)
            if changed:
                self._failures = 0
            if woken or changed or time.monotonic() >= self._again:
                # Before the database is opened: a change while that goes on is then seen.
                self._seen = state
                well = self.reload(woken)
                self._failures = 0 if well else self._failures + 1
                pause = min(self.every * 2**self._failures, _LONGEST_PAUSE)
                self._again = math.inf if well or not self.every else time.monotonic() + pause


class Release:
    """A thread that gives free memory back every minute; does nothing where glibc is not used.

    Tensors of many sizes leave holes in malloc's heap. It keeps them, and so several times what the
    process uses, which would seem to grow for minutes.
    """

    def __init__(self, seconds: float = 60) -> None:
        self.seconds = seconds  # a call takes a tenth of one, and pages are made anew after it
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gcfast-memory", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        if self._trim is not None:
            self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._trim is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(self.seconds):
            self._trim(0)
