"""A build on a cluster: both stages in pools of actors, and the rows of a build on one machine.

Stage 1 runs the network over batches of exactly ``batch_size`` pictures, in the data set's order,
so that a batch has the same pictures in every run, and writes embeddings as parts
(:mod:`gcfast.ray.parts`). They are then joined, in the order of their ids, to the spool of an
unfinished build (:mod:`gcfast.builder.resumable`), in the folder that the database will have. In
stage 2 every actor maps that spool, the table that triplets are drawn from, and makes the rows of
some of its images. From then on it is the build on one machine.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gcfast
from gcfast._checks import listed, require_choice, require_int
from gcfast._extras import import_ray
from gcfast._log import told
from gcfast.builder.describe import identity
from gcfast.builder.embed import Embedded, Totals, complete, forward, head_of, other_images
from gcfast.builder.loader import on_device
from gcfast.builder.resumable import UnfinishedBuild
from gcfast.builder.rows import Made, RowTable
from gcfast.builder.spool import KeptSpool
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.ids import IdTable
from gcfast.database.manifest import STATE, STORAGES
from gcfast.images.loader import UnreadableImageError
from gcfast.images.preprocessing import Preprocessing
from gcfast.method.head import AffineHead
from gcfast.method.labels import Labels, Values
from gcfast.ray import parts
from gcfast.ray.actors import Model
from gcfast.ray.cluster import Pool, in_batches, in_order, pool, require_columns
from gcfast.ray.pictures import DOUBT, ERROR, VIEW, Batch, Prepare, Prepared
from gcfast.ray.stages import ROW_COLUMNS, EmbedAll, SecondPass, Weigh

EMBEDDINGS = "embeddings"  # the folder of stage 1's results
UNIT_ROWS = 4_096  # images of stage 2 that an actor is given at once


def build(
    dataset: Any,
    model: Model,
    out: str | os.PathLike[str],
    *,
    preprocessing: Prepared,
    layer: str | None = None,
    image: str = "image",
    label: str = "label",
    id: str = "id",
    order: str | None = None,
    batch_size: int = 32,
    actors: Pool | None = None,
    part_rows: int = parts.PART_ROWS,
    strict: bool = False,
    kept: dict[str, Any] | None = None,
    storage: str = "float32",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Database:
    """Build a database from labelled pictures on a Ray cluster.

    The database is the one that :meth:`gcfast.Explainer.build` makes of the same pictures in the
    order of their ids (or of ``order``), bit for bit where the data set is in that order, the
    processors are of one kind and as many threads compute (an actor has one for each CPU). Results
    go to ``{out}.parts`` as they are made, which is removed at the end.

    Args:
        dataset: a ``ray.data.Dataset`` with these columns.
        model: the network, or a function that makes it.
        out: the folder to write the database to, which every node sees; as are the pictures, where
            the data set has paths of them.
        preprocessing: size, crop and normalization, or a function; see :class:`Prepare`.
        layer: as for :class:`gcfast.Explainer`.
        image: the column of pictures: paths, encoded bytes, dicts of the two, or uint8 arrays.
        label: the column of labels.
        id: the column of ids.
        order: a column whose values, all different, are the order of the rows; None for the ids.
        batch_size: pictures in a batch.
        actors: the pool of both stages; None for :func:`pool`.
        part_rows: rows in a file of results: what a killed build loses at most for each task.
        strict: stop at a picture that cannot be read; otherwise it is left out, with a warning.
        kept: what the manifest keeps of the preprocessing; None for what ``preprocessing`` is.
        storage: "float32" or "float16" for the rows' embeddings and weights.
        resume: continue the unfinished build of ``out``, if there is one.
        overwrite: replace a gcfast database at ``out``, once the new one is complete.
        progress: show bars on stderr.
        **settings: of :class:`gcfast.Explainer`.

    Returns:
        The database, opened.

    Raises:
        MissingExtraError: Ray is not installed.
        TypeError, ValueError: as :meth:`gcfast.Explainer.build`; a column that is not there.
        FileExistsError, GcfastError, OSError: as there.
        UnreadableImageError: no picture can be read, or one cannot and ``strict`` is set.
    """
    import_ray("gcfast.ray.build")
    require_choice("storage", storage, STORAGES)
    require_int("batch_size", batch_size, 1)
    require_int("part_rows", part_rows, 1)
    columns = require_columns(dataset, image=image, label=label, id=id, order=order)
    explainer = gcfast.Explainer(
        model if isinstance(model, nn.Module) else model(), layer, **settings
    )
    if kept is None and isinstance(preprocessing, Preprocessing):
        kept = preprocessing.to_dict()
    work = _Build(
        Path(out).absolute(),
        explainer.network,
        dataset.select_columns(list(dict.fromkeys(columns))),
        explainer.settings,
        progress,
    )
    work.prepare = Prepare(preprocessing, image=image, strict=strict)
    work.label, work.id, work.order = label, id, order
    work.batch_size, work.part_rows = batch_size, part_rows
    work.pool = pool() if actors is None else actors
    if not resume and work.parts.exists():
        raise FileExistsError(
            f"`out` must not have results of an unfinished build, got {work.parts}: resume=True "
            "continues it; to start over, delete that folder"
        )
    same = identity(work.network, work.settings, kept, storage)
    facts = {"method": work.settings.method, "out": os.fspath(out), "resume": resume, "on": "ray"}
    try:
        with told("build", "build", **facts) as found:
            database = work.run(same, resume=resume, overwrite=overwrite)
            found |= {"layer": database.manifest["layer"], **database.report}
    except BaseException:
        if not parts.listed(work.parts / EMBEDDINGS):
            shutil.rmtree(work.parts, ignore_errors=True)
        raise
    shutil.rmtree(work.parts, ignore_errors=True)
    return database


class _Build(UnfinishedBuild):
    """An unfinished build whose stages run on a cluster; ``loader`` is the data set."""

    loader: Any
    prepare: Prepare
    label: str
    id: str
    order: str | None
    batch_size: int
    part_rows: int
    pool: Pool

    @property
    def parts(self) -> Path:
        """The folder of what actors give."""
        return self.folder.with_name(f"{self.folder.name}.parts")

    def begin(self, same: dict[str, Any]) -> None:
        """Continue the unfinished build, whose parts are of the same; or a new one without any."""
        known = (self.folder / STATE).exists()
        super().begin(same)
        if not known and self.parts.exists():
            raise FileExistsError(
                f"`out` must have a {STATE} that says what {self.parts} is of, {self.folder} has "
                "none: delete those results to start over"
            )

    @property
    def begun(self) -> bool:
        """Whether anything is complete that a later build can continue from."""
        return super().begun or bool(parts.listed(self.parts / EMBEDDINGS))

    def run_stage(self, dataset: Any, folder: Path, key: str, block: int, what: str) -> None:
        """Run a stage over what is not done yet; blocks of so many rows are not torn apart."""
        parts.written(
            dataset,
            folder,
            key,
            part_rows=block * math.ceil(self.part_rows / block),
            what=what,
            unit="pictures",
            show=self.progress,
        )

    def prepared(self, folder: Path) -> Any:
        """Return batches of decoded pictures that a folder has nothing of yet."""
        left = parts.without_finished(self.loader, folder, self.id)
        return in_batches(left, self.batch_size).map_batches(self.prepare.__call__, batch_size=None)

    # Stage 1

    def embed(self) -> Embedded:
        """Stage 1, without what an earlier run has finished."""
        spool, totals = self.opened()
        if self.state["stage"] != "embedding":
            return totals.embedded(spool)
        folder = self.parts / EMBEDDINGS
        totals.head = self._first_batch()
        stage = self.prepared(folder).map_batches(
            EmbedAll,
            fn_constructor_args=(self.prepare, self.id, self.network, self.settings, totals.head),
            batch_size=None,
            **self.pool.options(),
        )
        self.run_stage(stage, folder, self.id, self.batch_size, "embedding")
        try:
            self._join(folder, spool, totals)
            embedded = complete(spool, totals)
            self.state["stage"] = "rows"
            self.commit(spool, totals)
            return embedded
        finally:
            spool.close()

    def _first_batch(self) -> AffineHead | None:
        """Return the head, probed as a build does, on the first batch that can be read."""
        views = parts.unwrapped(self._first_views)
        images = self.prepare.normalized(views[VIEW][views[ERROR] == ""])
        images = on_device(images, self.network)
        head = head_of(self.network, images, self.settings)
        forward(self.network, images, self.settings, head)
        return head

    def _first_views(self) -> Batch:
        """Return the first batch that has pictures that can be read."""
        batches = self.loader.iter_batches(batch_size=self.batch_size)
        with in_order(self.loader):
            for batch in batches:
                views = self.prepare(batch)
                if (views[ERROR] == "").any():
                    return views
        raise UnreadableImageError("`dataset` must have pictures that can be read, got none")

    def _join(self, folder: Path, spool: KeptSpool, totals: Totals) -> None:
        """Put the parts into the spool, in the order of the rows."""
        import pyarrow.compute as pc

        small = [self.id, self.label, ERROR, DOUBT, "pixels", "sums", "agreed"]
        order = self.order or self.id
        table = parts.read(folder, list(dict.fromkeys([*small, order])))
        self._tell(table)
        numbers = np.flatnonzero(pc.equal(table[ERROR], "").to_numpy())
        numbers = numbers[pc.sort_indices(table[order].take(numbers)).to_numpy()]
        N = len(numbers)
        if (values := pc.count_distinct(table[order].take(numbers)).as_py()) < N:
            raise ValueError(
                f"`order` must be a column with another value in each row, got {values} values of "
                f"{order!r} in {N} rows"
            )
        at = np.full(len(table), -1, np.int64)
        at[numbers] = np.arange(N)
        table = table.take(numbers)

        first = table.filter(pc.not_equal(table["sums"], b""))
        for content, pixels in zip(
            first["sums"].to_pylist(), first["pixels"].to_pylist(), strict=True
        ):
            sums = torch.frombuffer(bytearray(content), dtype=torch.float64) * pixels
            totals.channel_sum = totals.channel_sum + sums if len(totals.channel_sum) else sums
        totals.pixel_count = pc.sum(table["pixels"]).as_py()
        if totals.head is not None and not all(table["agreed"].to_pylist()):
            totals.head = None

        wide = ["embeddings"]
        if totals.head is not None:
            wide += ["norms", "pixels"] + ["pooled"] * (self.settings.method == "gradcam++")
        elif self.settings.is_proxy:
            wide.append("directions")
        joined = parts.scattered(folder, wide, at, N, self.parts / "joined")
        checked = Values.listed if self.settings.objective.real_labels else Labels.listed
        for rows in parts.chunks(N):
            some = table.slice(rows.start, rows.stop - rows.start)
            ids = IdTable.encoded([str(name) for name in some[self.id].to_pylist()])
            spool.add(
                **{name: values[rows] for name, values in joined.items()},
                labels=totals.labels.add(checked(some[self.label].to_pylist(), len(some))),  # type: ignore[arg-type]
                id_ends=ids.ends + totals.id_bytes,
                id_bytes=ids.content,
            )
            totals.id_bytes += len(ids.content)
        totals.rows = N
        shutil.rmtree(self.parts / "joined", ignore_errors=True)

    def _tell(self, table: Any) -> None:
        """Warn of pictures that were left out, and of what was assumed of others."""
        reasons = dict(zip(table[self.id].to_pylist(), table[ERROR].to_pylist(), strict=True))
        bad = [f"{name}: {reason}" for name, reason in sorted(reasons.items()) if reason]
        if len(bad) == len(reasons):
            raise UnreadableImageError(f"none of the {len(bad)} pictures can be read: {bad[0]}")
        if bad:
            warnings.warn(
                f"unreadable pictures, left out: {len(bad)} ({listed(bad)})", stacklevel=2
            )
        doubts = Counter(doubt for doubt in table[DOUBT].to_pylist() if doubt)
        for doubt, count in doubts.most_common():
            warnings.warn(f"{doubt}: {count} pictures", stacklevel=2)

    # Stage 2

    def made(self, embedded: Embedded, start: int) -> Iterator[Made]:
        """Make the rows in actors, and yield those from ``start`` on, as a shard has them."""
        if self.settings.is_proxy:  # without weights, and so without work
            yield from super().made(embedded, start)
            return
        ray, folder, N = import_ray("gcfast.ray.build"), self.parts / "rows", len(embedded.ids)
        context = (self.network, self.settings, self.folder, self.state["spool"], self.opened()[1])
        if embedded.head is not None or self.settings.is_elementwise:
            units = ray.data.from_items([{"image": first} for first in range(0, N, UNIT_ROWS)])
            units = in_batches(parts.without_finished(units, folder, "image"), 1)
            stage = units.map_batches(
                Weigh,
                fn_constructor_args=context,
                fn_kwargs={"count": UNIT_ROWS},
                batch_size=None,
                **self.pool.options(),
            )
            self.run_stage(stage, folder, "image", UNIT_ROWS, "making rows")
        else:
            ids = parts.encoded(list(embedded.ids))
            order = np.argsort(ids)
            known = ray.put((ids[order], order))
            stage = self.prepared(folder).map_batches(
                SecondPass,
                fn_constructor_args=(self.prepare, self.id, self.label, known, *context),
                batch_size=None,
                **self.pool.options(),
            )
            self.run_stage(stage, folder, self.id, self.batch_size, "making rows")
        images = parts.read(folder, ["image"])["image"].to_numpy()
        if (again := int((images >= 0).sum())) != N:
            raise other_images(f"it gave {N} images first and {again} now")
        joined = {"channels": torch.zeros((N, 0), dtype=torch.int64)}  # where rows have none
        there = [name for name in ROW_COLUMNS if name in parts.columns(folder)]
        joined |= parts.scattered(folder, there, images, N, self.parts / "joined")
        widths = joined["channels"].shape[1], joined["weights"].shape[1]
        table = RowTable(shards.SHARD_ROWS, *widths)
        for rows in parts.chunks(N):
            found = joined["found"][rows].nonzero().flatten() + rows.start
            found = found[found >= start]
            columns = [joined[name][found] for name in ROW_COLUMNS if name != "found"]
            yield from table.parts([found, *columns], embedded)
        if table.filled:
            yield table.take(embedded)
