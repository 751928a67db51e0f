"""The batches of a loader, checked and moved to the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast._checks import require_finite_rows, require_images
from gcfast.method.labels import Labels, Values
from gcfast.model.network import Network


class Batch(NamedTuple):
    """One element of a loader, checked."""

    images: Tensor  # [B, 3, h, w]
    labels: Any  # list[int] or list[str]; list[float] where they are real numbers
    ids: list[str] | None


def batches(loader: Iterable[Any], *, real_labels: bool = False) -> Iterator[Batch]:
    """Yield the elements of a loader, checked; empty ones are left out."""
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"`loader` must be an iterable of (images, labels), got {type(loader).__name__}"
        )
    for number, element in enumerate(loader):
        if not isinstance(element, tuple | list) or len(element) not in (2, 3):
            got = type(element).__name__
            if isinstance(element, Mapping):
                raise ValueError(
                    "`loader` must give (images, labels) or (images, labels, ids), got a dict with "
                    f"{', '.join(map(repr, element))} as batch {number}: make tuples of its values"
                )
            if isinstance(element, tuple | list):
                got = f"{got} of {len(element)}"
            raise ValueError(
                f"`loader` must give (images, labels) or (images, labels, ids), got a {got} as "
                f"batch {number}: a database needs labels"
            )
        images = require_images("images", element[0])
        listed = Values.listed if real_labels else Labels.listed
        labels = listed(element[1], len(images))
        ids = None
        if len(element) == 3:
            ids = listed_ids(element[2], len(images))
        if len(images):
            yield Batch(images, labels, ids)


def on_device(images: Tensor, network: Network) -> Tensor:
    """Return the images on the model's device and in its dtype, without waiting for the device.

    They go by pinned memory of our own: the loader may fill its own again at once.
    """
    device = network.device(images.device)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = images.dtype if autocast else network.dtype_for(images)
    if device.type == "cuda" and images.device.type == "cpu":
        staged = torch.empty_like(images, pin_memory=True).copy_(images)
        images = staged.to(device, non_blocking=True)
    return images.to(device, dtype)


def listed_ids(ids: Any, count: int) -> list[str]:
    """Return ids of any kind, also a tensor or an array of them, as strings."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"`ids` must be one id an image, got {ids!r}")
    values = [str(value) for value in values]
    if len(values) != count:
        raise ValueError(f"`ids` must have B = {count} elements, got {len(values)}")
    return values


def check_embeddings(embeddings: Tensor, images: Tensor, *, first: int = 0) -> None:
    """Raise ValueError for NaN or infinity in embeddings, or in the images they come from."""
    if bool(torch.isfinite(embeddings.sum(dtype=torch.float64))):
        return
    require_finite_rows("images", images, first=first)
    require_finite_rows("embeddings", embeddings, first=first)
