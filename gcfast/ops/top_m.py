"""The strongest channel weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice, require_int
from gcfast.ops._operation import BACKENDS, Outputs, operation


@operation()
def top_m(weights: Tensor, m: int, *, backend: str = "auto") -> Outputs[tuple[Tensor, Tensor]]:
    """Return the m highest weights of each row with their channels, highest first.

    Ties go to the lower channel. NaN has no place in an order and is refused upstream, where the
    row can be named; here it sorts first.

    Args:
        weights: [B, C] floating point.
        m: M, from 1 to C.
        backend: "auto", "triton" or "reference".

    Returns:
        (channels [B, M] int64, weights [B, M] in the dtype of ``weights``).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, or m outside 1 to C.

    Source: paper, section 3.2 (the 50 highest grad-weights).
    """
    require_choice("backend", backend, BACKENDS)
    require_int("m", m, 1)
    sizes = Dimensions()
    sizes.require("weights", weights, FLOATS, "B C")
    if m > sizes["C"]:
        raise ValueError(f"`m` must be at most C = {sizes['C']}, got {m}")
    shape = (sizes["B"], m)
    return Outputs(weights, (shape, torch.int64), (shape, weights.dtype))
