"""Batches of picture files, decoded in worker processes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gcfast.errors import GcfastError
from gcfast.images.preprocessing import Preprocessing, Source

_Item = tuple[NDArray[Any] | None, str]  # a view, or the reason why there is none
_T = TypeVar("_T")
_U = TypeVar("_U")


class UnreadableImageError(GcfastError):
    """A picture could not be decoded and none may be skipped, or no picture could be decoded."""


class ImageDataset(Dataset[_Item]):
    """Views of picture files, map-style and picklable.

    Item ``i`` is ``(view, doubts)`` with a uint8 [H, W, 3] view and what was assumed about the
    file ("" as a rule), or ``(None, reason)`` if the file cannot be decoded, so that one bad file
    does not end a worker.

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
        return tried(self.preprocessing, self.files[index])


def tried(preprocessing: Preprocessing, source: Source) -> _Item:
    """Read a picture: (what goes to the network, doubts) or (None, why it cannot be read)."""
    try:
        view = preprocessing.load(source)
        return view.values, "; ".join(view.doubts)
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise anything on damaged files: OSError, SyntaxError, struct.error,
        # IndexError, zlib.error. The kind is kept with the text.
        text = str(error)
        if isinstance(source, str):
            text = text.replace(f" {source!r}", "")
        return None, f"{type(error).__name__}: {text.strip() or 'no reason given'}"


def decoded(
    dataset: Dataset[tuple[_T | None, str]],
    collate: Callable[[list[_T]], _U],
    skip: Callable[[int, str], None],
    doubt: Callable[[int, str], None] | None = None,
    *,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[_U, list[int]]]:
    """Iterate over a data set in order, in worker processes, without touching global random state.

    Args:
        dataset: map-style and picklable; each item is (value, "") or (None, reason), or (value,
            text) with what is doubtful about it.
        collate: makes a batch of a list of values, in the worker.
        skip: called with the number and the reason of each item without a value.
        doubt: called with the number and the text of each item that has both.
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
        for batch, texts in batches:
            kept = []
            for number, (there, text) in enumerate(texts, start):
                if not there:
                    skip(number, text)
                    continue
                kept.append(number)
                if text and doubt is not None:
                    doubt(number, text)
            start += len(texts)
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
) -> tuple[_U | None, list[tuple[bool, str]]]:
    """Collate the values, and say of each item whether it has one, with its text."""
    values = [value for value, _ in items if value is not None]
    return collate(values) if values else None, [(v is not None, text) for v, text in items]


def stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """Return arrays [...] as one tensor [B, ...], which workers share without a copy.

    Raises:
        ValueError: they differ in shape.
    """
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            "`transform` must give all pictures one size, got "
            + " and ".join(str(list(shape)) for shape in shapes[:2])
        )
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
        doubts: how many pictures so far were read with which assumption, most frequent first.

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
        self._doubts: dict[int, str] = {}

    def __len__(self) -> int:
        """The most batches that a pass has: one of unreadable pictures only is left out."""
        return math.ceil(len(self.files) / self.batch_size)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(id, reason) of the pictures skipped so far, in order."""
        return [(self.ids[i], self._reasons[i]) for i in sorted(self._reasons)]

    @property
    def doubts(self) -> list[tuple[str, int]]:
        """(assumption, how many pictures) so far, most frequent first."""
        return Counter(self._doubts.values()).most_common()

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], list[str]]]:
        """Make one pass: images float32 [B, 3, H, W], B labels, B ids.

        Raises:
            UnreadableImageError: a picture cannot be read and ``strict`` is set, or none can.
            GcfastError: a worker process is killed.
            ValueError: a ``transform`` that gives pictures of several sizes.
        """

        def skip(i: int, reason: str) -> None:
            self._reasons[i] = reason
            if self.strict:
                raise UnreadableImageError(f"cannot read {self.files[i]}: {reason}")

        dataset = ImageDataset(self.files, self.preprocessing)
        found = False
        for views, kept in decoded(
            dataset,
            stacked,
            skip,
            self._doubts.__setitem__,
            batch_size=self.batch_size,
            workers=self.workers,
        ):
            found = True
            labels, ids = [self.labels[i] for i in kept], [self.ids[i] for i in kept]
            yield self.preprocessing.normalize(views), labels, ids
        if not found:
            raise UnreadableImageError(
                f"none of the {len(self.files)} pictures can be read; the first is "
                f"{self.files[0]}: {self._reasons[0]}"
            )
