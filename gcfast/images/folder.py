"""From picture files to batches: find them, label them, decode them in worker processes."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gcfast._checks import listed
from gcfast.errors import GcfastError
from gcfast.images.preprocessing import Preprocessing, image_extensions

__all__ = [
    "ImageDataset",
    "ImageFolder",
    "ImageLoader",
    "Preprocessing",
    "UnreadableImageError",
    "find_images",
]

_Item = tuple[NDArray[np.uint8] | None, str]  # a view, or the reason why there is none
_T = TypeVar("_T")
_U = TypeVar("_U")


class UnreadableImageError(GcfastError):
    """A picture could not be decoded and none may be skipped, or no picture could be decoded."""


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Find the pictures in a folder and its subfolders by their file extensions.

    Hidden files and folders are left out; links to folders are followed, each folder once.

    Returns:
        Paths relative to the folder with ``/`` between the parts, sorted by code point.

    Raises:
        OSError: the folder, or one below it, cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    found = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions():
                found.append(Path(here, name).relative_to(folder).as_posix())
    return sorted(found)


class ImageDataset(Dataset[_Item]):
    """Views of picture files, map-style and picklable.

    Item ``i`` is ``(view, "")`` with a uint8 [S, S, 3] view, or ``(None, reason)`` if the file
    cannot be decoded, so that one bad file does not end a worker.

    Args:
        files: picture files.
        preprocessing: gives the size and the crop.
    """

    def __init__(self, files: Sequence[str], preprocessing: Preprocessing) -> None:
        self.files = list(files)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Item:
        try:
            return self.preprocessing.view(self.files[index]), ""
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's decoders raise anything on damaged files: OSError, SyntaxError, struct.error,
            # IndexError, zlib.error. The kind is kept with the text.
            text = str(error).replace(f" {self.files[index]!r}", "").strip()
            return None, f"{type(error).__name__}: {text or 'no reason given'}"


def decoded(
    dataset: Dataset[tuple[_T | None, str]],
    collate: Callable[[list[_T]], _U],
    skip: Callable[[int, str], None],
    *,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[_U, list[int]]]:
    """Iterate over a data set in order, in worker processes, without touching global random state.

    Args:
        dataset: map-style and picklable; each item is (value, "") or (None, reason).
        collate: makes a batch of a list of values, in the worker.
        skip: called with the number and the reason of each item without a value.
        batch_size: items in a batch.
        workers: worker processes; 0 decodes in this process.

    Yields:
        A batch and the numbers of its items; batches without any are left out.

    Raises:
        GcfastError: a worker process is killed.
    """
    batches = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, collate),
        generator=torch.Generator(),  # its own, or each pass would draw from the global one
    )
    start = 0
    try:
        for batch, reasons in batches:
            kept = []
            for number, reason in enumerate(reasons, start):
                if reason:
                    skip(number, reason)
                else:
                    kept.append(number)
            start += len(reasons)
            if kept:
                yield batch, kept
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise GcfastError(
            "a process that decodes pictures was killed, most likely for lack of memory: use "
            "fewer `workers` (0 decodes in this process) or a smaller `batch_size`"
        ) from error


def _collate(
    collate: Callable[[list[_T]], _U], items: list[tuple[_T | None, str]]
) -> tuple[_U | None, list[str]]:
    """Collate the values, and give every item's reason, "" if it has a value."""
    values = [value for value, _ in items if value is not None]
    return collate(values) if values else None, [reason for _, reason in items]


def stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """Return arrays [...] as one tensor [B, ...], which workers share without a copy."""
    return torch.from_numpy(np.stack(arrays))


class ImageLoader:
    """Batches (images, labels, ids) of picture files, the same in every pass, in the given order.

    Worker processes decode and resize; 8-bit views cross the process boundary and are normalized
    here, a quarter of the traffic. PyTorch's global random state is left alone.

    Args:
        files: picture files.
        ids: a name for each; what reports call it.
        labels: a label for each, or None for pictures without labels (then labels are "").
        preprocessing: size, crop and normalization.
        batch_size: pictures in a batch; fewer where some of them are unreadable.
        workers: worker processes; 0 decodes in this process.
        strict: raise on the first unreadable picture instead of skipping it.

    Attributes:
        unreadable: (id, reason) of the pictures skipped so far, in order.

    Raises:
        ValueError: there are no files, lengths differ, or ``batch_size`` or ``workers`` is out of
            range.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        ids: Sequence[str],
        labels: Sequence[str] | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 32,
        workers: int = 0,
        strict: bool = False,
    ) -> None:
        if not files:
            raise ValueError("`files` must name at least one picture, got none")
        for name, given in (("ids", ids), ("labels", labels)):
            if given is not None and len(given) != len(files):
                raise ValueError(f"`{name}` must have length {len(files)}, got {len(given)}")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"`workers` must be at least 0, got {workers}")
        self.preprocessing = preprocessing or Preprocessing()
        self.files = [os.fspath(file) for file in files]
        self.ids = list(ids)
        self.labels = [""] * len(files) if labels is None else list(labels)
        self.batch_size = batch_size
        self.workers = workers
        self.strict = strict
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        """The most batches that a pass has: one of unreadable pictures only is left out."""
        return math.ceil(len(self.files) / self.batch_size)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(id, reason) of the pictures skipped so far, in order."""
        return [(self.ids[i], self._reasons[i]) for i in sorted(self._reasons)]

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], list[str]]]:
        """Make one pass: images float32 [B, 3, S, S], B labels, B ids.

        Raises:
            UnreadableImageError: a picture cannot be read and ``strict`` is set, or none can.
            GcfastError: a worker process is killed.
        """

        def skip(i: int, reason: str) -> None:
            self._reasons[i] = reason
            if self.strict:
                raise UnreadableImageError(f"cannot read {self.files[i]}: {reason}")

        dataset = ImageDataset(self.files, self.preprocessing)
        found = False
        for views, kept in decoded(
            dataset, stacked, skip, batch_size=self.batch_size, workers=self.workers
        ):
            found = True
            labels, ids = [self.labels[i] for i in kept], [self.ids[i] for i in kept]
            yield self.preprocessing.normalize(views), labels, ids
        if not found:
            raise UnreadableImageError(
                f"none of the {len(self.files)} pictures can be read; the first is "
                f"{self.files[0]}: {self._reasons[0]}"
            )


class ImageFolder:
    """Labelled pictures under one root: a folder for each class, or a CSV of paths and labels.

    Without ``labels_csv`` the class of a picture is the name of the folder directly under ``root``
    that it is in, at any depth. With it, the columns ``path`` (relative to ``root``, or absolute)
    and ``label`` decide, in the order of the file; other columns are ignored.

    Args:
        root: the folder.
        labels_csv: a CSV file in UTF-8 with a header.

    Attributes:
        root: the folder, absolute.
        ids: path of each picture relative to ``root``, with ``/`` between the parts.
        labels: class name of each.
        class_names: the distinct class names, sorted.

    Raises:
        FileNotFoundError: ``root`` or ``labels_csv`` does not exist, or the CSV names missing
            files.
        NotADirectoryError: ``root`` is not a folder.
        ValueError: there are no pictures, a class folder has none, pictures are next to the class
            folders, a name is not UTF-8, or the CSV lacks a column or a label, or names a picture
            twice.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        labels_csv: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root).absolute()
        if not self.root.exists():
            raise FileNotFoundError(f"`root` must be a folder of pictures, {root} does not exist")
        if not self.root.is_dir():
            raise NotADirectoryError(f"`root` must be a folder of pictures, {root} is a file")
        pairs = _by_folder(self.root) if labels_csv is None else _by_csv(self.root, labels_csv)
        self.ids = [name for name, _ in pairs]
        # A database keeps ids as UTF-8: fail now, not when it is saved.
        odd = [repr(os.fsencode(name)) for name in self.ids if not _is_utf8(name)]
        if odd:
            raise ValueError(f"file names under {self.root} must be UTF-8, got {listed(odd)}")
        self.labels = [label for _, label in pairs]
        self.class_names = sorted(set(self.labels))

    def __len__(self) -> int:
        return len(self.ids)

    def loader(
        self,
        preprocessing: Preprocessing | None = None,
        *,
        batch_size: int = 32,
        workers: int = 0,
        strict: bool = False,
    ) -> ImageLoader:
        """Return batches of all pictures, for ``Explainer.build``; see :class:`ImageLoader`."""
        return ImageLoader(
            [os.fspath(self.root / name) for name in self.ids],
            self.ids,
            self.labels,
            preprocessing=preprocessing,
            batch_size=batch_size,
            workers=workers,
            strict=strict,
        )


def _by_folder(root: Path) -> list[tuple[str, str]]:
    names = find_images(root)
    if not names:
        raise ValueError(f"`root` must hold pictures in a folder for each class, {root} has none")
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"`root` must hold a folder for each class, {root} has pictures next to them: "
            f"{listed(loose)}; move them, or give their labels in a CSV"
        )
    with os.scandir(root) as entries:
        classes = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
    pairs = [(name, name.partition("/")[0]) for name in names]
    empty = sorted(classes - {label for _, label in pairs})
    if empty:
        raise ValueError(f"every class folder must hold pictures, none in {listed(empty)}")
    return pairs


def _by_csv(root: Path, labels_csv: str | os.PathLike[str]) -> list[tuple[str, str]]:
    where = os.fspath(labels_csv)
    pairs: dict[str, str] = {}
    missing = []
    with open(where, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        lacking = [name for name in ("path", "label") if name not in columns]
        if lacking:
            raise ValueError(
                f"`labels_csv` must have the columns path and label, {where} has "
                f"{', '.join(columns) or 'no header'}"
            )
        for row in reader:
            path, label = row["path"], row["label"]
            if not path or not label:
                raise ValueError(
                    f"`labels_csv` must give a path and a label in every line, "
                    f"line {reader.line_num} of {where} lacks one"
                )
            file_path = Path(os.path.normpath(root / path))
            inside = file_path.is_relative_to(root)
            name = file_path.relative_to(root).as_posix() if inside else file_path.as_posix()
            if name in pairs:
                raise ValueError(
                    f"`labels_csv` must name each picture once, {name} comes again in "
                    f"line {reader.line_num} of {where}"
                )
            if not file_path.is_file():
                missing.append(path)
            pairs[name] = label
    if missing:
        raise FileNotFoundError(
            f"`labels_csv` must name files under {root}, {len(missing)} of {len(pairs)} are "
            f"missing: {listed(missing)}"
        )
    if not pairs:
        raise ValueError(f"`labels_csv` must name at least one picture, {where} has none")
    return list(pairs.items())


def _is_utf8(name: str) -> bool:
    """Return whether a name from the file system is text, not undecodable bytes (surrogates)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
