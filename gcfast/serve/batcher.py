"""Jobs that wait at the same time run as one batch, in one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple


class Job(NamedTuple):
    """Work for the thread; jobs with the same key run together."""

    key: Hashable
    run: Callable[[Sequence[Any]], Sequence[Any]]  # the arguments of jobs → their answers
    argument: Any


Waiting = tuple[Job, "Future[Any]"]


class Batcher:
    """A queue, and a thread that takes batches from it.

    A batch begins with the job that has waited longest. It takes what comes within ``wait`` seconds
    of that, up to ``size`` jobs. A batch that fails runs again job by job, so that a picture that
    cannot be explained fails alone.

    Args:
        size: jobs of a batch, at most.
        wait: seconds.
        observe: called with the size of each batch that has run, and its seconds.
    """

    def __init__(self, *, size: int, wait: float, observe: Callable[[int, float], None]) -> None:
        self.size, self.wait, self.observe = size, wait, observe
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gcfast-model", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Let the thread finish what waits, and wait for it. No job may come after this."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread takes jobs."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """How many jobs no batch has taken yet."""
        return self._queue.qsize()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job; its answer, or its exception, comes through the future.

        A future that is cancelled before its batch begins is not run.
        """
        future: Future[Any] = Future()
        self._queue.put((job, future))
        return future

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            taken = [first]
            until = time.monotonic() + self.wait
            last = False
            while len(taken) < self.size and not last:
                try:
                    following = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if following is None:
                    last = True
                else:
                    taken.append(following)
            self._run_all(taken)
            if last:
                return

    def _run_all(self, taken: list[Waiting]) -> None:
        groups: dict[Hashable, list[Waiting]] = {}
        for job, future in taken:
            if future.set_running_or_notify_cancel():
                groups.setdefault(job.key, []).append((job, future))
        for group in groups.values():
            self._run(group)

    def _run(self, group: list[Waiting]) -> None:
        started = time.perf_counter()
        try:
            answers = group[0][0].run([job.argument for job, _ in group])
        except Exception as error:
            if len(group) == 1:
                group[0][1].set_exception(error)
            else:
                for one in group:
                    self._run([one])
            return
        self.observe(len(group), time.perf_counter() - started)
        for (_, future), answer in zip(group, answers, strict=True):
            future.set_result(answer)
