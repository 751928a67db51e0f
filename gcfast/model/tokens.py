"""Feature maps from a transformer's tokens."""

from __future__ import annotations

import math

from torch import Tensor


class TokenGrid:
    """A ``reshape`` for transformers: tokens [B, prefix + H·W, C] → [B, C, H, W].

    Args:
        height: H; None takes a square grid.
        width: W; None takes what is left.
        prefix: tokens before the grid (class token, registers), which are dropped.
    """

    def __init__(
        self, height: int | None = None, width: int | None = None, *, prefix: int = 1
    ) -> None:
        self.height = height
        self.width = width
        self.prefix = prefix

    def __call__(self, tokens: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: another rank, or a number of tokens that does not fill the grid.
        """
        if tokens.ndim != 3:
            raise ValueError(f"tokens must have shape [B, P, C], got {list(tokens.shape)}")
        grid = tokens[:, self.prefix :]
        pixels = grid.shape[1]
        height = self.height or (pixels // self.width if self.width else math.isqrt(pixels))
        width = self.width or (pixels // height if height else 0)
        if height * width != pixels or pixels == 0:
            raise ValueError(
                f"{pixels} tokens after the first {self.prefix} must fill a grid, got "
                f"{height} x {width}; give `height` and `width`"
            )
        return grid.transpose(1, 2).reshape(grid.shape[0], -1, height, width)
