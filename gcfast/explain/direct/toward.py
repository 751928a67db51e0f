"""Maps of what brings images closer to given vectors of the embedding space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gcfast._checks import require_tensor
from gcfast.builder.loader import check_embeddings
from gcfast.explain.direct.own_maps import cotangent_maps, weighted_maps
from gcfast.explain.result import Finish
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.pairs import Cotangents
from gcfast.method.settings import Settings
from gcfast.model.network import Network


def toward_maps(
    network: Network,
    settings: Settings,
    images: Tensor,
    cotangents: Tensor,
    mean_activation: Callable[[], Tensor],
    finish: Finish,
) -> Tensor:
    """Make maps by pulling vectors of the embedding space back to the layer.

    One vector-Jacobian product from the layer on serves every head. The closed form of the common
    one would save little of it (bench/pair_speed.py), and need a probe of the head besides.

    Args:
        network: the model.
        settings: of the explainer; class proxies have the weights of Grad-CAM on every channel.
        images: [B, 3, h, w], checked.
        cotangents: see :meth:`gcfast.Explainer.explain_toward`.
        mean_activation: gives [C], which ``center`` needs.
        finish: how the maps are finished.

    Returns:
        [B, OH, OW] float32.

    Raises:
        TypeError, ValueError: cotangents of another kind, shape or device, or not finite; NaN or
            infinity in the images or their embeddings, with the row.
    """
    cotangents = checked_vectors("cotangents", cotangents, images)
    mean = mean_activation() if finish.center != 0 else None
    if len(images) == 0:
        return images.new_zeros((0, *finish.size), dtype=torch.float32)
    with network.differentiable(images, finer=True) as captured:
        embeddings = normalized(captured.output, settings.l2_normalize)
        check_embeddings(embeddings.detach(), images)
        require_width("cotangents", cotangents, embeddings)
        method = "gradcam" if settings.is_proxy else settings.method
        cotangents = cotangents.expand(embeddings.shape)
        if settings.is_elementwise:
            return cotangent_maps(network, captured, cotangents, settings.l2_normalize, finish)
        parts = [Cotangents.one_each(cotangents)]
        weights = vjp_grad_weights(captured, embeddings, parts, method, network)
    return weighted_maps(captured, weights, settings, finish, mean)


def checked_vectors(name: str, vectors: object, images: Tensor) -> Tensor:
    """Return vectors [D] or [B, D] of the embedding space in float32, if they are finite.

    Raises:
        TypeError, ValueError: another kind, dtype, B or device than the images', NaN or infinity.
    """
    vectors = require_tensor(name, vectors)
    if not vectors.is_floating_point():
        got = str(vectors.dtype).removeprefix("torch.")
        raise TypeError(f"`{name}` must be floating point, got {got}")
    if vectors.ndim not in (1, 2) or (vectors.ndim == 2 and len(vectors) != len(images)):
        raise ValueError(
            f"`{name}` must have shape [D] or [B, D] with B = {len(images)}, got "
            f"{list(vectors.shape)}"
        )
    if vectors.device != images.device:
        raise ValueError(
            f"`{name}` must be on the images' device, {images.device}, got {vectors.device}"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity")
    return vectors.detach().float()


def require_width(name: str, vectors: Tensor, embeddings: Tensor) -> None:
    """Raise ValueError unless vectors are of the embedding's D."""
    if vectors.shape[-1] != embeddings.shape[1]:
        raise ValueError(
            f"`{name}` must have shape [D] or [B, D] with D = {embeddings.shape[1]}, the "
            f"embedding's, got {list(vectors.shape)}"
        )
