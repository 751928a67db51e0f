"""From gradients to channel weights, and the strongest of those."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import (
    FLOATS,
    require_choice,
    require_dtype,
    require_int,
    require_same_device,
    require_shape,
    require_tensor,
)
from gcfast.ops import dispatch
from gcfast.ops.backend import BACKENDS
from gcfast.ops.precision import operation

METHODS = ("gradcam", "gradcam++")
PRECISIONS = ("ieee", "tf32")


@operation
def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
    backend: str = "auto",
) -> Tensor:
    r"""One weight a channel from gradients at a feature map, averaged over the valid triplets.

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
    check_grad_weights(gradients, valid, activations=activations, method=method)
    return dispatch.grad_weights(
        gradients, valid, activations=activations, method=method, backend=backend
    )


@operation
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
) -> Tensor:
    r"""``grad_weights`` in closed form, for a head that is affine in the averaged activations.

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
    check_head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
        precision=precision,
    )
    return dispatch.head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
        precision=precision,
        backend=backend,
    )


@operation
def top_m(weights: Tensor, m: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The m highest weights of each row with their channels, highest first.

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
    check_top_m(weights, m)
    return dispatch.top_m(weights, m, backend=backend)


def check_grad_weights(
    gradients: Tensor, valid: Tensor | None, *, activations: Tensor | None, method: str
) -> None:
    """Raise unless all is as :func:`grad_weights` says."""
    require_dtype("gradients", require_tensor("gradients", gradients), FLOATS)
    sizes = require_shape("gradients", gradients, "B T C H W")
    require_choice("method", method, METHODS)
    _check_valid(valid, sizes)
    if method == "gradcam++":
        if activations is None:
            raise ValueError("`activations` must be given for gradcam++, got None")
        require_dtype("activations", require_tensor("activations", activations), FLOATS)
        require_shape("activations", activations, "B C H W", sizes)
    require_same_device(gradients=gradients, valid=valid, activations=activations)
    if sizes["H"] * sizes["W"] == 0:
        raise ValueError(f"`gradients` must have pixels, got {list(gradients.shape)}")


def check_head_grad_weights(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None,
    *,
    pixels: int,
    embeddings: Tensor | None,
    norms: Tensor | None,
    activation_sums: Tensor | None,
    method: str,
    precision: str,
) -> None:
    """Raise unless all is as :func:`head_grad_weights` says."""
    require_dtype("cotangents", require_tensor("cotangents", cotangents), FLOATS)
    sizes = require_shape("cotangents", cotangents, "B T D")
    require_dtype("weight", require_tensor("weight", weight), FLOATS)
    sizes = require_shape("weight", weight, "D C", sizes)
    require_choice("method", method, METHODS)
    require_choice("precision", precision, PRECISIONS)
    require_int("pixels", pixels, 1)
    _check_valid(valid, sizes)
    if (embeddings is None) != (norms is None):
        raise ValueError("`embeddings` and `norms` must be given together, got one of them")
    if embeddings is not None and norms is not None:
        require_dtype("embeddings", require_tensor("embeddings", embeddings), FLOATS)
        require_dtype("norms", require_tensor("norms", norms), FLOATS)
        require_shape("embeddings", embeddings, "B D", sizes)
        require_shape("norms", norms, "B", sizes)
    if method == "gradcam++":
        if activation_sums is None:
            raise ValueError("`activation_sums` must be given for gradcam++, got None")
        require_dtype("activation_sums", require_tensor("activation_sums", activation_sums), FLOATS)
        require_shape("activation_sums", activation_sums, "B C", sizes)
    require_same_device(
        cotangents=cotangents,
        weight=weight,
        valid=valid,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
    )


def check_top_m(weights: Tensor, m: int) -> None:
    """Raise unless all is as :func:`top_m` says."""
    require_dtype("weights", require_tensor("weights", weights), FLOATS)
    sizes = require_shape("weights", weights, "B C")
    require_int("m", m, 1)
    if m > sizes["C"]:
        raise ValueError(f"`m` must be at most C = {sizes['C']}, got {m}")


def _check_valid(valid: Tensor | None, sizes: dict[str, int]) -> None:
    if valid is not None:
        require_dtype("valid", require_tensor("valid", valid), (torch.bool,))
        require_shape("valid", valid, "B T", sizes)
