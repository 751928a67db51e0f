"""What describes a database folder: its manifest, and which folders are databases at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gcfast.database import files
from gcfast.errors import DamagedDatabaseError, GcfastError, NoDatabaseError

FORMAT = "gcfast-database"
# 2: embeddings and weights may be float16; a compressed database and a stored index are described.
# 3: the ids of a compressed database's members are packed.
# A database of an older format opens as it is.
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
INDEX = "index.faiss"  # as it is written; the manifest's name has a part of its checksum
MEMBERS = "members.safetensors"
STATE = "build.json"  # of an unfinished build
OWN_FILES = re.compile(
    r"manifest\.json(\.new)?|rows-\d{5,}\.safetensors|members\.safetensors"
    r"|index(-[0-9a-f]{16})?\.faiss(\.new)?|build\.json"
)
STORAGES = ("float32", "float16")
MANIFEST_KEYS: dict[str, type] = {
    "fingerprint": dict,
    "layer": str,
    "settings": dict,
    "class_names": list,
    "report": dict,
    "mean_activation": list,
    "shards": list,
}
FILE_KEYS: dict[str, type] = {"file": str, "bytes": int, "sha256": str}
# What a manifest says of each kind of file.
FILES: dict[str, dict[str, type]] = {
    "shards": {**FILE_KEYS, "rows": int},
    "members": FILE_KEYS,
    "index": {**FILE_KEYS, "rows": int, "factory": str},
}


def encoded(manifest: dict[str, Any]) -> bytes:
    """The manifest as its file holds it."""
    return json.dumps(manifest, indent=1).encode()


def partial_folder(target: Path) -> Path:
    """Where a database is built that will be at ``target``."""
    return target.with_name(f"{target.name}.partial")


def check_target(
    target: Path, overwrite: bool, *, name: str = "path", remedy: str = "overwrite=True"
) -> None:
    """Whether a database may be written at ``target``: only a database is ever replaced.

    Args:
        target: the folder to be.
        overwrite: whether a database that is there may go.
        name: what the caller calls the folder.
        remedy: what the caller's user has to say for ``overwrite``.

    Raises:
        FileExistsError: something is there and may not be replaced, or is not a gcfast database
            and nothing else.
        ValueError: a path that safetensors cannot open.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` must be a path in UTF-8, got {str(target)!r}") from None
    if not target.exists():
        return
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
        ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise FileExistsError(f"`{name}` must not exist, got {target}, not a gcfast database")
    if not overwrite:
        raise FileExistsError(
            f"`{name}` must not exist, got the database {target}; {remedy} replaces it"
        )
    strange = sorted(p.name for p in target.iterdir() if not OWN_FILES.fullmatch(p.name))
    if strange:
        raise FileExistsError(
            f"`{name}` must hold a gcfast database alone to be replaced, {target} also holds "
            f"{', '.join(strange[:3])}{' …' if len(strange) > 3 else ''}"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a database folder; raises as :meth:`gcfast.Database.open`."""
    if not folder.is_dir():
        partial = partial_folder(folder)
        unfinished = ""
        if partial.is_dir():
            unfinished = f"; an unfinished build is in {partial}, which resume=True goes on with"
        raise NoDatabaseError(f"there is no database at {folder}: it is not a folder{unfinished}")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        if manifest["format_version"] > FORMAT_VERSION:
            raise GcfastError(
                f"{folder} was written in format {manifest['format_version']}, this gcfast reads "
                f"up to {FORMAT_VERSION}: install a newer one"
            )
        for key, kind in MANIFEST_KEYS.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key!r} must be a {kind.__name__}, got {manifest[key]!r:.60}")
        if not manifest["shards"]:
            raise ValueError("it lists no shards")
        for shard in manifest["shards"]:
            _check_file("a shard", shard, FILES["shards"])
        for name, what in (("members", "the members file"), ("index", "the index")):
            if name in manifest:
                _check_file(what, manifest[name], FILES[name])
        scale = manifest.get("weight_scale", 1.0)
        if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise ValueError(f"'weight_scale' must be positive and finite, got {scale!r:.60}")
        if manifest.get("storage", STORAGES[0]) not in STORAGES:
            raise ValueError(
                f"'storage' must be {' or '.join(STORAGES)}, got {manifest['storage']!r:.60}"
            )
    except FileNotFoundError:
        raise NoDatabaseError(f"there is no database at {folder}: {MANIFEST} is missing") from None
    except KeyError as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: {error}") from error
    return manifest


@contextmanager
def updating(folder: Path, shards: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hold a database folder to add files to it and to replace its manifest.

    At the end, also of one that failed, what the manifest does not name is removed: the files of
    an update that failed or was killed, and what the new manifest has something else for.

    Args:
        folder: the database's.
        shards: the manifest's, of the rows that the update is for.

    Yields:
        The manifest as it is.

    Raises:
        GcfastError: the database has changed, or another process writes to it.
    """
    with files.locked(folder, "writing to"):
        manifest = read_manifest(folder)
        if manifest["shards"] != shards:
            raise GcfastError(changed(folder))
        before = named_files(manifest)
        try:
            yield manifest
        except BaseException:
            # A manifest whose renaming was not flushed may be the old one again after a crash.
            _remove_unnamed(folder, before)
            raise
        _remove_unnamed(folder, set())


def changed(folder: Path) -> str:
    """What is said to whoever has opened a database that was written to since."""
    return f"the database {folder} has changed since it was opened: open it again"


def named_files(manifest: dict[str, Any]) -> set[str]:
    """The names of a database's files."""
    entries = [*manifest["shards"], *(manifest[n] for n in ("members", "index") if n in manifest)]
    return {MANIFEST, *(entry["file"] for entry in entries)}


def _remove_unnamed(folder: Path, kept: set[str]) -> None:
    """Remove the files of a database that its manifest does not name, but for those kept."""
    with suppress(OSError, GcfastError):  # the database is whole with them, too
        # A build that was killed at its end is for the next build to clear away, by its state.
        kept = kept | {STATE} | named_files(read_manifest(folder))
        for file in folder.iterdir():
            if OWN_FILES.fullmatch(file.name) and file.name not in kept:
                file.unlink()


def _check_file(what: str, entry: Any, keys: dict[str, type]) -> None:
    """Raise KeyError, TypeError or ValueError where the words on a file are not as they must be."""
    if not isinstance(entry, dict):
        raise TypeError(f"{what} must be a dict, got {entry!r:.60}")
    for key, kind in keys.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"{what}'s {key!r} must be a {kind.__name__}")
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{what} must lie in the folder, got {entry['file']!r}")
