"""From gradients to channel weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice
from gcfast.ops._operation import BACKENDS, Outputs, operation
from gcfast.reference import accumulator

METHODS = ("gradcam", "gradcam++")


@operation()
def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
    backend: str = "auto",
) -> Outputs[Tensor]:
    r"""Return one weight a channel from gradients, averaged over the valid triplets.

    Grad-CAM: ``w_k = mean_t mean_ij g[t,k,i,j]``. Grad-CAM++:
    ``w_k = mean_t sum_ij relu(g) / (2 + S_k g)``, ``S_k = max(0, sum_ij A[k,i,j])``.

    Args:
        gradients: [B, T, C, H, W] floating point: dL_t/dA, with the sign of the evidence wanted.
        valid: [B, T] bool, which triplets count; None for all. An image without any gets zeros.
        activations: [B, C, H, W] floating point; needed by Grad-CAM++, ignored by Grad-CAM.
        method: "gradcam" or "gradcam++".
        backend: "auto", "triton" or "reference".

    Returns:
        [B, C] float32 (float64 for float64 gradients). NaN in a valid triplet gives NaN.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, an unknown method, Grad-CAM++ without activations.

    Source: paper, Eq. 1 and 5; Grad-CAM++ arXiv:1710.11063, Eq. 19, without the factor exp(Y).
    """
    require_choice("backend", backend, BACKENDS)
    require_choice("method", method, METHODS)
    sizes = Dimensions()
    sizes.require("gradients", gradients, FLOATS, "B T C H W")
    if valid is not None:
        sizes.require("valid", valid, (torch.bool,), "B T")
    if method == "gradcam++":
        if activations is None:
            raise ValueError("`activations` must be given for gradcam++, got None")
        sizes.require("activations", activations, FLOATS, "B C H W")
    if sizes["H"] * sizes["W"] == 0:
        raise ValueError(f"`gradients` must have pixels, got {list(gradients.shape)}")
    return Outputs(gradients, ((sizes["B"], sizes["C"]), accumulator(gradients)))
