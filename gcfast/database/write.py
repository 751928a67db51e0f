"""Writing a database as a folder, in its own storage or in another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gcfast._checks import require_choice
from gcfast.database import files, shards
from gcfast.database.float16 import in_storage, scale_for
from gcfast.database.manifest import FORMAT_VERSION, MANIFEST, STORAGES, encoded
from gcfast.database.partial import tidy
from gcfast.database.shards import Shard, write_shard

if TYPE_CHECKING:
    from gcfast.database.database import Database


class Conversion:
    """A database's rows in a storage.

    Raises:
        ValueError: an unknown storage.
    """

    def __init__(self, database: Database, storage: str) -> None:
        require_choice("storage", storage, STORAGES)
        self.database = database
        self.storage = storage
        self.changes = storage != database.storage
        self.scale = database.weight_scale
        if self.changes:
            first = database.rows(0, shards.SHARD_ROWS).weights.float() / database.weight_scale
            self.scale = scale_for(first, storage)
        self._mean = torch.tensor(database.manifest["mean_activation"], dtype=torch.float64)

    def manifest(self) -> dict[str, Any]:
        """The database's manifest, without a stored index."""
        kept = {key: value for key, value in self.database.manifest.items() if key != "index"}
        if self.changes:
            kept |= {"storage": self.storage, "weight_scale": self.scale}
        return kept

    def rows(self, start: int, stop: int) -> Shard:
        """Consecutive rows; raises ValueError for one that the storage cannot hold."""
        rows = self.database.rows(start, stop)
        if not self.changes:
            return rows
        factor = self.scale / self.database.weight_scale
        return in_storage(rows, self.storage, factor, self._mean, first=start)


def write_database(conversion: Conversion, target: Path) -> dict[str, Any]:
    """Write a database at ``target``, where nothing is that must stay; returns its manifest.

    Raises:
        ValueError: a row that the storage cannot hold.
        OSError: the disk is full, or another failure to write; ``target`` is as it was.
    """
    database, manifest = conversion.database, conversion.manifest()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)  # or nothing would tell any more what a killed build left beside it
        with files.beside(target) as folder:
            entries = []
            for number, start in enumerate(range(0, len(database), shards.SHARD_ROWS)):
                stop = start + shards.SHARD_ROWS
                rows = conversion.rows(start, stop)
                entries.append(write_shard(folder, number, rows, database.ids[start:stop]))
            # It may have been opened in an older format.
            manifest |= {"shards": entries, "format_version": FORMAT_VERSION}
            if database.members is not None:
                database.members_of(0)  # compares its checksum
                manifest["members"] = database.members.write(folder)
            files.write(folder / MANIFEST, encoded(manifest))
            files.move_into_place(folder, target)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write the database {target}: {error.strerror or error}"
        ) from error
    return manifest
