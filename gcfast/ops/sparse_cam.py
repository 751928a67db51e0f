"""From channel weights to heat maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice, require_ids
from gcfast.ops._operation import BACKENDS, Outputs, operation

MAP_DTYPES = (torch.float32, torch.float16, torch.uint8)


@operation()
def sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    center: float = 0.0,
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Outputs[Tensor]:
    r"""Return heat maps from the channel weights of each image's neighbours in the database.

    ``relu(sum_k x_k (sum_m w[n_k,m] A[ch[n_k,m]] - center o[n_k]))``, normalised at low resolution,
    then resized bilinearly as ``F.interpolate(mode="bilinear", align_corners=False)``.

    Args:
        activations: [B, C, H, W], any memory format, or tokens [B, P, C] with ``grid``.
        neighbors: [B, K] int64 rows of the table; -1 weighs nothing.
        channels: [N, M] int64, in [0, C).
        weights: [N, M] floating point.
        size: (OH, OW).
        mixing: [B, K] floating point, the weight of each neighbour; None weighs those found
            equally.
        offsets: [N] floating point; needed when ``center`` is not 0.
        center: how much of the rows' offsets to subtract; 0 is the paper.
        relu: drop what is negative (the paper); False keeps signed maps.
        normalize: "max" divides by the largest magnitude, "minmax" scales to [0, 1], None is raw.
            A map that is flat zero (with "minmax": constant) stays zero.
        grid: (H, W) of tokens, H W = P.
        dtype: float32, float16, or uint8 (255 times the map, rounded; needs ``normalize``).
        backend: "auto", "triton" or "reference".

    Returns:
        [B, OH, OW] in ``dtype``, on the device of ``activations``. Sums are in float32.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, an id out of range, an unknown choice.

    Source: paper, Eq. 6 and section 3.3.
    """
    sizes = checked_maps(activations, size, relu, normalize, grid, dtype, backend)
    sizes.require("neighbors", neighbors, (torch.int64,), "B K")
    sizes.require("channels", channels, (torch.int64,), "N M")
    sizes.require("weights", weights, FLOATS, "N M")
    if mixing is not None:
        sizes.require("mixing", mixing, FLOATS, "B K")
    if offsets is not None:
        sizes.require("offsets", offsets, FLOATS, "N")
    elif center != 0:
        raise ValueError(f"`offsets` must be given when `center` is {center}, got None")
    if not math.isfinite(center):
        raise ValueError(f"`center` must be finite, got {center}")

    def check_ids() -> None:
        require_ids("neighbors", neighbors, -1, sizes["N"])
        if sizes["N"]:
            # Only the rows that are read: the table may be a mapped file of millions of rows.
            require_ids("channels", channels[neighbors.clamp(min=0)], 0, sizes["C"])

    return Outputs(activations, ((sizes["B"], *size), dtype), check_values=check_ids)


def checked_maps(
    activations: Tensor,
    size: tuple[int, int],
    relu: bool,
    normalize: str | None,
    grid: tuple[int, int] | None,
    dtype: torch.dtype,
    backend: str,
) -> Dimensions:
    """Check what every operation that makes maps takes, and return the sizes B, C and so on."""
    require_choice("backend", backend, BACKENDS)
    require_choice("normalize", normalize, ("max", "minmax", None))
    require_choice("dtype", dtype, MAP_DTYPES)
    sizes = Dimensions()
    if isinstance(activations, Tensor) and activations.ndim == 3:
        sizes.require("activations", activations, FLOATS, "B P C")
        if grid is None or grid[0] * grid[1] != sizes["P"]:
            raise ValueError(f"`grid` must be (H, W) with H W = P = {sizes['P']}, got {grid}")
    else:
        sizes.require("activations", activations, FLOATS, "B C H W")
        if sizes["H"] * sizes["W"] == 0:
            raise ValueError(f"`activations` must have pixels, got {list(activations.shape)}")
    if dtype == torch.uint8 and (normalize is None or (not relu and normalize == "max")):
        raise ValueError("`dtype` must be a float for maps outside [0, 1], got torch.uint8")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`size` must be (OH, OW), both at least 1, got {size}")
    return sizes
