"""Which layers of a network can be explained, and which one is explained by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor, nn

from gcfast.errors import UnsupportedModelError
from gcfast.method.head import probe
from gcfast.model.layers import Candidate, candidates, default_of
from gcfast.model.network import Network


@dataclass(frozen=True)
class Layer:
    """A layer that can be given as ``layer``."""

    name: str  # dotted; "NAME@2" is the second of a module's runs in a forward pass
    kind: str  # the module's class
    shape: tuple[int, ...]  # of its output for one image
    layout: str  # how that is read: "[B, C, H, W]", "[B, H, W, C]" or "tokens", with the prefix
    grid: tuple[int, int]  # H, W
    channels: int  # C
    parameters_before: float  # the share of the model's parameters that is used up to it, with it
    closed_form: bool  # whether a database is built without autograd
    default: bool
    why: str  # it is the default, or is not


class LayerTable(Sequence[Layer]):
    """The layers of :func:`layers`, in the order in which they finish; prints as a table."""

    def __init__(self, found: Sequence[Layer]) -> None:
        self._found = tuple(found)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        """The layer at a position."""
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    @property
    def default(self) -> Layer | None:
        """The layer that is explained where none is named; None where one must be."""
        return next((layer for layer in self._found if layer.default), None)

    def __str__(self) -> str:
        rows = [("layer", "output", "layout", "H x W", "parameters", "closed form", "")]
        for one in self._found:
            rows.append(
                (
                    ("* " if one.default else "  ") + one.name,
                    str(list(one.shape)),
                    one.layout,
                    f"{one.grid[0]} x {one.grid[1]}",
                    f"{one.parameters_before:.0%}",
                    "yes" if one.closed_form else "no",
                    one.why,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    __repr__ = __str__


def layers(
    model: nn.Module,
    image: Tensor,
    *,
    output_key: str | int | None = None,
    l2_normalize: bool = True,
) -> LayerTable:
    """List the layers of an embedding network that can be explained.

    Runs the model forward and back on one image, and a few times more for the layers that may have
    the closed form.

    Args:
        model: images [B, 3, h, w] → embeddings [B, D]; left as it is.
        image: [3, h, w] or [B, 3, h, w] floating point, of which the first is used; moved to the
            model's device and dtype.
        output_key: as for :class:`gcfast.Explainer`.
        l2_normalize: as for :class:`gcfast.Explainer`.

    Returns:
        The layers in the order in which they finish. At most one is the default.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as :class:`gcfast.Explainer`.
    """
    network = Network(model, output_key=output_key)
    images = image[None] if image.ndim == 3 else image[:1]
    images = images.to(network.device(images.device), network.dtype_for(images))
    found = candidates(network.model, images, network.embedding)
    default = default_of(found)
    # Those that can be explained, and why none of the later ones is.
    from_default_on = found[found.index(default) :] if default is not None else found
    found = [one for one in found if one.usable or one in from_default_on]
    closed = _closed(network, found, images, l2_normalize)
    return LayerTable(
        [
            Layer(
                name=one.name,
                kind=type(one.module).__name__,
                shape=one.shape,
                layout="[B, C, H, W]" if one.layout is None else repr(one.layout),
                grid=one.grid,
                channels=one.channels,
                parameters_before=one.parameters_before,
                closed_form=one in closed,
                default=one is default,
                why=_why(one, default),
            )
            for one in found
        ]
    )


def _closed(
    network: Network, found: Sequence[Candidate], images: Tensor, l2_normalize: bool
) -> list[Candidate]:
    """The layers that have the closed form, from the last one back to the first that has not.

    What lies in front of a layer without it goes through that layer, and has it no more.
    """
    closed: list[Candidate] = []
    for one in reversed(found):
        if not one.usable:
            continue
        if not one.uniform:
            break
        at = Network(network.model, one.name, output_key=network.output_key, reshape=one.layout)
        try:
            if probe(at, images, l2_normalize) is None:
                break
        except (ValueError, TypeError, RuntimeError, UnsupportedModelError):
            break
        closed.append(one)
    return closed


def _why(one: Candidate, default: Candidate | None) -> str:
    if one is default:
        return "default: the last that the embedding depends on at its places"
    if one.reached is None:
        return ""
    if one.reached == 0:
        return "the embedding does not depend on its places"
    if not one.usable:
        if one.passed_by:
            return "the image reaches the embedding past it"
        return f"the embedding depends on {one.reached:.0%} of its places"
    return ""
