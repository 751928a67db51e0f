"""Maps of any number of pictures: to Parquet files, and from there to one Zarr store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcfast._checks import require_choice, require_int
from gcfast._extras import import_ray, needs_extra
from gcfast.database.manifest import read_manifest, version_of
from gcfast.explain.result import MapOptions
from gcfast.images.preprocessing import Preprocessing
from gcfast.ray import parts
from gcfast.ray.actors import Explain, Model, check_maps
from gcfast.ray.cluster import Pool, in_batches, pool, require_columns
from gcfast.ray.pictures import ERROR, Prepared

FORMATS = ("parquet", "zarr")
ZARR, ROWS = "maps.zarr", "rows.parquet"
# The command line gives these, a program leaves them out: the maps are the same.
_DEFAULTS: dict[str, Any] = {
    "k": 1, "index": "exact", "requery": False, "center": 0, "normalize": "max", "relu": True
}  # fmt: skip


class Written(NamedTuple):
    """What a run of :func:`explain` has written."""

    pictures: int  # in the folder, those of earlier runs included
    new: int  # of this run
    unreadable: int  # in the folder: rows with an ``error`` and a map of zeros
    flat: int  # in the folder: maps without a positive value, of pictures that were read


def explain(
    dataset: Any,
    model: Model,
    database: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image: str = "image",
    id: str = "id",
    format: str = "parquet",
    preprocessing: Prepared | None = None,
    batch_size: int = 32,
    actors: Pool | None = None,
    part_rows: int = 1_024,
    maps: str = "uint8",
    strict: bool = False,
    options: MapOptions | None = None,
    resume: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Written:
    """Explain pictures on a Ray cluster, and write maps and neighbors.

    "parquet" writes files ``part-….parquet`` to ``out``, with the columns of :class:`Explain` and
    the others of the data set; maps are Arrow's fixed-shape tensors, which
    ``ray.data.read_parquet`` and pyarrow read as arrays. "zarr" replaces them at the end by
    ``maps.zarr``, a group with an array for each column of numbers, ``map`` [N, OH, OW] among them,
    and ``rows.parquet``, the columns of text of the same rows.

    Args:
        dataset: a ``ray.data.Dataset`` with these columns.
        model: as for :class:`Embed`.
        database: its folder, which every node sees.
        out: the folder to write to, which every node sees.
        image: the column of pictures, as for :class:`Prepare`.
        id: the column of ids, all different.
        format: "parquet" or "zarr".
        preprocessing: as for :class:`Explain`.
        batch_size: pictures in a batch.
        actors: the pool; None for :func:`pool`.
        part_rows: pictures in a file: what a killed run loses at most for each task that writes.
        maps: "uint8" (255 is 1), "float16" or "float32".
        strict: stop at a picture that cannot be read.
        options: of the maps, as for :class:`Explain`.
        resume: leave out the pictures that are in ``out``.
        progress: show bars on stderr.
        **settings: of :func:`gcfast.load`.

    Raises:
        MissingExtraError: Ray is not installed, or Zarr for "zarr".
        FileExistsError: something is in ``out``, and ``resume`` is not set.
        TypeError, ValueError, GcfastError: as :class:`Explain`; a column that is not there; maps in
            ``out`` of another database, or made in another way, with ``resume``.
    """
    import_ray("gcfast.ray.explain")
    require_choice("format", format, FORMATS)
    require_int("batch_size", batch_size, 1)
    require_int("part_rows", part_rows, 1)
    check_maps(maps, options or {})
    require_columns(dataset, image=image, id=id)
    place = Path(database).absolute()  # actors may work in another folder
    manifest = read_manifest(place)  # here, and not first in an actor, whose errors are long
    if format == "zarr":
        _import_zarr()
    folder = Path(out).absolute()
    if (folder / ZARR).exists():
        raise FileExistsError(
            f"`out` must not be finished, got {folder}, which has {ZARR}: name another folder, or "
            "delete that one to start over"
        )
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise FileExistsError(
            f"`out` must be a new or empty folder, got {folder}; resume=True leaves out what it has"
        )
    made_with = _made_with(manifest, maps, preprocessing, {**(options or {}), **settings})
    parts.require_same(folder, made_with)
    stage = in_batches(parts.without_finished(dataset, folder, id), batch_size).map_batches(
        Explain,
        fn_constructor_args=(model, os.fspath(place)),
        fn_constructor_kwargs={
            "preprocessing": preprocessing,
            "image": image,
            "maps": maps,
            "strict": strict,
            "options": options,
            **settings,
        },
        batch_size=None,
        **(pool() if actors is None else actors).options(),
    )
    rows = batch_size * -(-part_rows // batch_size)
    new = parts.written(
        stage,
        folder,
        id,
        part_rows=rows,
        what="explaining",
        unit="pictures",
        show=progress,
        made_with=made_with,
    )
    kept = parts.read(folder, [ERROR, "flat"])
    good = np.asarray(kept[ERROR].to_pylist()) == ""
    if format == "zarr":
        to_zarr(folder)
    return Written(len(kept), new, int((~good).sum()), int(kept["flat"].to_numpy()[good].sum()))


def _made_with(
    manifest: dict[str, Any], maps: str, preprocessing: Prepared | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what maps depend on, as far as JSON can hold it; without what is at its default."""
    known: dict[str, Any] = {"database": version_of(manifest), "maps": maps}
    if isinstance(preprocessing, Preprocessing):
        known["preprocessing"] = preprocessing.to_dict()
    return known | {
        name: value
        for name, value in settings.items()
        if isinstance(value, (str, int, float, list, tuple))
        and name not in ("device", "cuda_graphs")
        and value != _DEFAULTS.get(name)
    }


def to_zarr(folder: Path) -> None:
    """Replace the parts in a folder by a Zarr group and a Parquet file of their text.

    A task writes a shard of the group from each part; the few parts that are smaller than the
    others, which would share one, follow in a task of their own.
    """
    zarr, ray = _import_zarr(), import_ray("format")
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {file: pq.ParquetFile(file).metadata.num_rows for file in parts.listed(folder)}
    size = max(files.values())
    order = sorted(files, key=lambda file: (files[file] != size, file.name))
    starts = np.cumsum([0, *(files[file] for file in order)]).tolist()
    schema = pq.ParquetFile(order[0]).schema_arrow
    tensors = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    wide = [
        field.name
        for field in schema
        if isinstance(field.type, pa.FixedShapeTensorType)
        or any(kind(field.type) for kind in tensors)
    ]
    staged = folder / f"{ZARR}.new"
    shutil.rmtree(staged, ignore_errors=True)
    group = zarr.open_group(staged, mode="w")
    for name, values in _columns(order[0], wide).items():
        inner = values.shape[1:]
        group.create_array(
            name,
            shape=(starts[-1], *inner),
            dtype=values.dtype,
            chunks=(1 if inner else size, *inner),
            shards=(size, *inner),
        )

    def copy(some: list[tuple[Path, int]]) -> None:
        into = zarr.open_group(staged, mode="r+")
        for file, start in some:
            for name, values in _columns(file, wide).items():
                into[name][start : start + len(values)] = values

    placed = list(zip(order, starts, strict=False))
    whole = [[pair] for pair in placed if files[pair[0]] == size]
    task = ray.remote(copy)
    jobs = [*whole, placed[len(whole) :]]
    parts.unwrapped(lambda: ray.get([task.remote(some) for some in jobs]))
    rest = [field.name for field in schema if field.name not in wide]
    with pq.ParquetWriter(folder / f"{ROWS}.new", pa.schema([schema.field(n) for n in rest])) as to:
        for file in order:
            to.write_table(pq.read_table(file, columns=rest))
    os.rename(folder / f"{ROWS}.new", folder / ROWS)
    os.rename(staged, folder / ZARR)
    for file in order:
        file.unlink()
    (folder / parts.RUN).unlink(missing_ok=True)


def _columns(file: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=names).combine_chunks()
    return {name: parts.as_array(table[name].chunk(0)) for name in names}


def _import_zarr() -> Any:
    with needs_extra("ray", "format='zarr'"):
        import zarr
    return zarr
