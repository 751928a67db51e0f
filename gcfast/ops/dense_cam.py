"""From a weight for every channel to heat maps."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS
from gcfast.ops._operation import Outputs, operation
from gcfast.ops.sparse_cam import checked_maps


@operation()
def dense_cam(
    activations: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Outputs[Tensor]:
    r"""Return heat maps from a weight for every channel of each image.

    ``relu(sum_c w[b,c] A[b,c])``, normalised at low resolution, then resized bilinearly as
    ``F.interpolate(mode="bilinear", align_corners=False)``: ``sparse_cam`` where all channels are
    kept, in their order, without a table to gather from.

    Args:
        activations: [B, C, H, W], any memory format, or tokens [B, P, C] with ``grid``.
        weights: [B, C] floating point.
        size: (OH, OW).
        relu: drop what is negative; False keeps signed maps.
        normalize: "max" divides by the largest magnitude, "minmax" scales to [0, 1], None is raw.
            A map that is flat zero (with "minmax": constant) stays zero.
        grid: (H, W) of tokens, H W = P.
        dtype: float32, float16, or uint8 (255 times the map, rounded; needs ``normalize``).
        backend: "auto", "triton" or "reference".

    Returns:
        [B, OH, OW] in ``dtype``, on the device of ``activations``. Sums are in float32.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, an unknown choice.

    Source: class activation maps, Zhou et al., arXiv:1512.04150.
    """
    sizes = checked_maps(activations, size, relu, normalize, grid, dtype, backend)
    sizes.require("weights", weights, FLOATS, "B C")
    return Outputs(activations, ((sizes["B"], *size), dtype))
