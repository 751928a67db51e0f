"""From picture files to batches: find them and label them."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from gcfast._checks import listed
from gcfast.images.decode import HEIF_ENDINGS, ending_of, image_extensions, is_picture
from gcfast.images.loader import ImageDataset, ImageLoader, UnreadableImageError, decoded, stacked
from gcfast.images.preprocessing import Preprocessing

__all__ = [
    "Found",
    "ImageDataset",
    "ImageFolder",
    "ImageLoader",
    "Preprocessing",
    "UnreadableImageError",
    "decoded",
    "find_images",
    "scan",
    "stacked",
]


class Found(NamedTuple):
    """The pictures in a folder, and what was not taken.

    Attributes:
        files: paths relative to the folder with ``/`` between the parts, sorted by code point.
        passed_over: how many files of each ending (lower case, with the dot, "" without one) are
            no pictures that can be read here.
        by_content: how many of ``files`` were recognised by their content, by ending.
    """

    files: list[str]
    passed_over: Counter[str]
    by_content: Counter[str]


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Find the pictures in a folder and its subfolders; see :func:`scan`.

    Returns:
        Paths relative to the folder with ``/`` between the parts, sorted by code point.

    Raises:
        OSError: the folder, or one below it, cannot be listed.
    """
    return scan(folder).files


def scan(folder: str | os.PathLike[str]) -> Found:
    """Find the pictures in a folder and its subfolders, and count the other files.

    A file is a picture by its ending, or by its content if the ending is not one of a picture's.
    Hidden files and folders are left out; links to folders are followed, each folder once.

    Raises:
        OSError: the folder, or one below it, cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    found = Found([], Counter(), Counter())
    for here, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            path, ending = Path(here, name), ending_of(name)
            if not is_picture(path):
                found.passed_over[ending] += 1
                continue
            found.files.append(path.relative_to(folder).as_posix())
            if ending not in image_extensions():
                found.by_content[ending] += 1
    found.files.sort()
    return found


def in_words(passed_over: Counter[str]) -> str:
    """Return ".heic 12, .txt 3, without an ending 1", and how HEIC could be read if it is there."""
    counts = ", ".join(f"{e or 'without an ending'} {n}" for e, n in passed_over.most_common())
    if set(passed_over) & (set(HEIF_ENDINGS) - set(image_extensions())):
        counts += "; pip install 'gcfast[images]' to read HEIC"
    return counts


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
        empty_classes: names of class folders without pictures, sorted.
        passed_over: files that are no pictures, counted by ending; see :class:`Found`.
        by_content: pictures recognised by their content, counted by ending.

    Raises:
        FileNotFoundError: ``root`` or ``labels_csv`` does not exist, or the CSV names missing
            files.
        NotADirectoryError: ``root`` is not a folder.
        ValueError: there are no pictures, pictures are next to the class folders, a name is not
            UTF-8, or the CSV lacks a column or a label, or names a picture twice.
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
        self.empty_classes: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self.by_content: Counter[str] = Counter()
        pairs = self._by_folder() if labels_csv is None else _by_csv(self.root, labels_csv)
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

    def _by_folder(self) -> list[tuple[str, str]]:
        root = self.root
        names, self.passed_over, self.by_content = scan(root)
        if not names:
            got = f": {in_words(self.passed_over)}" if self.passed_over else ""
            raise ValueError(
                f"`root` must hold pictures in a folder for each class, {root} has none{got}"
            )
        loose = [name for name in names if "/" not in name]
        if loose:
            raise ValueError(
                f"`root` must hold a folder for each class, {root} has pictures next to them: "
                f"{listed(loose)}; move them, or give their labels in a CSV"
            )
        with os.scandir(root) as entries:
            classes = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
        pairs = [(name, name.partition("/")[0]) for name in names]
        self.empty_classes = sorted(classes - {label for _, label in pairs})
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
