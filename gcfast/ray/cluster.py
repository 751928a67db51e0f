"""How much of a cluster a pool of actors takes, and batches that are the same in every run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from gcfast._checks import require_int
from gcfast._extras import import_ray


class Pool(NamedTuple):
    """A pool of actors.

    Attributes:
        actors: how many there are.
        cpus: of each.
        gpus: of each; a share where several actors use one GPU.
    """

    actors: int
    cpus: float
    gpus: float

    def options(self) -> dict[str, Any]:
        """Return the pool as keywords of ``Dataset.map_batches``."""
        ray = import_ray("Pool")
        return {
            "compute": ray.data.ActorPoolStrategy(size=self.actors),
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
        }


def pool(
    actors: int | None = None, *, cpus: float | None = None, gpus: float | None = None
) -> Pool:
    """Return a pool of actors that leaves one CPU of the cluster to other tasks.

    An actor keeps its CPUs as long as it lives. Actors that take every CPU leave none to the tasks
    that read, decode and write, and the actors then wait for data that never comes.

    Args:
        actors: how many; None for as many as there is room for.
        cpus: of each; None for 1, or 0 in a cluster of a single CPU.
        gpus: of each, also a share such as 0.25; None for 1 in a cluster that has any, and 0.

    Raises:
        MissingExtraError: Ray is not installed.
        TypeError, ValueError: an argument out of range; more than the cluster has.
    """
    ray = import_ray("pool")
    if not ray.is_initialized():
        ray.init()
    have = ray.cluster_resources()
    return fitted(have.get("CPU", 0), have.get("GPU", 0), actors, cpus, gpus)


def fitted(
    have_cpus: float,
    have_gpus: float,
    actors: int | None,
    cpus: float | None,
    gpus: float | None,
) -> Pool:
    """Return the pool for a cluster of so many CPUs and GPUs; see :func:`pool`."""
    free = max(have_cpus - 1, 0)
    gpus = float(have_gpus > 0) if gpus is None else gpus
    cpus = float(free >= 1) if cpus is None else cpus
    for name, share in (("cpus", cpus), ("gpus", gpus)):
        if not math.isfinite(share) or share < 0:
            raise ValueError(f"`{name}` must be a number of at least 0, got {share}")
    room = [math.floor(h / n + 1e-9) for h, n in ((free, cpus), (have_gpus, gpus)) if n > 0]
    most = min(room, default=1)
    asked = most if actors is None else require_int("actors", actors, 1)
    if asked > most and not (cpus == gpus == 0):
        raise ValueError(
            f"`actors` must be at most {most} of {cpus:g} CPUs and {gpus:g} GPUs, got {asked}: the "
            f"cluster has {have_cpus:g} CPUs, one of which is left to the tasks that read and "
            f"decode, and {have_gpus:g} GPUs"
        )
    if most < 1:
        raise ValueError(
            f"`cpus` and `gpus` must leave room for an actor, got {cpus:g} and {gpus:g}: the "
            f"cluster has {have_cpus:g} CPUs, one of which is left to the tasks that read and "
            f"decode, and {have_gpus:g} GPUs"
        )
    return Pool(asked, cpus, gpus)


def in_batches(dataset: Any, batch_size: int) -> Any:
    """Return the data set in blocks of exactly ``batch_size`` rows, except the last one."""
    return dataset.repartition(target_num_rows_per_block=batch_size, strict=True)


@contextmanager
def in_order(dataset: Any) -> Iterator[Any]:
    """Have blocks arrive in the order in which they are read, and errors as they were raised.

    Only then are batches of :func:`in_batches` the same in every run.
    """
    context = dataset.context
    options = context.execution_options
    before = options.preserve_order, context.raise_original_map_exception
    options.preserve_order, context.raise_original_map_exception = True, True
    try:
        yield dataset
    finally:
        options.preserve_order, context.raise_original_map_exception = before


def require_columns(dataset: Any, **columns: str | None) -> list[str]:
    """Return the names of columns that a data set has.

    Args:
        dataset: a ``ray.data.Dataset``.
        **columns: the name of each by the argument that gives it; None for none.

    Raises:
        TypeError: not a data set.
        ValueError: it has no rows, it lacks one of them, or image and id are one.
    """
    ray = import_ray("dataset")
    if not isinstance(dataset, ray.data.Dataset):
        raise TypeError(f"`dataset` must be a ray.data.Dataset, got {type(dataset).__name__}")
    schema = dataset.schema()
    if schema is None:
        raise ValueError("`dataset` must have rows, got none")
    there = schema.names
    for argument, name in columns.items():
        if name is not None and name not in there:
            raise ValueError(
                f"`{argument}` must be a column of the data set, which has "
                f"{', '.join(map(repr, there))}, got {name!r}"
            )
    if columns.get("image") == columns.get("id"):
        raise ValueError(
            f"`id` must be another column than `image`, which results do not keep, got "
            f"{columns['id']!r} for both"
        )
    return [name for name in columns.values() if name is not None]
