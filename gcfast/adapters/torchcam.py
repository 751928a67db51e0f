"""torch-cam's extractor for embeddings: hooks on the model, then ``cam(scores=embeddings)``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import Database, Explanation
from gcfast._extras import needs_extra
from gcfast.adapters._explained import coarse_explainer, layer_maps

with needs_extra("torchcam", __name__):
    from torchcam.methods.core import _CAM


class EmbeddingGradCAM(_CAM):  # type: ignore[misc]
    """torch-cam's call for embeddings: the nearest row of a database lends the weights.

    As with the peer's extractors the model is run by the caller, in evaluation mode. No gradient is
    needed, so it may run under ``torch.inference_mode``. The peer normalizes maps (min-max, with an
    epsilon of 1e-8), fuses and overlays them.

    Args:
        model: images → embeddings [B, D], the network that the database was built with.
        target_layer: the database's layer, which None takes.
        input_shape: not used, as the layer is known.
        enable_hooks: as the peer's.
        reshape_transform: from the layer's output to [B, C, H, W].
        database: a :class:`gcfast.Database` or the path of one.
        center: as in :class:`gcfast.explain.result.MapOptions`.
        **settings: of :class:`gcfast.Explainer`, instead of those that are stored.

    Attributes:
        explanation: after a call, what the maps rest on.

    Raises:
        TypeError, ValueError, GcfastError: as :func:`gcfast.load`; more than one layer;
            ``refine``, ``requery`` or a database of method="elementwise".
    """

    explanation: Explanation | None = None

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        database: Database | str | os.PathLike[str],
        center: float = 0.0,
        **settings: Any,
    ) -> None:
        layers = target_layer if isinstance(target_layer, list) else [target_layer]
        if len(layers) != 1:
            raise ValueError(
                f"`target_layer` must be one layer, the database's, got {len(layers)} of them"
            )
        self.explainer = coarse_explainer(
            database, model, layer=layers[0], reshape=reshape_transform, **settings
        )
        self.center = center
        layer = self.explainer.network.layer
        super().__init__(model, layer, input_shape, enable_hooks, reshape_transform)

    def _hook_a(self, module: nn.Module, args: Any, output: Tensor, idx: int = 0) -> None:
        super()._hook_a(module, args, output, idx)
        if self._hooks_enabled:  # a copy, since the next layer may work in place
            self.hook_a[idx] = self.hook_a[idx].clone()

    def __call__(
        self,
        class_idx: None = None,
        scores: Tensor | None = None,
        normalized: bool = True,
        *,
        targets: None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Return maps of the batch that the model has just seen.

        Args:
            class_idx: None.
            scores: [B, D], what the model returned for it.
            normalized: min-max to [0, 1), as by the peer. Without it an image's weights are scaled
                so that the largest is 1.
            targets: None.
            **kwargs: none.

        Returns:
            One tensor [B, H, W] in a list, at the layer's resolution and not negative.

        Raises:
            AssertionError: the model has not run since the hooks were set.
            TypeError: scores that are no embeddings [B, D].
            ValueError: a class or a target; another B than that of the last batch.
        """
        maps: list[Tensor] = super().__call__(
            class_idx, scores, normalized, targets=targets, **kwargs
        )
        return maps

    def _precheck(self, class_idx: Any, scores: Any = None, targets: Any = None) -> None:
        for name, value in (("class_idx", class_idx), ("targets", targets)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be None, got {value!r}: the nearest row of the database says "
                    "what is explained"
                )
        activations = self.hook_a[0]
        if not isinstance(activations, Tensor):
            raise AssertionError("run the model on images first: its hooks have seen none")
        if activations.ndim != 4:
            raise ValueError(
                "`reshape_transform` must make [B, C, H, W] of the layer's output, got "
                f"{list(activations.shape)}"
            )
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"`scores` must be the model's embeddings [B, D], got {got}")
        if len(scores) != len(activations):
            raise ValueError(
                f"`scores` must be of the last batch, B = {len(activations)}, got {len(scores)}"
            )

    @torch.no_grad()
    def compute_cams(
        self,
        class_idx: None = None,  # noqa: ARG002
        scores: Tensor | None = None,
        normalized: bool = True,
        *,
        targets: None = None,  # noqa: ARG002
    ) -> list[Tensor]:
        """See :meth:`__call__`, which checks the arguments."""
        assert scores is not None
        why = layer_maps(self.explainer, self.hook_a[0], scores, relu=True, center=self.center)
        self.explanation = why
        return [self._normalize(why.maps.clone()) if normalized else why.maps]
