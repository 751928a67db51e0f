"""Images with their annotations, as the network sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gcfast.errors import GcfastError
from gcfast.images.loader import ImageLoader, decoded, stacked
from gcfast.images.preprocessing import Preprocessing
from gcfast.metrics import box_masks, mask_box

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture


class AnnotationError(GcfastError):
    """An annotation does not fit its picture and none may be skipped, or no image can be used."""


class MaskSource(Protocol):
    """The source of a picture's mask; picklable, for the worker processes."""

    def read(self) -> NDArray[np.bool_]:
        """Read the mask [h, w] at the picture's size."""


@dataclass(frozen=True)
class MaskFile:
    """An image file whose values of at least 128 of 255 are the object."""

    path: Path

    def read(self) -> NDArray[np.bool_]:
        """Read the mask [h, w].

        Raises:
            ValueError: it has values above 0, but none of at least 128.
        """
        with Image.open(self.path) as picture:
            values = np.asarray(picture.convert("L"))
        mask: NDArray[np.bool_] = values >= 128
        if not mask.any() and values.any():
            raise ValueError(
                f"the mask has no value of at least 128, its highest is {values.max()}"
            )
        return mask


@dataclass(frozen=True)
class Sample:
    """One picture and the objects on it.

    Attributes:
        path: the file.
        id: its name in reports and databases.
        label: its class.
        boxes: of its objects, in pixels of the picture; without any, the box of the mask is used.
        mask: of its objects together, or None.
    """

    path: Path
    id: str
    label: str
    boxes: tuple[Box, ...] = ()
    mask: MaskSource | None = None


@dataclass(frozen=True)
class ScoredSet:
    """The annotated pictures that a reader found.

    Attributes:
        name: of the data set, for reports.
        samples: in the order of the annotation files.
        skipped: (id, reason) of what cannot be used and was left out.
        has_masks: whether the samples have masks; they always have boxes.
    """

    name: str
    samples: list[Sample]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    has_masks: bool = False

    @property
    def class_names(self) -> list[str]:
        """The distinct classes, sorted."""
        return sorted({sample.label for sample in self.samples})

    @property
    def single(self) -> list[str]:
        """Classes of one sample, which has no positive partner; sorted."""
        labels = [sample.label for sample in self.samples]
        return [name for name in self.class_names if labels.count(name) == 1]


class Truth(NamedTuple):
    """The annotations of a batch of B views of S x S pixels."""

    ids: list[str]
    labels: list[str]
    boxes: list[Tensor]  # B of [n, 4] int64, whole pixels of the view, the end exclusive
    box_mask: Tensor  # [B, S, S] bool: inside any of the boxes
    masks: Tensor | None  # [B, S, S] bool; None if the set has none

    @property
    def localised(self) -> tuple[list[Tensor], Tensor]:
        """Boxes, and where pointing is a hit: on the mask, or in a box without one."""
        return self.boxes, self.box_mask if self.masks is None else self.masks


class _Item(NamedTuple):
    view: NDArray[np.uint8]  # [S, S, 3]
    boxes: NDArray[np.int64]  # [n, 4]
    mask: NDArray[np.bool_] | None  # [S, S]


class _Batch(NamedTuple):
    views: Tensor  # [B, S, S, 3] uint8
    boxes: list[NDArray[np.int64]]  # not tensors, each of which would take a file descriptor
    masks: Tensor | None  # [B, S, S] bool

    @classmethod
    def of(cls, items: list[_Item]) -> _Batch:
        masks = [item.mask for item in items if item.mask is not None]
        return cls(
            stacked([item.view for item in items]),
            [item.boxes for item in items],
            stacked(masks) if masks else None,
        )


class _Items(Dataset[tuple[_Item | None, str]]):
    """Views with their annotations, or the reason why a sample cannot be used."""

    def __init__(
        self, samples: Sequence[Sample], preprocessing: Preprocessing, masks: bool
    ) -> None:
        self.samples = list(samples)
        self.preprocessing = preprocessing
        self.masks = masks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[_Item | None, str]:
        sample = self.samples[index]
        try:
            view, size, _ = self.preprocessing.load(sample.path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise anything on damaged files
            return None, f"unreadable, {type(error).__name__}: {error}"
        try:
            mask = self._mask(sample, size)
            boxes = self._boxes(sample, size, mask)
        except MemoryError:
            raise
        except Exception as error:  # of the mask's decoder too
            return None, str(error) or type(error).__name__
        return _Item(view, boxes, mask), ""

    def _mask(self, sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        if not self.masks:
            return None
        if sample.mask is None:
            raise ValueError("no mask")
        whole = sample.mask.read()
        if whole.shape != (size[1], size[0]):
            raise ValueError(
                f"the mask has {whole.shape[1]} x {whole.shape[0]} pixels, the picture "
                f"{size[0]} x {size[1]}"
            )
        if not whole.any():
            raise ValueError("the mask is empty")
        white = Image.fromarray(whole.astype(np.uint8) * 255)
        seen = self.preprocessing.render(white, interpolation="bilinear", fill=0)
        mask: NDArray[np.bool_] = np.asarray(seen) >= 128
        if not mask.any():
            raise ValueError("nothing of the mask is in the network's view")
        return mask

    def _boxes(
        self, sample: Sample, size: tuple[int, int], mask: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        if not sample.boxes:
            if mask is None:
                raise ValueError("no box")
            return np.asarray([mask_box(mask)], np.int64)
        left, top, right, bottom = self.preprocessing.window(size)
        H, W = self.preprocessing.shape
        scale = np.array([W / (right - left), H / (bottom - top)] * 2)
        boxes = (np.asarray(sample.boxes, float) - [left, top, left, top]) * scale
        whole = np.rint(boxes.clip(0, [W, H, W, H])).astype(np.int64)
        seen: NDArray[np.int64] = whole[(whole[:, 0] < whole[:, 2]) & (whole[:, 1] < whole[:, 3])]
        if not len(seen):
            raise ValueError("no box is in the network's view")
        return seen


class ScoredLoader:
    """Batches (images, Truth), the same in every pass; what cannot be used is counted.

    Args:
        dataset: the annotated pictures.
        preprocessing: gives the view.
        batch_size: images in a batch; fewer where some are skipped.
        workers: processes that decode; 0 decodes in this one.
        strict: raise at the first image that cannot be used instead of skipping it.
    """

    def __init__(
        self,
        dataset: ScoredSet,
        preprocessing: Preprocessing,
        *,
        batch_size: int = 32,
        workers: int = 0,
        strict: bool = False,
    ) -> None:
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.workers = workers
        self.strict = strict
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return -(-len(self.dataset.samples) // self.batch_size)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(id, reason) of what the reader and the passes so far left out."""
        return [*self.dataset.skipped, *self._reasons.items()]

    def __iter__(self) -> Iterator[tuple[Tensor, Truth]]:
        """Make one pass: images float32 [B, 3, H, W], and their annotations.

        Raises:
            AnnotationError: an image cannot be used and ``strict`` is set, or none can be used.
        """
        samples = self.dataset.samples

        def skip(i: int, reason: str) -> None:
            self._reasons[samples[i].id] = reason
            if self.strict:
                raise AnnotationError(f"cannot use {samples[i].id}: {reason}")

        items = _Items(samples, self.preprocessing, self.dataset.has_masks)
        H, W = self.preprocessing.shape
        found = False
        for batch, kept in decoded(
            items, _Batch.of, skip, batch_size=self.batch_size, workers=self.workers
        ):
            found = True
            boxes = [torch.from_numpy(b) for b in batch.boxes]
            yield (
                self.preprocessing.normalize(batch.views),
                Truth(
                    ids=[samples[i].id for i in kept],
                    labels=[samples[i].label for i in kept],
                    boxes=boxes,
                    box_mask=torch.stack([box_masks(b, H, W).any(0) for b in boxes]),
                    masks=batch.masks,
                ),
            )
        if not found:
            first = next(iter(self.skipped), ("none", "there are none"))
            raise AnnotationError(
                f"none of the images of {self.dataset.name} can be used; {first[0]}: {first[1]}"
            )


def labelled_loader(
    dataset: ScoredSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
) -> ImageLoader:
    """Return batches (images, labels, ids) of all samples, for :meth:`gcfast.Explainer.build`."""
    samples = dataset.samples
    return ImageLoader(
        [sample.path for sample in samples],
        [sample.id for sample in samples],
        [sample.label for sample in samples],
        preprocessing=preprocessing,
        batch_size=batch_size,
        workers=workers,
        strict=strict,
    )


def text_of(path: Path) -> str:
    """Read an annotation file, with its own line ends.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from None
