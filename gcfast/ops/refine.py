"""From a coarse heat map to a finer one, by what an earlier layer made of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice
from gcfast.ops._operation import BACKENDS, Outputs, operation


@operation()
def refine(maps: Tensor, finer: Tensor, *, backend: str = "auto") -> Outputs[Tensor]:
    r"""Return heat maps at the resolution of an earlier layer's output of the same images.

    With u the map divided by its maximum and resized bilinearly, and the mean m_c and variance s_c
    of each channel x_c over the image's own pixels: ``h_c = sum u^3 x_c / sum u^3``, the channel
    where the map is hot; ``v_c = (h_c - m_c) / (s_c + 0.1 mean_c s_c)``, a diagonal discriminant
    between the hot pixels and all; ``f = relu(sum_c v_c (x_c - m_c))``; the result is
    ``u f / max f``.

    Args:
        maps: [B, h, w] floating point, of any scale; negative values count as 0.
        finer: [B, C, H, W] floating point, any memory format, on the same part of the images.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, H, W] float32 (float64 where an input is), in [0, 1]: zeros for a map without a positive
        value, NaN for one that has NaN or infinity, or whose output in ``finer`` has. A map that is
        the same everywhere, and one whose output is, is only resized. Sums are in float32.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, nothing in a map or an output.

    Source: none; beyond the paper.
    """
    require_choice("backend", backend, BACKENDS)
    sizes = Dimensions()
    sizes.require("maps", maps, FLOATS, "B h w")
    sizes.require("finer", finer, FLOATS, "B C H W")
    for name, tensor in (("maps", maps), ("finer", finer)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"`{name}` must have pixels, got {list(tensor.shape)}")
    is_double = torch.float64 in (maps.dtype, finer.dtype)
    dtype = torch.float64 if is_double else torch.float32
    return Outputs(maps, ((sizes["B"], sizes["H"], sizes["W"]), dtype))
