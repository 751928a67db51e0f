"""Opening a database folder while others may write to it or replace it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gcfast.database.manifest import read_manifest
from gcfast.database.members import MembersFile
from gcfast.database.shards import ShardFile
from gcfast.errors import DamagedDatabaseError


def opened(path: Path) -> tuple[dict[str, Any], list[ShardFile], MembersFile | None]:
    """Return the manifest and its files, all of one database, also while another replaces it.

    Raises:
        NoDatabaseError, DamagedDatabaseError, GcfastError: as :meth:`gcfast.Database.open`.
    """
    folder = path.absolute()  # the process may change its working directory
    manifest = read_manifest(path)
    while True:
        damage, members = None, None
        try:
            files = [ShardFile(folder, entry) for entry in manifest["shards"]]
            if "members" in manifest:
                members = MembersFile(folder, manifest["members"])
        except DamagedDatabaseError as error:
            damage = error
        now = read_manifest(path)
        if now == manifest:
            if damage is not None:
                raise damage
            return manifest, files, members
        manifest = now
