"""From channel weights to heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcfast._checks import (
    FLOATS,
    require_choice,
    require_dtype,
    require_ids,
    require_same_device,
    require_shape,
    require_tensor,
)
from gcfast.ops import dispatch
from gcfast.ops.backend import BACKENDS
from gcfast.ops.precision import operation

MAP_DTYPES = (torch.float32, torch.float16, torch.uint8)


@operation
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
) -> Tensor:
    r"""Heat maps from the channel weights of each image's neighbours in the database.

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
    require_choice("backend", backend, BACKENDS)
    sizes = check_sparse_cam(
        activations,
        neighbors,
        channels,
        weights,
        size=size,
        mixing=mixing,
        offsets=offsets,
        center=center,
        relu=relu,
        normalize=normalize,
        grid=grid,
        dtype=dtype,
    )
    require_ids("neighbors", neighbors, -1, sizes["N"])
    if sizes["N"]:
        # Only the rows that are read: the table may be a memory-mapped file of millions of rows.
        require_ids("channels", channels[neighbors.clamp(min=0)], 0, sizes["C"])
    return dispatch.sparse_cam(
        activations,
        neighbors,
        channels,
        weights,
        size=size,
        mixing=mixing,
        offsets=offsets,
        center=center,
        relu=relu,
        normalize=normalize,
        grid=grid,
        dtype=dtype,
        backend=backend,
    )


def check_sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    *,
    size: Sequence[int],
    mixing: Tensor | None,
    offsets: Tensor | None,
    center: float,
    relu: bool,
    normalize: str | None,
    grid: Sequence[int] | None,
    dtype: torch.dtype,
) -> dict[str, int]:
    """The sizes by letter, once all is as it must be but the ids, which are not looked at."""
    require_dtype("activations", require_tensor("activations", activations), FLOATS)
    if activations.ndim == 3:
        sizes = require_shape("activations", activations, "B P C")
        if grid is None or grid[0] * grid[1] != sizes["P"]:
            raise ValueError(f"`grid` must be (H, W) with H W = P = {sizes['P']}, got {grid}")
    else:
        sizes = require_shape("activations", activations, "B C H W")
        if sizes["H"] * sizes["W"] == 0:
            raise ValueError(f"`activations` must have pixels, got {list(activations.shape)}")
    for name, ids in (("neighbors", neighbors), ("channels", channels)):
        require_dtype(name, require_tensor(name, ids), (torch.int64,))
    sizes = require_shape("neighbors", neighbors, "B K", sizes)
    sizes = require_shape("channels", channels, "N M", sizes)
    require_dtype("weights", require_tensor("weights", weights), FLOATS)
    require_shape("weights", weights, "N M", sizes)
    if mixing is not None:
        require_dtype("mixing", require_tensor("mixing", mixing), FLOATS)
        require_shape("mixing", mixing, "B K", sizes)
    if offsets is not None:
        require_dtype("offsets", require_tensor("offsets", offsets), FLOATS)
        require_shape("offsets", offsets, "N", sizes)
    elif center != 0:
        raise ValueError(f"`offsets` must be given when `center` is {center}, got None")
    if not math.isfinite(center):
        raise ValueError(f"`center` must be finite, got {center}")
    require_choice("normalize", normalize, ("max", "minmax", None))
    require_choice("dtype", dtype, MAP_DTYPES)
    if dtype == torch.uint8 and (normalize is None or (not relu and normalize == "max")):
        raise ValueError("`dtype` must be a float for maps outside [0, 1], got torch.uint8")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`size` must be (OH, OW), both at least 1, got {size}")
    require_same_device(
        activations=activations,
        neighbors=neighbors,
        channels=channels,
        weights=weights,
        mixing=mixing,
        offsets=offsets,
    )
    return sizes
