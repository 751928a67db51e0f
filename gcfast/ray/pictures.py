"""From what a column of pictures holds to what a network takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import require_images
from gcfast.images.loader import UnreadableImageError, stacked, tried
from gcfast.images.preprocessing import Preprocessing

Batch = dict[str, Any]  # columns of n rows
Prepared = Preprocessing | Callable[[list[Any]], Tensor]

VIEW, ERROR, DOUBT = "view", "error", "doubt"


class Prepare:
    """Decode and resize the pictures of batches, for ``Dataset.map_batches``.

    A batch loses the column of pictures and gets ``view`` (uint8 [n, H, W, 3], what
    :class:`Embed` and :class:`Explain` normalize), ``error`` (why a picture cannot be read; "" as
    a rule) and ``doubt`` (what was assumed about it). As tasks of their own these keep a GPU's
    actors from waiting for decoders.

    Args:
        preprocessing: size, crop and normalization; or a function from the column's values, a list,
            to what the network takes, floating point [n, 3, h, w] (``view`` is then that).
        image: the column. Its values are paths, encoded bytes, dicts of the two (Hugging Face's
            ``Image``), or uint8 arrays [h, w, 3].
        strict: raise for a picture that cannot be read.

    Raises:
        TypeError: ``preprocessing`` is neither; pixels of another dtype.
        UnreadableImageError: a picture cannot be read, and ``strict`` is set.
    """

    def __init__(
        self, preprocessing: Prepared, *, image: str = "image", strict: bool = False
    ) -> None:
        if not isinstance(preprocessing, Preprocessing) and not callable(preprocessing):
            raise TypeError(
                "`preprocessing` must be a gcfast.images.preprocessing.Preprocessing or a "
                f"function, got {type(preprocessing).__name__}"
            )
        self.preprocessing = preprocessing
        self.image = image
        self.strict = strict

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with views in place of pictures."""
        if self.image not in batch:
            raise ValueError(
                f"`image` must be a column of the data set, which has "
                f"{', '.join(map(repr, batch))}, got {self.image!r}"
            )
        values = list(batch[self.image])
        rest = {name: column for name, column in batch.items() if name != self.image}
        nothing = np.full(len(values), "", dtype=object)
        if not isinstance(self.preprocessing, Preprocessing):
            images = require_images("preprocessing(values)", self.preprocessing(values))
            return rest | {VIEW: images.numpy(), ERROR: nothing, DOUBT: nothing}
        read = [tried(self.preprocessing, _source(value)) for value in values]
        errors, doubts = nothing, nothing.copy()
        for number, (view, text) in enumerate(read):
            (errors if view is None else doubts)[number] = text
        if self.strict and any(errors):
            number = int(np.flatnonzero(errors != "")[0])
            raise UnreadableImageError(f"cannot read {values[number]!r:.200}: {errors[number]}")
        good = [view for view, _ in read if view is not None]
        views = spread(stacked(good).numpy(), errors == "") if good else self._none(len(values))
        return rest | {VIEW: views, ERROR: errors, DOUBT: doubts}

    def _none(self, count: int) -> NDArray[Any]:
        """Return views for a batch in which no picture can be read."""
        assert isinstance(self.preprocessing, Preprocessing)
        H, W = self.preprocessing.shape
        if self.preprocessing.transform is None:
            return np.zeros((count, H, W, 3), np.uint8)
        return np.zeros((count, 3, H, W), np.float32)

    def normalized(self, views: NDArray[Any]) -> Tensor:
        """Return what the network takes of views, floating point [B, 3, H, W]."""
        images = torch.from_numpy(np.array(views))  # Ray's own memory is read-only
        if isinstance(self.preprocessing, Preprocessing):
            return self.preprocessing.normalize(images)
        return images


def spread(values: NDArray[Any], there: NDArray[np.bool_], fill: Any = 0) -> NDArray[Any]:
    """Return rows [g, ...] at the g places of [n] that are set, with ``fill`` at the others."""
    if there.all():
        return values
    whole = np.full((len(there), *values.shape[1:]), fill, dtype=values.dtype)
    whole[there] = values
    return whole


def texts(values: Sequence[Any]) -> NDArray[Any]:
    """Return strings as a column; a fixed-width array would cut off trailing zero characters."""
    column = np.empty(len(values), dtype=object)
    column[:] = [str(value) for value in values]
    return column


def _source(value: Any) -> Any:
    """Return what a picture is read from."""
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return io.BytesIO(value)
    return str(value) if isinstance(value, str) else value
