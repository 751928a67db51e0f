"""The model behind the explained layer, on pooled activations: a second embedding of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.method.head import AffineHead, normalized, probe
from gcfast.model.network import Network
from gcfast.model.tokens import ChannelsLast


def pooled_by(activations: Tensor, weights: Tensor) -> Tensor:
    """Average activations over space by weights: [B, C, H, W] and [B, H, W] ≥ 0 → [B, C] float32.

    Where all weights are 0 the average is the plain one.
    """
    weights = weights.float()
    total = weights.sum((1, 2), keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp(min=1e-30), 1 / weights[0].numel())
    return torch.einsum("bchw,bhw->bc", activations.float(), weights)


@dataclass(frozen=True, eq=False)
class Tail:
    """From pooled activations to embeddings, as the model would make them.

    With the common head (average pooling, an affine map, with or without L2 norm) that is a matrix
    product. With any other head the model runs once more, the layer's output replaced by one that
    has the pooled value at every place.
    """

    network: Network
    head: AffineHead | None
    l2_normalize: bool

    @classmethod
    def make(cls, network: Network, images: Tensor, l2_normalize: bool) -> Tail:
        """Probe the model's head.

        Args:
            network: its layer known.
            images: [B, 3, h, w] on the model's device, a few.
            l2_normalize: whether the embedding is normalized after the model.

        Raises:
            ValueError: tokens, or what a ``reshape`` arranges, before another head than an
                average: pooled vectors cannot stand for them.
        """
        head = probe(network, images, l2_normalize)
        layout = network.reshape or network.layout
        if head is None and not (layout is None or isinstance(layout, ChannelsLast)):
            raise ValueError(
                f"the layer {network.layer_name!r} gives tokens, or is arranged by `reshape`, and "
                "the model does not average them: pooled activations cannot be embedded again"
            )
        return cls(network, head, l2_normalize)

    def __call__(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Embed pooled activations.

        Args:
            pooled: [B, C] float32.
            images: [B, 3, h, w], where they come from.

        Returns:
            [B, D] float32.
        """
        if self.head is not None:
            return self.head.project(pooled)[0]

        def at_every_place(output: Tensor) -> Tensor:
            """The layer's raw output, with the pooled value of each channel at its places."""
            size = (images.shape[2], images.shape[3])
            arranged = self.network.arranged(output, size)
            constant = pooled.to(output.dtype)[:, :, None, None].expand_as(arranged)
            # Channels-last maps are a permutation of the arranged ones.
            return constant if arranged.shape == output.shape else constant.permute(0, 2, 3, 1)

        with self.network.differentiable(images, replace=at_every_place) as captured:
            return normalized(captured.output.detach(), self.l2_normalize)
