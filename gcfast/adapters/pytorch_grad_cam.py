"""pytorch-grad-cam's call: ``GradCAM`` of classes, and ``EmbeddingGradCAM`` from a database.

Both are its ``BaseCAM`` and finish maps by its functions: min-max with an epsilon of 1e-7 before
the resize and after layers are averaged. So its helpers, metrics and ``aug_smooth`` take them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcfast import Database, Explanation, ops
from gcfast._extras import needs_extra
from gcfast.adapters._explained import explainer_of
from gcfast.explain.direct.gradcam import Weighed, score_network, weighed
from gcfast.ops.precision import full_precision

with needs_extra("pytorch-grad-cam", __name__):
    from pytorch_grad_cam.base_cam import BaseCAM
    from pytorch_grad_cam.utils.image import scale_cam_image

Array = np.ndarray[Any, Any]
Reshape = Callable[[Tensor], Tensor]


class _Front(BaseCAM):  # type: ignore[misc]
    """A ``BaseCAM`` without hooks."""

    # Scripts set it for the peer's methods of many passes. Here one pass takes all images.
    batch_size = 32

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Reshape | None,
    ) -> None:
        super().__init__(model, [], reshape_transform)
        self.target_layers = list(target_layers)

    def forward(
        self, input_tensor: Tensor, targets: Sequence[Any] | None = None, eigen_smooth: bool = False
    ) -> Array:
        if eigen_smooth:
            raise ValueError(
                "`eigen_smooth` must be False, got True: it shows a principal component of the "
                "weighed channels instead of their sum"
            )
        images = input_tensor.to(self.device)
        size = (images.shape[-1], images.shape[-2])  # as OpenCV has it
        layers = [
            scale_cam_image(maps.cpu().numpy(), size)[:, None]
            for maps in self._layer_maps(images, targets)
        ]
        maps: Array = self.aggregate_multi_layers(layers)
        return maps

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Any] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Array:
        maps: Array = super().__call__(input_tensor, targets, aug_smooth, eigen_smooth)
        return maps

    def _layer_maps(self, images: Tensor, targets: Sequence[Any] | None) -> list[Tensor]:
        """Maps [B, H, W] of each layer, at its resolution and not negative; sets ``outputs``."""
        raise NotImplementedError


class GradCAM(_Front):
    """pytorch-grad-cam's ``GradCAM`` without a backward pass through the backbone.

    The arguments and the result are the peer's, as are ``aug_smooth``, several layers, the context
    manager, ``outputs`` and ``device``. ``eigen_smooth`` is refused. No ``.grad`` is touched.

    Where a layer behind the explained one works in place (DenseNet's last ReLU), the peer on a CPU
    explains what is left of the activations; these maps are those of the layer.

    Args:
        model: images [B, channels, h, w] → scores [B, D], or for each pixel. It is set to
            evaluation mode, as by the peer.
        target_layers: modules of the model, whose maps are averaged.
        reshape_transform: from a layer's output to [B, C, H, W]; None also recognizes the tokens
            and channels-last maps of most transformers.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as :class:`gcfast.GradCAM`; here and when
            called.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Reshape | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform)
        if not self.target_layers:
            raise ValueError("`target_layers` must name at least one layer, got none")
        reshape = one_argument(reshape_transform)
        self._networks = [score_network(model, t, reshape=reshape) for t in self.target_layers]
        for network in self._networks:
            network.min_places = 1  # its map is zero, as the peer's

    def _layer_maps(self, images: Tensor, targets: Sequence[Any] | None) -> list[Tensor]:
        images = self._networks[0].checked("input_tensor", images)
        layers, self.outputs = weighed(self._networks, images, targets, "gradcam")
        with torch.no_grad(), full_precision(images.device):
            return [_summed(layer) for layer in layers]


class EmbeddingGradCAM(_Front):
    """pytorch-grad-cam's call for embeddings: the nearest row of a database lends the weights.

    Args:
        model: images → embeddings [B, D], the network that the database was built with.
        target_layers: the database's layer in a list; None or an empty list takes it as well.
        reshape_transform: as it was given to the Explainer.
        database: a :class:`gcfast.Database` or the path of one.
        **settings: of :class:`gcfast.Explainer`, instead of those that are stored.

    Attributes:
        outputs: after a call, the embeddings [B, D].
        explanation: after a call, what the maps rest on.

    Raises:
        TypeError, ValueError, GcfastError: as :func:`gcfast.load`; more than one layer.
    """

    explanation: Explanation | None = None

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        *,
        database: Database | str | os.PathLike[str],
        **settings: Any,
    ) -> None:
        super().__init__(model, target_layers or [], reshape_transform)
        if len(self.target_layers) > 1:
            raise ValueError(
                "`target_layers` must be one layer, the database's, got "
                f"{len(self.target_layers)} of them"
            )
        if self.target_layers:
            settings["layer"] = self.target_layers[0]
        reshape = one_argument(reshape_transform)
        self.explainer = explainer_of(database, model, reshape=reshape, **settings)

    def _layer_maps(self, images: Tensor, targets: Sequence[Any] | None) -> list[Tensor]:
        if targets is not None and any(target is not None for target in targets):
            raise ValueError(
                "`targets` must be None, got some: the nearest row of the database says what is "
                "explained; gcfast.adapters.pytorch_grad_cam.GradCAM explains a score"
            )
        # Scaled to [0, 1] here: the weights of a database are so small that an epsilon shows.
        why = self.explainer.explain_batch(images, details=True, normalize="minmax")
        self.explanation, self.outputs = why, why.embeddings
        return [why.maps]


def one_argument(reshape: Reshape | None) -> Reshape | None:
    """The function with its other arguments left out: in the peer's examples they are a grid."""
    return None if reshape is None else lambda tensor: reshape(tensor)


def _summed(layer: Weighed) -> Tensor:
    size = (layer.activations.shape[2], layer.activations.shape[3])
    return ops.dense_cam(layer.activations, layer.weights, size=size, normalize=None)
