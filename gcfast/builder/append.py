"""Further rows for a database: their triplets from the stored and the new embeddings together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gcfast.builder.describe import changed_settings, identity, report_of
from gcfast.builder.embed import Embedded, EmbeddingStage, Totals
from gcfast.builder.rows import Rows, fill_from_second_pass, fill_from_spool
from gcfast.builder.spool import Spool, one_table
from gcfast.database import files, shards
from gcfast.database.database import Database
from gcfast.database.float16 import in_storage
from gcfast.database.manifest import MANIFEST, encoded, updating
from gcfast.database.shards import Shard, write_shard
from gcfast.errors import GcfastError, ModelMismatchError
from gcfast.explain.calibration import KEY
from gcfast.method.labels import column
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import difference
from gcfast.model.network import Network


def append(
    database: Database,
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
) -> Database:
    """A database with further rows; see :meth:`gcfast.Explainer.append`."""
    check_appendable(database, network, settings)
    added, ids, new = _made(database, network, loader, settings, progress=progress)
    if database.path is None:
        return database.extended(added, ids, without_calibration(database.manifest) | new)
    _write(database, database.path, added, ids, new)
    return Database.open(database.path)


def _made(
    database: Database,
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool,
) -> tuple[Shard, list[str], dict[str, Any]]:
    """(the new rows, their ids, what they change in the manifest).

    Besides the new ones, all embeddings are held once, one after another, as triplets are drawn
    from: in memory up to gcfast.builder.spool.SPOOL_MEMORY_BYTES, in a temporary file beyond.
    """
    manifest = database.manifest
    stored_labels = np.unique(
        np.concatenate([np.unique(shard.labels.numpy()) for shard in database.shards])
    )
    totals = Totals(
        first=manifest["report"]["images"],
        labels=column(settings.objective.real_labels, database.class_names, stored_labels.tolist()),
    )
    spool = Spool()
    try:
        EmbeddingStage(
            network,
            l2_normalize=settings.l2_normalize,
            keep_pooled=settings.method == "gradcam++",
            channels=settings.channels,
        ).run(loader, spool, totals, progress=progress, one_pass=isinstance(loader, Iterator))
        embedded = totals.embedded(spool)
    finally:
        spool.close()
    mean = torch.tensor(manifest["mean_activation"], dtype=torch.float64)
    table = one_table([*(shard.embeddings for shard in database.shards), embedded.embeddings])
    embedded = embedded._replace(embeddings=table[len(database) :])
    everyone = (table, torch.cat([*(s.labels for s in database.shards), embedded.labels]))
    device = network.device(torch.device("cpu"))
    rows = Rows(embedded, settings, device, everyone=everyone, mean=mean)
    if embedded.head is not None:
        fill_from_spool(rows, progress=progress)
    else:
        fill_from_second_pass(network, loader, rows, progress=progress)
    added, kept = rows.table.shard(embedded)
    # The rows' own: a view would keep the whole table for as long as they are kept.
    added = added._replace(embeddings=added.embeddings.clone())
    new = {
        "class_names": embedded.class_names,
        "report": _report(database, embedded, stored_labels, added, settings),
        # Stored rows have drawn their triplets without the newest ones.
        "older_rows": len(database),
    }
    if database.storage != "float32":
        first = len(database)
        added = in_storage(added, database.storage, database.weight_scale, mean, first=first)
    return added, [embedded.ids[number] for number in kept.tolist()], new


def without_calibration(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest once rows have come.

    Distances to the nearest row have become smaller, and an image's own triplets are drawn from
    more images, so that what was measured before says nothing certain of them.
    """
    return {key: value for key, value in manifest.items() if key != KEY}


def check_appendable(database: Database, network: Network, settings: Settings) -> None:
    """Refuse a database of another model or of other settings, or a compressed one.

    Raises:
        ModelMismatchError: the model has changed since.
        ValueError: other settings than the rows were made with.
        GcfastError: rows that are centres of others.
    """
    manifest = database.manifest
    if "compressed" in manifest:
        raise GcfastError(
            "a compressed database takes no further rows: append to the whole one, and compress it"
        )
    now = identity(network, settings, None, database.storage)
    other = difference(manifest["fingerprint"], now["fingerprint"])
    if other:
        raise ModelMismatchError(
            f"the database was built with another model than this one: {other}"
        )
    changed = changed_settings(manifest["settings"], now["settings"])
    if changed:
        raise ValueError(
            "the explainer must have the settings that the database was built with: "
            + "; ".join(changed)
        )


def _report(
    database: Database,
    embedded: Embedded,
    stored_labels: NDArray[Any],
    added: Shard,
    settings: Settings,
) -> dict[str, int]:
    """The counts of the database's build and of these rows together."""
    _, inverse, seen = np.unique(embedded.labels.numpy(), return_inverse=True, return_counts=True)
    before = np.isin(embedded.labels.numpy(), stored_labels)
    alone = torch.from_numpy((seen[inverse] == 1) & ~before)
    hardest = int((added.triplet_counts == 0).sum())
    report = report_of(embedded.labels, len(added.labels), hardest, settings, alone=alone)
    return {name: count + report.get(name, 0) for name, count in database.report.items()}


def _write(
    database: Database, folder: Path, added: Shard, ids: list[str], new: dict[str, Any]
) -> None:
    """New shards, then the manifest that names them: readers see the old rows or all of them."""
    try:
        with updating(folder, database.manifest["shards"]) as manifest:
            entries = list(manifest["shards"])
            number = 1 + max(int(e["file"].removeprefix("rows-").split(".")[0]) for e in entries)
            for start in range(0, len(ids), shards.SHARD_ROWS):
                where = slice(start, start + shards.SHARD_ROWS)
                rows = Shard(*(column[where] for column in added))
                entries.append(write_shard(folder, number, rows, ids[where]))
                number += 1
            changes = {**new, "shards": entries}
            files.replace(folder / MANIFEST, encoded(without_calibration(manifest) | changes))
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write the database {folder}: {error.strerror or error}"
        ) from error
