"""From picture files to batches: find them, label them, decode them in worker processes."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
_Batch = tuple[Tensor, list[str]]  # the readable views, and every item's reason, "" if readable
_T = TypeVar("_T")

# How many names an error message lists before it counts the rest.
_NAMES_SHOWN = 5


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
    dataset: Dataset[Any], collate: Callable[[list[Any]], _T], batch_size: int, workers: int
) -> Iterator[_T]:
    """Iterate over a data set in order, in worker processes, without touching global random state.

    Args:
        dataset: map-style and picklable.
        collate: makes a batch of a list of its items, in the worker.
        batch_size: items in a batch.
        workers: worker processes; 0 decodes in this process.

    Raises:
        GcfastError: a worker process is killed.
    """
    batches = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # its own, or each pass would draw from the global one
    )
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise GcfastError(
            "a process that decodes pictures was killed, most likely for lack of memory: use "
            "fewer `workers` (0 decodes in this process) or a smaller `batch_size`"
        ) from error


def _collate(items: list[_Item]) -> _Batch:
    """The readable views, uint8 [B', S, S, 3], and for every item its reason, "" where readable."""
    views = [view for view, _ in items if view is not None]
    stacked = np.stack(views) if views else np.empty((0, 0, 0, 3), np.uint8)
    return torch.from_numpy(stacked), [reason for _, reason in items]


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
        dataset = ImageDataset(self.files, self.preprocessing)
        start = good = 0
        for views, reasons in decoded(dataset, _collate, self.batch_size, self.workers):
            kept = []
            for i, reason in enumerate(reasons, start=start):
                if not reason:
                    kept.append(i)
                    continue
                self._reasons[i] = reason
                if self.strict:
                    raise UnreadableImageError(f"cannot read {self.files[i]}: {reason}")
            start += len(reasons)
            good += len(kept)
            if kept:
                labels, ids = [self.labels[i] for i in kept], [self.ids[i] for i in kept]
                yield self.preprocessing.normalize(views), labels, ids
        if not good:
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
            raise ValueError(f"file names under {self.root} must be UTF-8, got {_listed(odd)}")
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
            f"{_listed(loose)}; move them, or give their labels in a CSV"
        )
    with os.scandir(root) as entries:
        classes = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
    pairs = [(name, name.partition("/")[0]) for name in names]
    empty = sorted(classes - {label for _, label in pairs})
    if empty:
        raise ValueError(f"every class folder must hold pictures, none in {_listed(empty)}")
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
            f"missing: {_listed(missing)}"
        )
    if not pairs:
        raise ValueError(f"`labels_csv` must name at least one picture, {where} has none")
    return list(pairs.items())


def _is_utf8(name: str) -> bool:
    """Whether a name from the file system is text, not bytes in disguise (surrogates)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    shown = list(names)
    more = len(shown) - _NAMES_SHOWN
    text = ", ".join(shown[:_NAMES_SHOWN])
    return f"{text} and {more} more" if more > 0 else text
