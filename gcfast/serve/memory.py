"""Memory that the C library keeps after batches of many sizes, given back to the system."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

SECONDS = 60  # it takes a tenth of one, and the batches after it have their pages made anew


class Release:
    """A thread that gives free memory back every minute; does nothing where glibc is not used.

    Tensors of many sizes leave holes in malloc's heap. It keeps them, and so several times what the
    process uses, which would seem to grow for minutes.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
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
