"""The database: for each training image its embedding and its few strongest grad-weights.

On disk it is a folder: ``manifest.json``, which describes everything, and shards of rows in
safetensors. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gcfast.errors import DamagedDatabaseError, GcfastError, NoDatabaseError

FORMAT = "gcfast-database"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_ROWS = 65_536
OWN_FILES = re.compile(r"manifest\.json|rows-\d{5,}\.safetensors|index\.faiss")
FIELDS = ("embeddings", "channels", "weights", "offsets", "labels", "triplet_counts")
MANIFEST_KEYS: dict[str, type] = {
    "fingerprint": dict,
    "layer": str,
    "settings": dict,
    "class_names": list,
    "report": dict,
    "mean_activation": list,
    "shards": list,
}
SHARD_KEYS: dict[str, type] = {"file": str, "rows": int, "bytes": int, "sha256": str}


class Database:
    """Rows in the order of the training images, as CPU tensors (memory-mapped once opened).

    Attributes:
        embeddings: [N, D] float32.
        channels: [N, M] int64, by falling weight.
        weights: [N, M] float32, raw (the scale of the paper's Eq. 6), of the signed gradient, so
            that larger is kept for either evidence.
        offsets: [N] float32: sum over m of w_m times channel m's mean activation over the training
            images and pixels.
        labels: [N] int64; with names where those were strings (see :meth:`label_name`). float64
            where it was built with an objective over real-valued labels.
        triplet_counts: [N] int64, valid pairs found for the row.
        ids: the images' names, N strings.
        manifest: what else is known, as JSON has it: settings, layer, fingerprint of the model,
            mean activation, counts of the build.
        path: the folder it was opened from or saved to last; None before that.
    """

    embeddings: Tensor
    channels: Tensor
    weights: Tensor
    offsets: Tensor
    labels: Tensor
    triplet_counts: Tensor

    def __init__(
        self,
        tensors: dict[str, Tensor],
        ids: list[str],
        manifest: dict[str, Any],
        path: Path | None = None,
    ) -> None:
        for field in FIELDS:
            setattr(self, field, tensors[field])
        self.ids = ids
        self.manifest = manifest
        self.path = path

    def __len__(self) -> int:
        return len(self.embeddings)

    def __repr__(self) -> str:
        rows, dim = self.embeddings.shape
        return f"Database({rows} rows, D={dim}, M={self.channels.shape[1]}, path={self.path})"

    @property
    def class_names(self) -> list[str]:
        """Names of the labels 0, 1, …; empty where labels were numbers."""
        return list(self.manifest["class_names"])

    @property
    def report(self) -> dict[str, int]:
        """Counts of the build: images, rows, and what was left out or fell back, and why."""
        return dict(self.manifest["report"])

    @property
    def mean_activation(self) -> Tensor:
        """Mean of each channel over the training images and pixels, [C] float32."""
        return torch.tensor(self.manifest["mean_activation"], dtype=torch.float32)

    def label_name(self, label: float) -> str:
        """The class name of a label; the number itself where labels have no names; "" for -1."""
        if self.labels.is_floating_point():
            return "" if math.isnan(label) else f"{label:.12g}"
        names = self.manifest["class_names"]
        if label < 0 and names:
            return ""
        return str(names[int(label)]) if names else str(label)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the database as a folder: whole or not at all.

        It is written under a temporary name beside ``path``, flushed to the disk and renamed.

        Args:
            path: the folder to make.
            overwrite: replace a gcfast database that is there.

        Raises:
            FileExistsError: ``path`` exists and is not to be, or must not be, replaced.
            OSError: the disk is full, or another failure to write; ``path`` is as it was.
        """
        target = Path(path).absolute()
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            os.chmod(folder, 0o777 & ~_umask())
            shards = []
            for number, start in enumerate(range(0, len(self), SHARD_ROWS)):
                shards.append(self._write_shard(folder, number, start))
            manifest = {**self.manifest, "shards": shards}
            _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            _sync_folder(folder)
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.rename(target, old / target.name)
                try:
                    os.rename(folder, target)
                except OSError:
                    os.rename(old / target.name, target)
                    old.rmdir()
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(folder, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write the database {target}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.manifest, self.path = manifest, target

    def _write_shard(self, folder: Path, number: int, start: int) -> dict[str, Any]:
        rows = slice(start, start + SHARD_ROWS)
        tensors = {name: getattr(self, name)[rows].contiguous() for name in FIELDS}
        # A file name that is not UTF-8 comes as surrogates and keeps its bytes.
        encoded = [i.encode(errors="surrogateescape") for i in self.ids[rows]]
        ends = np.cumsum([len(i) for i in encoded], dtype=np.int64)
        tensors["id_ends"] = torch.from_numpy(ends)
        tensors["id_bytes"] = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
        content = safetensors.torch.save(tensors)
        name = f"rows-{number:05d}.safetensors"
        _write(folder / name, content)
        return {
            "file": name,
            "rows": len(encoded),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Database:
        """Open a database folder; the rows are memory-mapped and read when they are needed.

        Args:
            path: the folder.
            verify: compare each shard with its checksum, which reads it once.

        Raises:
            NoDatabaseError: there is no database at ``path``.
            DamagedDatabaseError: the manifest or a shard is missing, truncated or not as written.
            GcfastError: written by a newer version.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        parts: list[dict[str, Tensor]] = []
        ids: list[str] = []
        for shard in manifest["shards"]:
            tensors = _read_shard(folder, shard, verify)
            content = tensors.pop("id_bytes").numpy().tobytes()
            ends = [0, *tensors.pop("id_ends").tolist()]
            ids += [content[a:b].decode(errors="surrogateescape") for a, b in pairwise(ends)]
            parts.append(tensors)
        if len(parts) == 1:
            joined = parts[0]  # stays memory-mapped
        else:
            joined = {name: torch.cat([part[name] for part in parts]) for name in FIELDS}
        return cls(joined, ids, manifest, folder.absolute())


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
    """
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
    """The manifest of a database folder; raises as :meth:`Database.open`."""
    if not folder.is_dir():
        raise NoDatabaseError(f"there is no database at {folder}: it is not a folder")
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
            for key, kind in SHARD_KEYS.items():
                if not isinstance(shard[key], kind):
                    raise TypeError(f"a shard's {key!r} must be a {kind.__name__}")
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"a shard must lie in the folder, got {shard['file']!r}")
    except FileNotFoundError:
        raise NoDatabaseError(f"there is no database at {folder}: {MANIFEST} is missing") from None
    except KeyError as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise DamagedDatabaseError(f"{folder / MANIFEST} is damaged: {error}") from error
    return manifest


def _read_shard(folder: Path, shard: dict[str, Any], verify: bool) -> dict[str, Tensor]:
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedDatabaseError(f"the shard {path} is missing") from None
    if size != shard["bytes"]:
        raise DamagedDatabaseError(
            f"the shard {path} is truncated or changed: {shard['bytes']} bytes were written, "
            f"it has {size}"
        )
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            raise DamagedDatabaseError(f"the shard {path} is changed: its checksum differs")
    try:
        tensors = safetensors.torch.load_file(path)
        lengths = {len(tensors[name]) for name in (*FIELDS, "id_ends")}
    except (safetensors.SafetensorError, KeyError) as error:
        raise DamagedDatabaseError(f"the shard {path} cannot be read: {error}") from error
    if lengths != {shard["rows"]}:
        raise DamagedDatabaseError(
            f"the shard {path} must hold {shard['rows']} rows, got {sorted(lengths)}"
        )
    return tensors


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
