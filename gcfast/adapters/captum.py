"""captum's call: ``LayerGradCam`` of classes, and ``EmbeddingLayerGradCam`` from a database."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import Database, Explanation, UnsupportedModelError, ops
from gcfast._extras import needs_extra
from gcfast.adapters._explained import coarse_explainer, layer_maps
from gcfast.explain.direct.gradcam import Targets, score_network, weighed
from gcfast.model.network import Network
from gcfast.ops.precision import full_precision

with needs_extra("captum", __name__):
    from captum.attr import LayerAttribution
    from captum.attr import LayerGradCam as PeerLayerGradCam


class LayerGradCam(PeerLayerGradCam):  # type: ignore[misc]
    """captum's ``LayerGradCam`` with a graph that begins at the layer, which saves its memory.

    That is so where a module in evaluation mode is given one batch of images and a target that
    selects a score, and its layer gives maps. Whatever else captum takes (several inputs, further
    arguments, a layer's input, sums that are not wanted, a model in training mode) goes through
    captum itself.

    Args and results are the peer's.
    """

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return Grad-CAM of the target at the layer, [B, 1, H, W], signed; see the peer's."""
        plain = (
            isinstance(inputs, Tensor)
            and inputs.ndim == 4
            and isinstance(self.forward_func, nn.Module)
            and not any(module.training for module in self.forward_func.modules())
            and additional_forward_args is None
            and not attribute_to_layer_input
            and attr_dim_summation
            and not grad_kwargs
        )
        maps = self._plain(inputs, target, relu_attributions) if plain else None  # type: ignore[arg-type]
        if maps is not None:
            return maps
        result: Tensor | tuple[Tensor, ...] = super().attribute(
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            relu_attributions,
            attr_dim_summation,
            grad_kwargs,
        )
        return result

    @cached_property
    def _network(self) -> Network | None:
        try:
            network = score_network(self.forward_func, self.layer)
        except (TypeError, ValueError, UnsupportedModelError):
            return None
        network.min_places = 1
        return network

    def _plain(self, images: Tensor, target: Any, relu: bool) -> Tensor | None:
        """The maps, or None where captum has to see to them, or to say what is wrong."""
        network = self._network
        if network is None:
            return None
        try:
            images = network.checked("inputs", images).detach()
            (one,), _ = weighed([network], images, _targets(target), "gradcam")
        except (IndexError, TypeError, ValueError, UnsupportedModelError):
            return None
        size = (one.activations.shape[2], one.activations.shape[3])
        with torch.no_grad(), full_precision(images.device):
            maps = ops.dense_cam(one.activations, one.weights, size=size, relu=relu, normalize=None)
        return maps[:, None]


class EmbeddingLayerGradCam(LayerAttribution):  # type: ignore[misc]
    """captum's call for embeddings: the nearest row of a database lends the weights.

    The maps are signed and have the layer's resolution, as the peer's:
    ``LayerAttribution.interpolate`` and ``captum.attr.visualization`` take them.

    Args:
        forward_func: a module, images → embeddings [B, D]: the network that the database was built
            with.
        layer: the database's layer, which None takes.
        device_ids: not used: a model in ``DataParallel`` runs on the device of its module.
        database: a :class:`gcfast.Database` or the path of one.
        center: as in :class:`gcfast.explain.result.MapOptions`.
        **settings: of :class:`gcfast.Explainer`, instead of those that are stored.

    Attributes:
        explanation: after a call, what the maps rest on.

    Raises:
        TypeError, ValueError, GcfastError: as :func:`gcfast.load`; ``refine``, ``requery`` or a
            database of method="elementwise".
    """

    explanation: Explanation | None = None

    def __init__(
        self,
        forward_func: nn.Module,
        layer: nn.Module | str | None = None,
        device_ids: list[int] | None = None,
        *,
        database: Database | str | os.PathLike[str],
        center: float = 0.0,
        **settings: Any,
    ) -> None:
        self.explainer = coarse_explainer(database, forward_func, layer=layer, **settings)
        self.center = center
        super().__init__(forward_func, self.explainer.network.layer, device_ids)

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: activations are multiplied by weights, not inputs by gradients."""
        return False

    def attribute(
        self,
        inputs: Tensor,
        target: None = None,
        additional_forward_args: None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: None = None,
    ) -> Tensor:
        """Return what speaks for an image's nearest row.

        Args:
            inputs: [B, 3, h, w] on the model's device and in its dtype.
            target: None.
            additional_forward_args: None.
            attribute_to_layer_input: False.
            relu_attributions: keep what is positive.
            attr_dim_summation: True.
            grad_kwargs: None.

        Returns:
            [B, 1, H, W] float32, signed, at the layer's resolution. An image's weights are scaled
            so that the largest is 1.

        Raises:
            TypeError, ValueError: images as :meth:`gcfast.Explainer.explain_batch`; another value
                of an argument that has one.
        """
        given: list[tuple[str, Any, Any]] = [
            ("target", target, None),
            ("additional_forward_args", additional_forward_args, None),
            ("attribute_to_layer_input", attribute_to_layer_input, False),
            ("attr_dim_summation", attr_dim_summation, True),
            ("grad_kwargs", grad_kwargs, None),
        ]
        for name, value, only in given:
            if value is not only:
                raise ValueError(
                    f"`{name}` must be {only} with a database, got {value!r}: its nearest row "
                    "weighs the channels of the layer's output"
                )
        network = self.explainer.network
        captured = network.embed(network.checked("inputs", inputs))
        self.explanation = layer_maps(
            self.explainer,
            captured.activations,
            captured.output,
            relu=relu_attributions,
            center=self.center,
        )
        return self.explanation.maps[:, None]


def _targets(target: Any) -> Targets:
    """Captum's target as class numbers, or as functions of an image's output."""
    if isinstance(target, Tensor):
        target = target.tolist() if target.numel() > 1 else int(target)
    if target is None:
        return _only
    if isinstance(target, tuple):
        return _selects(target)
    if isinstance(target, list):
        return [_selects(one) if isinstance(one, tuple) else one for one in target]
    return target  # type: ignore[no-any-return]


def _only(row: Tensor) -> Tensor:
    return row.squeeze()


def _selects(place: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda row: row[place]
