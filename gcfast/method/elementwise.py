"""Transferred cotangents: the places of an image that move its embedding as its nearest row wants.

A row lends c, the mean of dL/df over its triplets, with the sign of the evidence: D numbers. The
image that is explained pulls c back through its own forward pass, from the embedding to the layer:
G = (df/dA)^T c. Its map is relu(sum_k G_k A_k), gradient times activation place by place
(:func:`gcfast.reference.elementwise_cam`).

Grad-CAM averages G over the places first. Where the head averages the activations that loses
nothing, for G is the same everywhere. Where a class token or attention reads the tokens, some
places count and others do not, and their mean says little of either. Beyond the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.method.head import PROBE_IMAGES, normalized, vjp
from gcfast.model.capture import Captured
from gcfast.model.network import Network
from gcfast.reference import accumulator


def gradients_at_layer(
    network: Network, captured: Captured, cotangents: Tensor, l2_normalize: bool
) -> Tensor:
    """Pull cotangents on the embeddings back to the layer, through the L2 norm.

    Args:
        network: the model.
        captured: of :meth:`Network.differentiable`, also after its block.
        cotangents: [B, D] float32.
        l2_normalize: whether the embedding is normalized after the model.

    Returns:
        [B, C, H, W], float32 where the layer is float16.
    """
    with torch.inference_mode(False), torch.enable_grad():
        embeddings = normalized(captured.output, l2_normalize)
        return vjp(network, captured, embeddings, cotangents)


def summed(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return gradient times activation, summed over the channels: [B, 1, H, W] float32.

    Args:
        activations: [B, C, H, W].
        gradients: the same shape.
    """
    dtype = accumulator(activations, gradients)
    return (activations.detach().to(dtype) * gradients.to(dtype)).sum(1, keepdim=True)


def check_reached(network: Network, images: Tensor, l2_normalize: bool) -> None:
    """Check that a gradient comes from the embedding to the layer's places.

    Args:
        network: the model.
        images: [B, 3, h, w] on its device; the first PROBE_IMAGES are used.
        l2_normalize: whether the embedding is normalized after the model.

    Raises:
        ValueError: none does.
    """
    with network.differentiable(images[:PROBE_IMAGES]) as captured:
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(captured.output.shape, generator=generator)
        cotangents = cotangents.to(captured.output.device)
        gradients = gradients_at_layer(network, captured, cotangents, l2_normalize)
    if not bool(gradients.any()):
        raise ValueError(
            f"the embedding's gradient does not reach the layer {network.layer_name!r} at its "
            "places; take another one (gcfast.layers(model, images) lists them), or check `reshape`"
        )
