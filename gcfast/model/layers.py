"""The layers that can be explained: which outputs lie on the image, in which layout.

One forward pass of one image with a graph tells all of it: the shapes, the modules' order, and
which places the embedding's gradient reaches. A layer is *spatial* where its output is

- [B, C, H, W] or [B, H, W, C], and H x W lies on the image; or
- tokens [B, P, C] (or [P, B, C]), some prefix and then a grid whose patches cover the image.

The default is the last spatial layer that

- the embedding's gradient reaches at its places: behind the last attention of a class-token
  transformer nothing but the class token is used, so its last block is passed over, and what its
  last attention reads is taken;
- lets nothing of the image past it, for convolutional maps: one branch of several, or a
  normalisation in front of a residual sum, is no summary of the image.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from gcfast.model.capture import called, evaluating, first_tensor
from gcfast.model.tokens import ChannelsLast, Layout, TokenGrid, grids, patch_of

CHANNELS_FIRST = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)  # modules that work on [B, C, H, W]
MAX_PREFIX = 16  # class, distillation and register tokens
MIN_REACHED = 0.25  # of the places of tokens; a class token's last block has none
MAX_SKEW = 2.0  # how far places may be from square, one side by the other
UNIFORM = 0.05  # spread of a gradient over places that may still be rounding, in any precision
EXAMINED = 12  # layers whose gradient is asked for at first, from the last one back
MAX_BEHIND = 0.5  # of the parameters may lie between the default and a later part of the maps
GRIDS_OF_TOKENS = (1, 2, 4, 8, 16)  # patches merged to one token, a side


@dataclass(frozen=True)
class Candidate:
    """A layer with a spatial output."""

    name: str  # dotted; "NAME@2" is the second of several runs
    module: nn.Module
    run: int  # which of its runs in a forward pass, from 1 on
    shape: tuple[int, ...]  # of the raw output for one image
    layout: Layout | None  # to [B, C, H, W]; None where it is that
    grid: tuple[int, int]  # H, W
    channels: int
    parameters_before: float  # the share of the model's parameters used up to and with it
    reached: float | None  # the share of its places that the gradient reaches; None: not known
    passed_by: bool | None  # whether the image reaches the embedding another way as well
    uniform: bool = False  # whether the gradient is the same at every place, as behind an average

    @property
    def usable(self) -> bool:
        """Whether an explanation of this layer explains the embedding."""
        if self.reached is None:
            return self.layout is None
        if self.layout is None:
            return self.reached > 0 and not self.passed_by
        return self.reached >= MIN_REACHED


# H, W of each convolution's output → the pixels of the image from one place to the next.
Strides = dict[tuple[int, int], tuple[int, int]]


@dataclass
class _Seen:
    """One run of one module."""

    name: str
    module: nn.Module
    run: int
    shape: tuple[int, ...]
    edge: GradientEdge | None
    parameters: int


_Placed = tuple[_Seen, Layout | None]  # a run, and the layout of its output


@dataclass
class _Pass:
    """What the hooks noted in a forward pass."""

    seen: list[_Seen]
    runs: Counter[nn.Module]
    strides: Strides
    parameters: int


def candidates(
    model: nn.Module,
    image: Tensor,
    embedding: Callable[[Any, int], Tensor],
    *,
    every: bool = True,
    before: tuple[nn.Module, int] | None = None,
    keep: Callable[[tuple[int, int]], bool] = lambda _: True,
) -> list[Candidate]:
    """The spatial layers of a model in the order in which they finish.

    Args:
        model: as it stands in evaluation mode afterwards as before.
        image: [1, 3, h, w] on the model's device, in its dtype.
        embedding: from what the model returns to [B, D].
        every: False for the last ones alone, as far back as the first that is usable.
        before: only what finishes before this run of a module.
        keep: whether an output of H x W is wanted.

    Returns:
        The layers, with their gradient if the model can be differentiated.
    """
    with evaluating(model), torch.inference_mode(False):
        image = image.clone() if image.is_inference() else image.detach()
        try:
            leaf = image.requires_grad_(True)
            with torch.enable_grad():
                noted, output = _noted(model, leaf.clone(), embedding, before)
            if output.requires_grad:
                whole, spatial = _spatial(noted, image.shape[2:], keep)
                found = _examined(whole, noted, output, leaf, every)
                default = default_of(found)
                if len(whole) < len(spatial) and (default is None or default.layout is None):
                    # Tokens that no block or normalisation gives: better one inside than patches.
                    found = _examined(spatial, noted, output, leaf, every)
                return found
        except RuntimeError:  # the model works in place, or cannot be differentiated
            pass
        with torch.no_grad():
            noted, _ = _noted(model, image.detach(), embedding, before)
        size = (image.shape[2], image.shape[3])
        return [
            _candidate(seen, layout, noted, size)
            for seen, layout in _spatial(noted, image.shape[2:], keep)[0]
        ]


def default_of(found: Sequence[Candidate]) -> Candidate | None:
    """The layer that is explained unless another is named; None where one must be named.

    That is so where the last maps are put together by no module, as the branches of a traced
    network are, and the last layer that holds everything lies far in front of them.
    """
    usable = [one for one in found if one.usable]
    if not usable:
        return None
    later = [one.parameters_before for one in found if one.passed_by and one.reached]
    behind = max(later, default=0.0) - usable[-1].parameters_before
    return usable[-1] if behind <= MAX_BEHIND else None


def layout_of(
    shape: Sequence[int],
    module: nn.Module,
    image_size: tuple[int, int],
    strides: Strides | None = None,
) -> tuple[bool, Layout | None]:
    """Whether an output of one image is spatial, and its layout (None is [B, C, H, W] itself).

    Args:
        shape: of the output, B being 1.
        module: whose output it is; its type decides where both orders of dimensions would fit.
        image_size: (h, w).
        strides: of the convolutions in the same pass.
    """
    if len(shape) == 4:
        if isinstance(module, CHANNELS_FIRST):
            return shape[2] * shape[3] > 1, None
        only_last = _works_on_the_last(module, shape[3])
        if not only_last and _fits(shape[2:], image_size):
            return True, None
        return (True, ChannelsLast()) if _fits(shape[1:3], image_size) else (False, None)
    batch_first = shape[0] == 1
    if len(shape) == 3 and (batch_first or shape[1] == 1):
        places = shape[1] if batch_first else shape[0]
        found = _prefix_and_patch(places, image_size, strides or {})
        if found is not None:
            prefix, patch = found
            return True, TokenGrid(prefix=prefix, patch=patch, batch_first=batch_first)
    return False, None


def _noted(
    model: nn.Module,
    image: Tensor,
    embedding: Callable[[Any, int], Tensor],
    before: tuple[nn.Module, int] | None,
) -> tuple[_Pass, Tensor]:
    noted = _Pass([], Counter(), {}, 0)
    last, end = (model, 0) if before is None else before
    counted: set[int] = set()
    thread = threading.get_ident()

    def count(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                noted.parameters += parameter.numel()

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != thread or noted.runs[last] >= end > 0:
                return
            noted.runs[module] += 1
            if module is last and noted.runs[module] == end:
                return
            count(module)
            # An output object may hold tensors that the embedding does not come from.
            tensor = None if isinstance(output, Mapping) else first_tensor(output)
            if tensor is None or tensor.ndim not in (3, 4) or not tensor.is_floating_point():
                return
            if isinstance(module, nn.Conv2d) and tensor.ndim == 4:
                note_stride(module, args, tensor, image.shape[2:], noted.strides)
            noted.seen.append(
                _Seen(
                    name,
                    module,
                    noted.runs[module],
                    tuple(tensor.shape),
                    torch.autograd.graph.get_gradient_edge(tensor)
                    if tensor.requires_grad
                    else None,
                    noted.parameters,
                )
            )

        return hook

    handles = [
        module.register_forward_hook(note(name)) for name, module in model.named_modules() if name
    ]
    try:
        output = embedding(called(model, image), len(image))
    finally:
        for handle in handles:
            handle.remove()
    for module in model.modules():
        count(module)
    return noted, output


def _spatial(
    noted: _Pass, image_size: Sequence[int], keep: Callable[[tuple[int, int]], bool]
) -> tuple[list[_Placed], list[_Placed]]:
    """The outputs that lie on the image, each under its outermost name, with their layouts.

    First those that represent the image: inside a transformer's block are projections and
    activations of many widths, and what a block or a normalisation gives is the representation
    itself. Then all.
    """
    size = (image_size[0], image_size[1])
    sequences = {s.shape[1] for s in noted.seen if len(s.shape) == 3 and s.shape[0] == 1}
    spatial: list[_Placed] = []
    for seen in noted.seen:
        if len(seen.shape) == 4 and not isinstance(seen.module, CHANNELS_FIRST):
            tokens = seen.shape[2]  # of [B, heads, tokens, ·], what attention works on
            if tokens in sequences and all(tokens != height for height, _ in noted.strides):
                continue
        lies, layout = layout_of(seen.shape, seen.module, size, noted.strides)
        if lies and keep(_arranged(seen.shape, layout, size)[1:]):
            spatial.append((seen, layout))
    # A block and its last module often give the same tensor, as does an identity in the next one.
    outer: dict[GradientEdge, _Seen] = {}
    for seen, _ in spatial:
        if seen.edge is not None:
            outer[seen.edge] = min(
                seen, outer.get(seen.edge, seen), key=lambda s: s.name.count(".")
            )
    spatial = [(s, layout) for s, layout in spatial if s.edge is None or outer[s.edge] is s]
    whole = [(s, layout) for s, layout in spatial if layout is None or _is_whole(s.module)]
    return whole, spatial


def _examined(
    spatial: list[_Placed],
    noted: _Pass,
    output: Tensor,
    leaf: Tensor,
    every: bool,
) -> list[Candidate]:
    """The layers with what the gradient of the embedding says of them, from the last one back."""
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator).to(output)
    routes = _Routes(output, leaf)
    size = (leaf.shape[2], leaf.shape[3])
    found: list[Candidate] = []
    stop, count = len(spatial), EXAMINED
    while stop > 0:
        # Every pass begins at the embedding: twice as many layers each time.
        part = spatial[max(0, stop - count) : stop]
        stop, count = stop - count, 2 * count
        edges = [seen.edge for seen, _ in part if seen.edge is not None]
        if not edges:
            break  # what was made without a graph is not explained
        gradients = torch.autograd.grad(
            output, edges, cotangent, allow_unused=True, retain_graph=True
        )
        by_edge = dict(zip(edges, gradients, strict=True))
        found[:0] = [
            _candidate(seen, layout, noted, size, by_edge, routes) for seen, layout in part
        ]
        if not every and any(one.usable for one in found):
            break
    return found


def _candidate(
    seen: _Seen,
    layout: Layout | None,
    noted: _Pass,
    image_size: tuple[int, int],
    gradients: Mapping[GradientEdge, Tensor | None] | None = None,
    routes: _Routes | None = None,
) -> Candidate:
    reached: float | None = None
    passed_by: bool | None = None
    uniform = False
    if gradients is not None:
        reached = 0.0
        gradient = None if seen.edge is None else gradients[seen.edge]
        if gradient is not None:
            maps = gradient if layout is None else layout(gradient, image_size)
            reached = float((maps != 0).any(1).float().mean())
            spread = (maps - maps.mean((2, 3), keepdim=True)).norm()
            uniform = bool(spread <= UNIFORM * maps.norm())
        if reached and layout is None and routes is not None and seen.edge is not None:
            passed_by = routes.pass_by(seen.edge.node)
    channels, *grid = _arranged(seen.shape, layout, image_size)
    return Candidate(
        name=seen.name if noted.runs[seen.module] == 1 else f"{seen.name}@{seen.run}",
        module=seen.module,
        run=seen.run,
        shape=seen.shape,
        layout=layout,
        grid=(grid[0], grid[1]),
        channels=channels,
        parameters_before=seen.parameters / max(noted.parameters, 1),
        reached=reached,
        passed_by=passed_by,
        uniform=uniform,
    )


def _arranged(
    shape: Sequence[int], layout: Layout | None, image_size: tuple[int, int]
) -> tuple[int, int, int]:
    """C, H, W of an output of one image."""
    arranged = torch.empty(tuple(shape), device="meta")
    if layout is not None:
        arranged = layout(arranged, image_size)
    return arranged.shape[1], arranged.shape[2], arranged.shape[3]


class _Routes:
    """The ways from an image to the embedding, in the graph of one forward pass."""

    def __init__(self, output: Tensor, leaf: Tensor) -> None:
        assert output.grad_fn is not None
        self.start = output.grad_fn
        self.goal = torch.autograd.graph.get_gradient_edge(leaf).node

    def pass_by(self, node: Node) -> bool:
        """Whether there is a way that leaves a node out."""
        pending, met = [self.start], {self.start, node}
        while pending:
            for following, _ in pending.pop().next_functions:
                if following is self.goal:
                    return True
                if following is not None and following not in met:
                    met.add(following)
                    pending.append(following)
        return False


def _fits(grid: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Whether H x W places can lie on an image: more than one, and about square."""
    height, width = grid
    if height * width <= 1 or height > image_size[0] or width > image_size[1]:
        return False
    skew = image_size[0] / height * width / image_size[1]
    return 1 / MAX_SKEW <= skew <= MAX_SKEW


def _works_on_the_last(module: nn.Module, size: int) -> bool:
    """Whether a module's own weights say that the last dimension is the channels."""
    shape = getattr(module, "normalized_shape", None)
    if shape is None and isinstance(module, nn.Linear):
        shape = (module.out_features,)
    return isinstance(shape, tuple | list) and tuple(shape) == (size,)


def _is_whole(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Identity)
        or "norm" in type(module).__name__.lower()
        or any(True for _ in module.children())
    )


def note_stride(
    module: nn.Conv2d, args: Any, output: Tensor, image_size: Sequence[int], strides: Strides
) -> None:
    """Add a convolution's stride, in pixels of the image, to what is known of this pass."""
    given = first_tensor(args)
    if given is None or given.ndim != 4:
        return
    size = (given.shape[2], given.shape[3])
    # What an image is padded to before its patches are cut is one pixel a place, too.
    base = strides.get(size) or tuple(
        max(1, round(whole / part)) for whole, part in zip(image_size, size, strict=True)
    )
    step = (base[0] * int(module.stride[0]), base[1] * int(module.stride[1]))
    strides.setdefault((output.shape[2], output.shape[3]), step)


def _prefix_and_patch(
    places: int, image_size: tuple[int, int], strides: Strides
) -> tuple[int, tuple[int, int]] | None:
    """The tokens before the grid, and the pixels of a patch, of so many tokens on an image.

    The grid is one that a convolution of the same pass has made, or that with patches merged; a
    transformer without convolutions is searched for the fewest tokens before square patches.
    """
    for (height, width), (down, across) in reversed(strides.items()):
        for merged in GRIDS_OF_TOKENS:
            grid = -(-height // merged), -(-width // merged)
            prefix = places - grid[0] * grid[1]
            patch = down * merged, across * merged
            most = MAX_PREFIX if merged == 1 else 0
            many = grid[0] * grid[1] > 1
            if many and 0 <= prefix <= most and grid in grids(patch, image_size):
                return prefix, patch
    for prefix in range(0 if strides else MAX_PREFIX + 1):
        found = patch_of(places - prefix, image_size) if places - prefix > 1 else None
        if found is not None and all(s % p == 0 for s, p in zip(image_size, found, strict=True)):
            return prefix, found
    return None
