"""The manifest of a database folder: what it says, and the names of the folder's files."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from gcfast.database.files import read_json
from gcfast.database.members import MembersFile
from gcfast.database.shards import ClassesFile, ShardFile
from gcfast.errors import DamagedDatabaseError, GcfastError, NoDatabaseError
from gcfast.method.settings import ELEMENTWISE, PROXY, Settings
from gcfast.model.fingerprint import check_stored

FORMAT = "gcfast-database"
# 2: embeddings and weights may be float16; a compressed database and a stored index are described.
# 3: the ids of a compressed database's members are packed.
# 4: rows may keep no channels, where a file of class sums has the weights (class proxies).
# 5: rows may have no scale of their own, and say so (embeddings without their norms).
# 6: rows that keep no channels may have a cotangent for weights.
# A database of an older format opens as it is.
FORMAT_VERSION = 6
MANIFEST = "manifest.json"
STATE = "build.json"  # of an unfinished build
CALIBRATION = "calibration"  # the manifest's entry for what gcfast.explain.calibration measured
# The manifest's entry that rows are known but for a positive factor each.
RELATIVE = "relative"
MADE_LABELS = "made_labels"  # its entry for what stands for labels that nobody gave
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
    "classes": FILE_KEYS,
    "index": {**FILE_KEYS, "rows": int, "factory": str},
}
BESIDE_SHARDS = {
    "members": "the members file",
    "classes": "the classes file",
    "index": "the index",
}


def encoded(manifest: dict[str, Any]) -> bytes:
    """Return the manifest as its file holds it."""
    return json.dumps(manifest, indent=1).encode()


def version_of(manifest: dict[str, Any]) -> str:
    """Return what tells a database from any other, and from itself after a change."""
    return hashlib.sha256(encoded(manifest)).hexdigest()[:12]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a database folder.

    Raises:
        NoDatabaseError, DamagedDatabaseError, GcfastError: as :meth:`gcfast.Database.open`.
    """
    if not folder.is_dir():
        raise NoDatabaseError(f"there is no database at {folder}: it is not a folder")
    try:
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict):
            raise TypeError(f"it must be an object, got {manifest!r:.60}")
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        version = manifest["format_version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(
                f"'format_version' must be a positive whole number, got {version!r:.60}"
            )
        if version > FORMAT_VERSION:
            raise GcfastError(
                f"{folder} was written in format {version}, this gcfast reads "
                f"up to {FORMAT_VERSION}: install a newer one"
            )
        for key, kind in MANIFEST_KEYS.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key!r} must be a {kind.__name__}, got {manifest[key]!r:.60}")
        if not manifest["shards"]:
            raise ValueError("it lists no shards")
        for shard in manifest["shards"]:
            _check_file("a shard", shard, FILES["shards"])
        for name, what in BESIDE_SHARDS.items():
            if name in manifest:
                _check_file(what, manifest[name], FILES[name])
        _check_values(manifest)
        if manifest["settings"].get("method") == PROXY and "classes" not in manifest:
            raise ValueError("it names no file of the classes")
        scale = manifest.get("weight_scale", 1.0)
        if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise ValueError(f"'weight_scale' must be positive and finite, got {scale!r:.60}")
        if manifest.get("storage", STORAGES[0]) not in STORAGES:
            raise ValueError(
                f"'storage' must be {' or '.join(STORAGES)}, got {manifest['storage']!r:.60}"
            )
    except FileNotFoundError:
        unfinished = ""
        if (folder / STATE).exists():
            unfinished = f"; an unfinished build is in {folder}, which resume=True continues"
        raise NoDatabaseError(
            f"there is no database at {folder}: {MANIFEST} is missing{unfinished}"
        ) from None
    except KeyError as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: it lacks {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: {error}") from error
    return manifest


def _check_values(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, ValueError or OverflowError where a value cannot be one."""
    Settings.described(manifest["settings"])
    check_stored(manifest["fingerprint"])
    for name, count in manifest["report"].items():
        if type(count) is not int:
            raise TypeError(f"the report's {name!r} must be a whole number, got {count!r:.60}")
    if manifest["report"]["images"] < 1:
        raise ValueError(f"the report's 'images' must be positive, got {manifest['report']!r:.60}")
    if not all(isinstance(name, str) for name in manifest["class_names"]):
        raise TypeError("'class_names' must be strings")
    if not manifest["mean_activation"]:
        raise ValueError("'mean_activation' must have a number for each channel, got none")
    for value in manifest["mean_activation"]:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"'mean_activation' must be numbers, got {value!r:.60}")
        if not math.isfinite(value):
            raise ValueError(f"'mean_activation' must be finite, got {value!r}")


class Opened(NamedTuple):
    """The files of a database folder."""

    manifest: dict[str, Any]
    shards: list[ShardFile]
    members: MembersFile | None
    classes: ClassesFile | None


def opened(path: Path) -> Opened:
    """Return the manifest and its files, all of one database, also while another replaces it.

    Raises:
        NoDatabaseError, DamagedDatabaseError, GcfastError: as :meth:`gcfast.Database.open`.
    """
    folder = path.absolute()  # the process may change its working directory
    manifest = read_manifest(path)
    while True:
        damage, members, classes = None, None, None
        try:
            C, names = len(manifest["mean_activation"]), len(manifest["class_names"])
            files = [ShardFile(folder, entry, C, names) for entry in manifest["shards"]]
            _check_widths(folder, files)
            _check_method(folder, manifest, files[0])
            if "members" in manifest:
                members = MembersFile(folder, manifest["members"])
                _check_count(folder, members, sum(len(f.ids.ends) for f in files))
            if "classes" in manifest:
                classes = ClassesFile(folder, manifest["classes"], manifest)
        except DamagedDatabaseError as error:
            damage = error
        now = read_manifest(path)
        if now == manifest:
            if damage is not None:
                raise damage
            return Opened(manifest, files, members, classes)
        manifest = now


def _check_widths(folder: Path, files: list[ShardFile]) -> None:
    """Raise DamagedDatabaseError where shards do not have the columns of one table."""
    found = {
        tuple(
            (t.shape[1:], t.dtype)
            for t in (f.tensors.embeddings, f.tensors.channels, f.tensors.labels)
        )
        for f in files
    }
    if len(found) != 1:
        raise DamagedDatabaseError(
            f"the shards of {folder} do not belong together: their rows have other shapes or dtypes"
        )


def _check_method(folder: Path, manifest: dict[str, Any], file: ShardFile) -> None:
    """Raise DamagedDatabaseError where rows are not of the manifest's method, or its labels."""
    method, rows = manifest["settings"].get("method"), file.tensors
    D, M, width = (t.shape[1] for t in (rows.embeddings, rows.channels, rows.weights))
    wanted = {PROXY: (0, 0), ELEMENTWISE: (0, D)}.get(method, (max(M, 1), max(M, 1)))
    if (M, width) != wanted:
        raise DamagedDatabaseError(
            f"the shards of {folder} are not of method={method!r}: their rows have {M} channels "
            f"and {width} weights"
        )
    if rows.labels.is_floating_point() and (manifest["class_names"] or method == PROXY):
        raise DamagedDatabaseError(
            f"the shards of {folder} have real numbers for labels, and classes in the manifest"
        )


def _check_count(folder: Path, members: MembersFile, rows: int) -> None:
    """Raise DamagedDatabaseError where there are not members for each row."""
    if (centers := len(members.members.ends)) != rows:
        raise DamagedDatabaseError(
            f"the members file of {folder} must be of its {rows} rows, got members of {centers}"
        )


def require_same_rows(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the present manifest of a folder whose database was opened with this one.

    Raises:
        GcfastError: it has other rows now.
        NoDatabaseError, DamagedDatabaseError: as :func:`read_manifest`.
    """
    now = read_manifest(folder)
    # The same rows may be in files of other names: a database can be saved over itself.
    one, two = ([shard["sha256"] for shard in m["shards"]] for m in (manifest, now))
    if one != two:
        raise GcfastError(f"the database {folder} has changed since it was opened: open it again")
    return now


def named_files(manifest: dict[str, Any]) -> set[str]:
    """Return the names of a database's files."""
    entries = [*manifest["shards"], *(manifest[n] for n in BESIDE_SHARDS if n in manifest)]
    return {MANIFEST, *(entry["file"] for entry in entries)}


def _check_file(what: str, entry: Any, keys: dict[str, type]) -> None:
    """Raise KeyError, TypeError or ValueError where a file's entry lacks something."""
    if not isinstance(entry, dict):
        raise TypeError(f"{what} must be a dict, got {entry!r:.60}")
    for key, kind in keys.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"{what}'s {key!r} must be a {kind.__name__}")
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{what} must lie in the folder, got {entry['file']!r}")
