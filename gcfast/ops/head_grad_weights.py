"""From cotangents of the embedding to channel weights, through the common head."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice, require_int
from gcfast.ops._operation import BACKENDS, Outputs, operation
from gcfast.ops.grad_weights import METHODS
from gcfast.reference import accumulator

PRECISIONS = ("ieee", "tf32")


@operation()
def head_grad_weights(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None = None,
    *,
    pixels: int,
    embeddings: Tensor | None = None,
    norms: Tensor | None = None,
    activation_sums: Tensor | None = None,
    method: str = "gradcam",
    precision: str = "ieee",
    backend: str = "auto",
) -> Outputs[Tensor]:
    r"""Return ``grad_weights`` in closed form, for a head that is affine in the mean activations.

    With ``u = W mean(A) + b``, ``f = u / |u|``: ``c' = (c - f <f, c>) / |u|`` and
    ``g_k = (W^T c')_k / P`` at every pixel.

    Args:
        cotangents: [B, T, D] floating point: dL_t/df, with the sign of the evidence wanted.
        weight: [D, C] floating point, W.
        valid: [B, T] bool, which triplets count; None for all. An image without any gets zeros.
        pixels: P = H W of the feature map.
        embeddings: [B, D], f; with ``norms``, or neither where nothing normalises u.
        norms: [B], |u|, positive.
        activation_sums: [B, C], the sum over pixels of A; needed by Grad-CAM++.
        method: "gradcam" or "gradcam++".
        precision: what the product with W may be rounded to on a GPU. "ieee" is float32 throughout;
            "tf32" lets the tensor cores round both factors to 11 significant bits, which moved
            Grad-CAM's weights by 3e-4 and Grad-CAM++'s by 8e-5 of their norm (rounding emulated
            on the CPU, D = 128 and 512). The reference and the CPU are always "ieee".
        backend: "auto", "triton" or "reference".

    Returns:
        [B, C] float32 (float64 for float64 cotangents).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, one of ``embeddings`` and ``norms`` alone, an unknown
            method or precision, Grad-CAM++ without ``activation_sums``.

    Source: paper, Eq. 1, 4 and 5, for the head of its networks.
    """
    require_choice("backend", backend, BACKENDS)
    require_choice("method", method, METHODS)
    require_choice("precision", precision, PRECISIONS)
    require_int("pixels", pixels, 1)
    sizes = Dimensions()
    sizes.require("cotangents", cotangents, FLOATS, "B T D")
    sizes.require("weight", weight, FLOATS, "D C")
    if valid is not None:
        sizes.require("valid", valid, (torch.bool,), "B T")
    if (embeddings is None) != (norms is None):
        raise ValueError("`embeddings` and `norms` must be given together, got one of them")
    if embeddings is not None:
        sizes.require("embeddings", embeddings, FLOATS, "B D")
        sizes.require("norms", norms, FLOATS, "B")
    if method == "gradcam++":
        if activation_sums is None:
            raise ValueError("`activation_sums` must be given for gradcam++, got None")
        sizes.require("activation_sums", activation_sums, FLOATS, "B C")
    return Outputs(cotangents, ((sizes["B"], sizes["C"]), accumulator(cotangents)))
