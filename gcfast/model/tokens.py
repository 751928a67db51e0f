"""Layouts: from a layer's raw output to feature maps [B, C, H, W].

A layout is a callable ``(output, image_size) -> [B, C, H, W]`` that picks and rearranges values,
so that gradients go through it too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator

from torch import Tensor

Layout = Callable[[Tensor, tuple[int, int]], Tensor]
# A user's callable may leave the image's size out.
Reshape = Callable[[Tensor], Tensor] | Layout


class TokenGrid:
    """A ``reshape`` for transformers: tokens [B, prefix + H·W, C] → [B, C, H, W].

    Without arguments the grid is the one that square patches make of the image. The patches of an
    image whose sides are no multiple of the patch size do not cover it (or reach beyond it); the
    map is then laid on the part that they do cover.

    Args:
        height: H; None works it out.
        width: W; None works it out.
        prefix: tokens before the grid (class token, registers), which are dropped.
        patch: the side of a patch in pixels of the image, or (height, width).
        batch_first: whether tokens are [B, P, C]; False for [P, B, C].

    Raises:
        ValueError: both a grid and a patch; a number below 1 (``prefix``: below 0).
    """

    def __init__(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        prefix: int = 1,
        patch: int | tuple[int, int] | None = None,
        batch_first: bool = True,
    ) -> None:
        if patch is not None and (height is not None or width is not None):
            raise ValueError("give either `patch` or `height` and `width`, not both")
        self.patch = (patch, patch) if isinstance(patch, int) else patch
        for name, value in (("height", height), ("width", width), ("patch", self.patch)):
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if prefix < 0:
            raise ValueError(f"`prefix` must be at least 0, got {prefix}")
        self.height = height
        self.width = width
        self.prefix = prefix
        self.batch_first = batch_first

    def __repr__(self) -> str:
        given = {
            "height": self.height,
            "width": self.width,
            "prefix": self.prefix if self.prefix != 1 else None,
            "patch": self.patch,
            "batch_first": None if self.batch_first else False,
        }
        words = (f"{name}={value}" for name, value in given.items() if value is not None)
        return f"TokenGrid({', '.join(words)})"

    def grid(self, places: int, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(H, W) of so many places behind the prefix, on an image (h, w).

        Raises:
            ValueError: no grid, or one that is another way up than the image.
        """
        if self.height or self.width:
            grid = self._given_grid(places, image_size)
        elif image_size is None:
            side = math.isqrt(max(places, 0))
            grid = (side, side)
        else:
            patch = self.patch or patch_of(places, image_size)
            if patch is None:
                raise ValueError(
                    f"{places} tokens after the first {self.prefix} must fill a grid of square "
                    f"patches on an image of {image_size[0]} x {image_size[1]}; give `height` and "
                    "`width`, `patch` or another `prefix`"
                )
            grid = next(
                (g for g in grids(patch, image_size) if g[0] * g[1] == places),
                _floor(image_size, patch),
            )
        if grid[0] * grid[1] != places or places < 1:
            on = "" if self.patch is None else f" (patches of {self.patch[0]} x {self.patch[1]})"
            raise ValueError(
                f"{places} tokens after the first {self.prefix} must fill a grid, got "
                f"{grid[0]} x {grid[1]}{on}; give `height` and `width`"
            )
        return grid

    def covered(self, grid: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
        """The pixels, from the top left, that a grid's patches cover; may exceed the image's."""
        if self.height or self.width:
            return image_size
        patch = self.patch or patch_of(grid[0] * grid[1], image_size)
        return image_size if patch is None else (grid[0] * patch[0], grid[1] * patch[1])

    def __call__(self, tokens: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """See the class.

        Args:
            tokens: [B, prefix + H·W, C].
            image_size: (h, w) of the images that they are of; without it and without ``height``
                or ``width`` the grid is square.

        Raises:
            ValueError: another rank, or a number of tokens that does not fill the grid.
        """
        if tokens.ndim != 3:
            raise ValueError(f"tokens must have shape [B, P, C], got {list(tokens.shape)}")
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        height, width = self.grid(tokens.shape[1] - self.prefix, image_size)
        places = tokens[:, self.prefix :]
        return places.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)

    def _given_grid(self, places: int, image_size: tuple[int, int] | None) -> tuple[int, int]:
        height = self.height or (places // self.width if self.width else 0)
        width = self.width or (places // height if height else 0)
        if image_size is not None and height != width and 0 not in (height, width):
            upright = _skew((height, width), image_size)
            if _skew((width, height), image_size) < upright:
                raise ValueError(
                    f"a grid of {height} x {width} must lie as the image does, got an image of "
                    f"{image_size[0]} x {image_size[1]}; give `patch` for images of any shape"
                )
        return height, width


class ChannelsLast:
    """The layout of layers that keep channels last: [B, H, W, C] → [B, C, H, W]."""

    def __repr__(self) -> str:
        return "ChannelsLast()"

    def __call__(self, output: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """See the class; raises ValueError for another rank."""
        del image_size
        if output.ndim != 4:
            raise ValueError(f"output must have shape [B, H, W, C], got {list(output.shape)}")
        return output.permute(0, 3, 1, 2)


def takes_image_size(reshape: Reshape) -> bool:
    """Whether a ``reshape`` takes the image's size as a second positional argument."""
    try:
        parameters = inspect.signature(reshape).parameters.values()
    except (TypeError, ValueError):  # a built-in
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds for parameter in parameters) >= 2


def patch_of(places: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """The square patch of which so many cover an image; None where there is none.

    A patch that divides both sides comes first, then the largest of which only whole ones count,
    then one whose last row and column reach beyond the image.
    """
    if places < 1:
        return None
    near = math.sqrt(image_size[0] * image_size[1] / places)  # but for what is not covered
    fits = [
        side
        for side in range(max(1, int(near / 2)), min(int(2 * near) + 1, min(image_size)) + 1)
        if any(h * w == places for h, w in grids((side, side), image_size))
    ]
    if not fits:
        return None

    def rank(side: int) -> tuple[bool, bool, int]:
        whole = image_size[0] // side * (image_size[1] // side) == places
        exact = image_size[0] % side == 0 and image_size[1] % side == 0
        return exact, whole, side

    best = sorted(fits, key=rank)[-1]  # PyTorch 2.10 does not trace max with a key
    return best, best


def _floor(image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return image_size[0] // patch[0], image_size[1] // patch[1]


def grids(patch: tuple[int, int], image_size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The grids that patches make: whole ones only, or padded to whole ones."""
    yield _floor(image_size, patch)
    yield -(-image_size[0] // patch[0]), -(-image_size[1] // patch[1])


def _skew(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """How far the places of a grid are from square: 0 is square."""
    return abs(math.log(image_size[0] / grid[0] * grid[1] / image_size[1]))
