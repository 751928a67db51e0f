"""Results in a folder that every node sees: Parquet files that are complete or not there.

What a killed run has finished is there; the next one leaves those rows out before it decodes them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gcfast._extras import import_ray
from gcfast._progress import Progress
from gcfast.database import files
from gcfast.errors import GcfastError
from gcfast.ray.cluster import in_order
from gcfast.ray.pictures import ERROR, Batch

logger = logging.getLogger("gcfast.ray")

T = TypeVar("T")

PART = re.compile(r"part-[0-9a-f]{32}\.parquet")
RUN = "run"  # a file that names the run that writes
MADE_WITH = b"gcfast"  # the entry of a part's metadata that says what its rows were made with
PART_ROWS = 8_192  # how many rows a killed run loses at most, for each task that writes
TABLE_ROWS = 65_536  # of a part that are in memory at once where parts are joined


def listed(folder: Path) -> list[Path]:
    """Return the complete files of a folder, by name; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if PART.fullmatch(file.name))


def columns(folder: Path) -> list[str]:
    """Return the names of the columns that parts have."""
    import pyarrow.parquet as pq

    names: list[str] = pq.read_schema(listed(folder)[0]).names
    return names


def read(folder: Path, columns: list[str]) -> Any:
    """Return columns of all parts as a ``pyarrow.Table``, in the order of :func:`listed`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables(
        [pq.read_table(file, columns=columns, partitioning=None) for file in listed(folder)],
        promote_options="permissive",
    )


def require_same(folder: Path, made_with: dict[str, Any]) -> None:
    """Raise ValueError where the parts of a folder were made with something else."""
    import pyarrow.parquet as pq

    for file in listed(folder)[:1]:  # all of a folder's are of one kind
        held = json.loads((pq.read_schema(file).metadata or {}).get(MADE_WITH, b"{}"))
        wanted = json.loads(json.dumps(made_with))
        other = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
        if other:
            raise ValueError(
                f"`out` must have results of the same {', '.join(other)} to be continued, got "
                f"{folder}: name another folder, or delete that one to start over"
            )


def encoded(keys: Any) -> NDArray[Any]:
    """Return keys as an array that can be searched: strings in UTF-8, of the longest one's width.

    Ray shares such an array between the processes of a node; an array of objects it copies.
    """
    values = keys.to_pylist() if hasattr(keys, "to_pylist") else list(keys)
    if all(isinstance(value, str) for value in values):
        return np.array([value.encode() for value in values], dtype=np.bytes_)
    return np.asarray(values)


def places(known: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return where keys are in a sorted array; -1 for those that are not in it."""
    if not len(known):
        return np.full(len(keys), -1, np.int64)
    at = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[at] == keys, at, -1)


class Unfinished:
    """The rows whose key is not among the finished ones; for ``map_batches`` over Arrow tables."""

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.finished = import_ray("resume").put(np.sort(encoded(read(folder, [key])[key])))

    def __call__(self, table: Any) -> Any:
        """Return the table without finished rows."""
        keys = encoded(table[self.key])
        known = import_ray("resume").get(self.finished)
        return table.filter(places(known, keys) < 0)


def claim(folder: Path) -> str:
    """Have tasks of earlier runs write nothing more to a folder; returns the name of this run."""
    run = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / RUN, run.encode())
    return run


def without_finished(dataset: Any, folder: Path, key: str) -> Any:
    """Return the data set without the rows that a folder has."""
    # What is finished is read when nothing more of a killed run can come.
    if (folder / RUN).exists():
        claim(folder)
    if not listed(folder):
        return dataset
    return dataset.map_batches(
        Unfinished(folder, key).__call__, batch_size=None, batch_format="pyarrow"
    )


class Write:
    """Batches to Parquet files, for ``map_batches``: gives how many rows and errors each has.

    A task of an earlier run, which was killed and is not dead yet, writes nothing more.
    """

    def __init__(self, folder: Path, key: str, made_with: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.key = key
        self.made_with = None if made_with is None else {MADE_WITH: json.dumps(made_with)}
        self.run = claim(folder)
        for left in folder.glob("part-*.new"):
            left.unlink(missing_ok=True)

    def __call__(self, batch: Batch) -> Batch:
        """Write a batch."""
        import pyarrow.parquet as pq

        keys = batch[self.key].tolist()
        name = hashlib.sha256("\0".join(map(str, keys)).encode()).hexdigest()[:32]
        staged = self.folder / f"part-{name}.{uuid.uuid4().hex}.new"
        table = as_table(batch).replace_schema_metadata(self.made_with)
        # Floats have no values in common, and maps of 8 bits take a third with one dictionary each.
        few = [
            name if batch[name].ndim == 1 else f"{name}.list.element"
            for name in table.column_names
            if batch[name].dtype.kind != "f"
        ]
        pq.write_table(table, staged, compression="zstd", use_dictionary=few)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        if (self.folder / RUN).read_text() != self.run:
            staged.unlink()
            raise GcfastError(f"another process writes to {self.folder} now")
        files.rename(staged, self.folder / f"part-{name}.parquet")
        errors = int((batch[ERROR] != "").sum()) if ERROR in batch else 0
        return {"rows": np.array([len(keys)]), "errors": np.array([errors])}


def as_table(batch: Batch) -> Any:
    """Return columns as a ``pyarrow.Table``: those of several dimensions as fixed-shape tensors.

    Tensors without elements, for which Parquet has no type, are left out.

    Raises:
        ValueError: a column that Arrow has no type for.
    """
    import pyarrow as pa

    columns = {}
    for name, values in batch.items():
        try:
            if values.ndim > 1 and values[0].size == 0:
                continue
            if values.ndim > 1:
                whole = np.ascontiguousarray(values)
                columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(whole)
            else:
                columns[name] = pa.array(values.tolist() if values.dtype == object else values)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"the column {name!r} must be what Parquet can hold; leave it out with "
                f"Dataset.drop_columns: {error}"
            ) from None
    return pa.table(columns)


def written(
    dataset: Any,
    folder: Path,
    key: str,
    *,
    part_rows: int,
    what: str,
    unit: str,
    show: bool,
    made_with: dict[str, Any] | None = None,
) -> int:
    """Run a data set and write what it gives; returns the number of rows.

    ``made_with`` is what :func:`require_same` compares when the folder is continued.

    Raises:
        GcfastError, ValueError, TypeError, OSError: what a task or an actor raised, as it was.
        ValueError: there are no rows; a key is missing, or comes twice: of batches with the same
            keys one would be left, so that nothing of this run is.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    before = listed(folder)
    already = sum(pq.read_metadata(file).num_rows for file in before)
    began = time.monotonic()

    def run() -> int:
        parts = dataset.map_batches(Write(folder, key, made_with).__call__, batch_size=part_rows)
        rows = 0
        with in_order(parts), Progress(what, unit, total=None, show=show) as shown:
            for part in parts.iter_rows():
                rows += part["rows"]
                shown.update(part["rows"])
        return rows

    rows = unwrapped(run)
    now = listed(folder)
    if not now:
        (folder / RUN).unlink()
        raise ValueError("`dataset` must have rows, got none")
    keys = pc.count_distinct(read(folder, [key])[key]).as_py()
    if keys < already + rows:
        for file in set(now).difference(before):
            file.unlink()
        if not before:
            (folder / RUN).unlink()
        raise ValueError(
            f"the column {key!r} must have another value in each row, got {keys} values in "
            f"{already + rows} rows"
        )
    logger.info("%s: %d %s in %.1f s", what, rows, unit, time.monotonic() - began)
    return rows


def unwrapped(run: Callable[[], T]) -> T:
    """Return what a call returns; raise the error of a task or an actor without Ray's around it.

    Nothing of the failed run is kept: frames in a traceback would keep its actors and their CPUs
    for as long as somebody holds the error, and the next run would wait for them.
    """
    before = set(_workers())
    try:
        return run()
    except BaseException as error:
        logger.debug("failed on Ray", exc_info=True)
        raised = _own(error) or error
    raised.__cause__ = raised.__context__ = None
    raised = raised.with_traceback(None)
    gc.collect()  # Ray's errors and their frames are in cycles
    # What a worker still waits for may never come, and Ray keeps it until then.
    ray = import_ray("unwrapped")
    for number, worker in _workers().items():
        if number not in before:
            ray.kill(worker)
    raise raised


def _workers() -> dict[str, Any]:
    """The actors of data sets that this process knows, by their ids."""
    from ray.actor import ActorHandle

    # By its type: `isinstance` asks every object, and some answer by a warning.
    known = [one for one in gc.get_objects() if type(one) is ActorHandle]
    return {one._actor_id.hex(): one for one in known if str(one).startswith("Actor(MapWorker(")}


def _own(error: BaseException | None) -> BaseException | None:
    """Return the error of ours in what Ray raised, if there is one."""
    ray = import_ray("unwrapped")
    while error is not None:
        if isinstance(error, ray.exceptions.RayTaskError):
            error = error.cause
        elif isinstance(error, GcfastError | ValueError | TypeError | OSError):
            return error
        else:
            error = error.__cause__
    return None


def scattered(
    folder: Path, columns: list[str], at: NDArray[np.int64], count: int, into: Path
) -> dict[str, torch.Tensor]:
    """Join columns of all parts in another order.

    Args:
        folder: the parts'.
        columns: numbers, or tensors of one shape.
        at: the place of each row of the parts, in the order of :func:`listed`; -1 for none.
        count: of places.
        into: a folder for temporary files, one for each column, that the tensors are mapped from.

    Returns:
        [count, ...] for each column.
    """
    import pyarrow.parquet as pq

    into.mkdir(parents=True, exist_ok=True)
    joined: dict[str, NDArray[Any]] = {}
    first = 0
    for file in listed(folder):
        for batch in pq.ParquetFile(file).iter_batches(TABLE_ROWS, columns=columns):
            places = at[first : first + len(batch)]
            first += len(batch)
            for name in columns:
                values = as_array(batch.column(name))
                if name not in joined:
                    joined[name] = np.lib.format.open_memmap(
                        into / f"{name}.npy", "w+", values.dtype, (count, *values.shape[1:])
                    )
                joined[name][places[places >= 0]] = values[places >= 0]
    return {name: torch.from_numpy(values) for name, values in joined.items()}


def as_array(column: Any) -> NDArray[Any]:
    """Return an Arrow array of numbers or tensors as NumPy has it, [n, ...]."""
    import pyarrow as pa

    if isinstance(column.type, pa.FixedShapeTensorType):
        values: NDArray[Any] = column.to_numpy_ndarray()
        return values
    return np.asarray(column.to_numpy(zero_copy_only=False))


def chunks(count: int, size: int = TABLE_ROWS) -> Iterator[slice]:
    """Yield the slices of so many rows that go through memory at once."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
