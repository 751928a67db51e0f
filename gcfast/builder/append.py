"""Further rows for a database: their triplets from the stored and the new embeddings together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast.builder.describe import changed_draws, changed_settings, identity, report_of, zero_rows
from gcfast.builder.embed import Totals, embed
from gcfast.builder.rows import Made, Rows
from gcfast.builder.spool import one_table
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.float16 import in_storage
from gcfast.database.ids import repeated
from gcfast.database.manifest import CALIBRATION, require_same_rows
from gcfast.database.write import (
    CLASSES,
    commit,
    disk_errors,
    next_number,
    write_shard,
    write_tensors,
    writing,
)
from gcfast.errors import GcfastError
from gcfast.method.labels import column
from gcfast.method.proxies import Classes
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import check_model
from gcfast.model.network import Network


def append(
    database: Database,
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
) -> Database:
    """Return a database with further rows; see :meth:`gcfast.Explainer.append`.

    A folder is locked from the beginning, and its rows are written as they are made.
    """
    check_appendable(database, network, settings)
    changed = changed_draws(database.manifest, settings)
    if changed:
        raise ValueError(f"{changed}: call rebuild, which makes all rows again")
    folder = database.path
    if folder is None:
        further = _Further(database, network, loader, settings, progress)
        parts = list(further.made(None))
        manifest = further.manifest(database.manifest)
        rows = parts[0].rows
        # Their own: a view would keep the table of all embeddings.
        rows = rows._replace(embeddings=rows.embeddings.clone())
        return database.extended(rows, parts[0].ids, manifest, further.classes)
    with writing(folder, lambda: require_same_rows(folder, database.manifest)) as stored:
        further = _Further(database, network, loader, settings, progress)
        entries, first = [], next_number(folder)
        for number, made in enumerate(further.made(shards.SHARD_ROWS), first):
            with disk_errors(folder):
                entries.append(write_shard(folder, number, made.rows, made.ids))
        manifest = further.manifest(stored) | {"shards": [*stored["shards"], *entries]}
        with disk_errors(folder):
            if further.classes is not None:
                columns = further.classes._asdict()
                manifest["classes"] = write_tensors(folder, CLASSES, columns)
            commit(folder, manifest)
    return Database.open(folder)


class _Further:
    """The rows of further images, after stage 1.

    In addition to the new ones, all embeddings are held once, one after another, as triplets are
    drawn from: in memory up to gcfast.builder.spool.SPOOL_MEMORY_BYTES, in a temporary file beyond.
    """

    def __init__(
        self,
        database: Database,
        network: Network,
        loader: Iterable[Any],
        settings: Settings,
        progress: bool,
    ) -> None:
        self.database, self.network, self.loader = database, network, loader
        self.settings, self.progress = settings, progress
        labels = [np.unique(shard.labels.numpy()) for shard in database.shards]
        self.stored_labels = np.unique(np.concatenate(labels))
        known = column(
            settings.objective.real_labels, database.class_names, self.stored_labels.tolist()
        )
        totals = Totals(first=database.report["images"], labels=known)
        embedded = embed(network, loader, settings, progress=progress, totals=totals)
        twice = repeated(database.ids, embedded.ids)
        if twice is not None and twice[2] >= len(database):
            raise ValueError(
                f"`ids` must be new to the database, got {twice[0]!r}, which row {twice[1]} has: "
                "give the image another id, or remove that row first (Database.remove)"
            )
        self.rows = self.hardest = self.estimated = self.zero = 0
        self.embedded = embedded._replace(
            mean_activation=torch.tensor(database.manifest["mean_activation"], dtype=torch.float64)
        )
        self.everyone: tuple[Tensor, Tensor] | None = None
        self.classes: Classes | None = None
        new = embedded.classes()
        if new is not None:
            assert database.classes is not None  # its settings are the explainer's
            self.classes = database.classes.plus(new)
            self.zero = len(embedded.ids) - int(new.counts.sum())
        else:
            stored = database.shards
            table = one_table([*(shard.embeddings for shard in stored), embedded.embeddings])
            self.everyone = (table, torch.cat([*(s.labels for s in stored), embedded.labels]))
            self.embedded = self.embedded._replace(embeddings=table[len(database) :])

    def made(self, capacity: int | None) -> Iterator[Made]:
        """Make the rows, in the database's storage; ``capacity`` as for :meth:`Rows.made`."""
        database = self.database
        rows = Rows(self.network, self.embedded, self.settings, everyone=self.everyone)
        for part in rows.made(self.loader, capacity=capacity, progress=self.progress):
            stored = in_storage(
                part.rows,
                database.storage,
                database.weight_scale,
                self.embedded.mean_activation,
                first=len(database) + self.rows,
            )
            self.rows += len(part.ids)
            self.hardest += int((part.rows.triplet_counts == 0).sum())
            self.estimated += part.estimated
            self.zero += zero_rows(stored.weights)
            yield part._replace(rows=stored)

    def manifest(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Return the database's manifest once all rows are made; raises ValueError without any.

        A calibration is left out: distances to the nearest row have become smaller, and an image's
        own triplets are drawn from more images, so what was measured before no longer holds.
        """
        labels = self.embedded.labels
        _, inverse, seen = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
        before = np.isin(labels.numpy(), self.stored_labels)
        alone = torch.from_numpy((seen[inverse] == 1) & ~before)
        report = report_of(
            labels,
            self.rows,
            self.hardest,
            self.estimated,
            self.zero,
            self.settings,
            alone=alone,
        )
        before_this = dict.fromkeys(report, 0) | self.database.report
        if "zero_rows" not in self.database.report:  # built before these were counted
            stored_zero = sum(zero_rows(shard.weights) for shard in self.database.shards)
            before_this["zero_rows"] = stored_zero
        manifest = {key: value for key, value in stored.items() if key != CALIBRATION} | {
            "class_names": self.embedded.class_names,
            "report": {name: count + report.get(name, 0) for name, count in before_this.items()},
        }
        if self.classes is None:
            # Stored rows have drawn their triplets without the newest ones.
            manifest["older_rows"] = len(self.database)
        return manifest


def check_appendable(database: Database, network: Network, settings: Settings) -> None:
    """Refuse a database of another model or of other settings, or a compressed one.

    Raises:
        ModelMismatchError: the model has changed since.
        ValueError: other settings than the rows were made with.
        GcfastError: rows that are centers of others.
    """
    manifest = database.manifest
    if "compressed" in manifest:
        raise GcfastError(
            "a compressed database takes no further rows: append to the whole one, and compress it"
        )
    database.require_labels("adding or replacing rows")
    now = identity(network, settings, None, database.storage)
    check_model(manifest["fingerprint"], network)
    changed = changed_settings(manifest["settings"], now["settings"])
    if changed:
        raise ValueError(
            "the explainer must have the settings that the database was built with: "
            + "; ".join(changed)
        )
