"""The layers before the explained one whose outputs refine its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from gcfast.model.layers import Candidate, candidates

if TYPE_CHECKING:
    from gcfast.model.network import Network

Refine = Literal["auto"] | str | nn.Module | Iterable[str | nn.Module] | None
SCALES = (2, 4)  # times the explained layer's resolution, which "auto" looks for
NEARLY = 0.75  # of the parameters
# A padded output of the explained layer's own stage is 6 x 6 for 4 x 4, and has places that lie
# outside the image.
PADDING = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
SLACK = 0.25  # of a scale: 15 x 15 is twice 8 x 8, and 29 x 29 four times


def finer_layers(
    model: nn.Module,
    image: Tensor,
    embedding: Callable[[Any, int], Tensor],
    layer: tuple[nn.Module, int],
    grid: Sequence[int],
) -> list[Candidate]:
    """The outputs at 2 and at 4 times a layer's resolution on the way to it, coarse to fine.

    Of each resolution it is the last that lets nothing of the image past it. But a stage's output
    says what the first block of the next stage expands it to, in fewer channels: of those with
    nearly as many parameters before them, the outermost module is taken.

    Args:
        model: as for :func:`gcfast.model.layers.candidates`.
        image: as there.
        embedding: as there.
        layer: the explained one, and which of its runs.
        grid: H, W of its output.

    Returns:
        None, one or two of them: a transformer whose tokens are as many everywhere has none.
    """

    def scale(finer: tuple[int, int]) -> int | None:
        for times in SCALES:
            sides = zip(finer, grid, strict=True)
            if all(abs(fine / (times * coarse) - 1) <= SLACK for fine, coarse in sides):
                return times
        return None

    found = candidates(
        model, image, embedding, before=layer, keep=lambda finer: scale(finer) is not None
    )
    chosen = []
    for times in SCALES:
        there = [
            one
            for one in found
            if one.usable and scale(one.grid) == times and not isinstance(one.module, PADDING)
        ]
        late = [
            one for one in there if one.parameters_before >= NEARLY * there[-1].parameters_before
        ]
        depth = min((one.name.count(".") for one in late), default=0)
        chosen += [one for one in late if one.name.count(".") == depth][-1:]
    return chosen


def checked_names(refine: Refine) -> list[str | nn.Module]:
    """The layers of ``refine`` as a list, whatever they are.

    Raises:
        TypeError: neither "auto" nor names or modules.
        ValueError: an empty list.
    """
    if isinstance(refine, str | nn.Module):
        return [refine]
    if not isinstance(refine, Iterable):
        raise TypeError(
            "`refine` must be None, 'auto', or names or modules of layers, got "
            f"{type(refine).__name__}"
        )
    layers = list(refine)
    if not layers:
        raise ValueError("`refine` must name at least one layer, or be None, got an empty list")
    return layers


def check_finer(
    network: Network,
    activations: Tensor,
    share: tuple[float, float],
    layers: Sequence[Network],
    finer: Sequence[Tensor],
    image_size: tuple[int, int],
) -> None:
    """Refuse outputs [B, C, H, W] that are no finer than what comes before them, or lie elsewhere.

    Raises:
        ValueError: by the first of those layers.
    """
    name, coarse = network.layer_name, activations
    for layer, output in zip(layers, finer, strict=True):
        if output.shape[2] < coarse.shape[2] or output.shape[3] < coarse.shape[3]:
            raise ValueError(
                "`refine` must name layers from coarse to fine, none of them coarser than the one "
                f"that is explained, got {layer.layer_name!r} with {output.shape[2]} x "
                f"{output.shape[3]} after {name!r} with {coarse.shape[2]} x {coarse.shape[3]}"
            )
        if layer.share(output, image_size) != share:
            raise ValueError(
                "`refine` must name layers whose outputs cover what those of "
                f"{network.layer_name!r} cover of the image, got {layer.layer_name!r}; give images "
                "whose sides are multiples of the patch"
            )
        name, coarse = layer.layer_name, output
