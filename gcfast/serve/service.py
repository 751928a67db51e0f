"""What answers requests: the database in use, the thread with the model, threads that decode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import HTTPException
from numpy.typing import NDArray

from gcfast._log import tell
from gcfast.database.manifest import read_manifest, version_of
from gcfast.errors import UnsupportedModelError
from gcfast.serve.batcher import Batcher, Job
from gcfast.serve.metrics import Metrics
from gcfast.serve.served import Answer, PairAnswer, Served
from gcfast.serve.settings import ServeSettings
from gcfast.serve.watch import Release, Watcher

T = TypeVar("T")

_RETRY_SECONDS = 1  # a queue of the default length is some seconds of a CPU, less of a GPU


class Service:
    """The state of an application.

    Args:
        source: opens the database on its network; called now, and again for each exchange of it.
        settings: limits and batches.

    Attributes:
        served: the database in use. What has begun with another one ends with that.
    """

    def __init__(self, source: Callable[[], Served], settings: ServeSettings) -> None:
        self.source, self.settings = source, settings
        self.metrics = Metrics()
        self.served = source()
        self.served.warm_up(settings.center)
        self.in_flight = 0
        self._told = ""  # of a database that cannot be opened, so that it is logged once
        self.batcher = Batcher(
            size=settings.batch_size, wait=settings.wait, observe=self.metrics.observe_batch
        )
        self.threads = ThreadPoolExecutor(settings.decoders, "gcfast-decode")
        path = self.served.database.path
        self.watcher = Watcher(path, settings.watch, self.reload)
        self.release = Release()
        self.metrics.follow(
            lambda: self.batcher.waiting,
            lambda: self.in_flight,
            lambda: len(self.served.database),
        )

    def start(self) -> None:
        """Start the threads."""
        self.batcher.start()
        self.watcher.start()
        self.release.start()

    def close(self) -> None:
        """Finish what waits, and stop the threads."""
        self.release.close()
        self.watcher.close()
        self.batcher.close()
        self.threads.shutdown()

    @property
    def ready(self) -> bool:
        """Whether another request would be taken."""
        return self.batcher.alive and self.in_flight < self.settings.queue

    def reload(self, forced: bool) -> bool:
        """Go over to the database as it is now, between two batches.

        A database that cannot be opened is logged, and the one in use stays.

        Args:
            forced: also where its manifest is the one in use.

        Returns:
            Whether the database as it is now is in use.
        """
        try:
            path = self.served.database.path
            if path is not None and not forced:
                now = version_of(read_manifest(path))
                if now == self.served.version:
                    return True
            served = self.source()
            served.warm_up(self.settings.center)
        except Exception as error:
            if str(error) != self._told:
                stays = "reload failed, the database in use stays"
                tell("serve", stays, logging.ERROR, reason=str(error))
            self._told = str(error)
            self.metrics.reloads.labels("failed").inc()
            return False
        self.served, self._told = served, ""
        self.metrics.reloads.labels("done").inc()
        tell("serve", "reloaded", rows=len(served.database), database=served.version)
        return True

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as one that is being answered.

        Raises:
            HTTPException: 503, there are too many already.
        """
        if not self.ready:
            raise HTTPException(
                503, "too many requests wait", headers={"Retry-After": str(_RETRY_SECONDS)}
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the threads that decode."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, function, *arguments)

    async def explain(self, served: Served, view: NDArray[Any]) -> Answer:
        """Explain a view in a batch with others that wait."""

        def run(views: Sequence[NDArray[Any]]) -> list[Answer]:
            return served.explain(views, center=self.settings.center)

        job = Job(("explain", served, view.shape), run, view)
        answer: Answer = await asyncio.wrap_future(self.batcher.submit(job))
        return answer

    async def explain_pair(
        self, served: Served, view: NDArray[Any], other: NDArray[Any]
    ) -> PairAnswer:
        """Explain a pair of views in a batch with others that wait.

        Raises:
            HTTPException: 501, the network does not allow it; 422, views of two shapes.
        """
        if view.shape != other.shape:  # of a transform
            raise HTTPException(422, "the two pictures give the network inputs of two sizes")
        job = Job(("pair", served, view.shape), served.explain_pairs, (view, other))
        try:
            answer: PairAnswer = await asyncio.wrap_future(self.batcher.submit(job))
        except UnsupportedModelError:
            raise HTTPException(501, "pairs of this network cannot be explained") from None
        return answer
