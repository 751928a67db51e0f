"""Grad-CAM of a classifier's scores, without a backward pass through its backbone.

The graph begins at the layer: what runs before it runs as in inference, and one vector-Jacobian
product through what comes after gives the gradient of all images' targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcfast import ops
from gcfast._checks import require_choice, require_finite_rows, require_ids
from gcfast.explain.maps import on_images
from gcfast.explain.result import Finish, Size
from gcfast.method.head import vjp_grad_weights
from gcfast.method.pairs import Cotangents
from gcfast.model.capture import Captured
from gcfast.model.network import Network
from gcfast.model.tokens import Reshape
from gcfast.ops.grad_weights import METHODS
from gcfast.ops.precision import full_precision

Target = Callable[[Tensor], Tensor]  # an image's own output, [D] or [D, h, w] → one number
Targets = int | Tensor | Sequence[int] | Target | Sequence[Target] | None


class ClassMaps(NamedTuple):
    """Heat maps of class scores and what they are made of, all on the images' device."""

    maps: Tensor  # [B, OH, OW] float32
    outputs: Tensor  # [B, D], the model's own
    weights: Tensor  # [B, C] float32, of the layer's channels


class Weighed(NamedTuple):
    """A layer's activations and the weights of its channels."""

    activations: Tensor  # [B, C, H, W]
    weights: Tensor  # [B, C] float32
    share: tuple[float, float]  # of the images; see Captured


class GradCAM:
    """Explain the scores of a classifier: Grad-CAM, or Grad-CAM++, of any target.

    No database is needed. The maps are those of Grad-CAM by a whole backward pass; the layers
    before the explained one run without a graph, and no ``.grad`` is touched.

    Args:
        model: any ``nn.Module``: images [B, 3, h, w] → scores [B, D], or [B, D, h', w'] for each
            pixel. It is left as it was, and runs in evaluation mode.
        layer: as for :class:`gcfast.Explainer`.
        method: "gradcam" or "gradcam++".
        output_key: as for :class:`gcfast.Explainer`.
        reshape: as for :class:`gcfast.Explainer`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, by its name.
        UnsupportedModelError: a compiled or scripted model.

    Source: Selvaraju et al., ICCV 2017 (arXiv:1610.02391); Grad-CAM++ arXiv:1710.11063, Eq. 19,
    without the factor exp(Y).
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        method: str = "gradcam",
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        require_choice("method", method, METHODS)
        self.method = method
        self.network = score_network(model, layer, output_key=output_key, reshape=reshape)

    def __repr__(self) -> str:
        name = type(self.network.model).__name__
        return f"GradCAM({name}, layer={self.layer_name!r}, method={self.method!r})"

    @property
    def layer_name(self) -> str | None:
        """The layer that is explained; None until the first forward pass has found it."""
        return self.network.layer_name

    @overload
    def __call__(
        self,
        images: Tensor,
        targets: Targets = ...,
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        details: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        images: Tensor,
        targets: Targets = ...,
        *,
        size: Size | None = ...,
        normalize: str | None = ...,
        relu: bool = ...,
        details: Literal[True],
    ) -> ClassMaps: ...

    def __call__(
        self,
        images: Tensor,
        targets: Targets = None,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        details: bool = False,
    ) -> Tensor | ClassMaps:
        """Return heat maps of what speaks for a target.

        Args:
            images: [B, 3, h, w] on the model's device and in its dtype.
            targets: what is explained of each image. None: its highest score. A class number for
                all images, or [B] of them, a tensor, an array or a sequence. A function of an
                image's own output ([D], or [D, h', w']; float32 at least) that gives one number,
                for all images, or a sequence of B functions.
            size: as in :class:`gcfast.explain.result.MapOptions`.
            normalize: as there.
            relu: as there.
            details: return :class:`ClassMaps` instead of the maps alone.

        Returns:
            [B, OH, OW] float32 on the images' device, in [0, 1] by default; zeros where the map has
            no positive value.

        Raises:
            TypeError, ValueError: images or options as :meth:`gcfast.Explainer.explain_batch`;
                targets of another kind or number, a class that there is not, a function that does
                not give one number.
        """
        images = self.network.checked("images", images)
        finish = Finish.checked(images, size=size, normalize=normalize, relu=relu)
        if not images.is_cuda:
            require_finite_rows("images", images)
        (one,), outputs = weighed([self.network], images, targets, self.method)
        with torch.no_grad(), full_precision(images.device):
            maps = on_images(ops.dense_cam, one.share)(
                one.activations, one.weights, **finish.of_dense()
            )
        return ClassMaps(maps, outputs, one.weights) if details else maps


def score_network(model: nn.Module, layer: str | nn.Module | None, **options: Any) -> Network:
    """Return the network of a model that gives scores; options and errors as :class:`Network`."""
    network = Network(model, layer, **options)
    network.scores = True
    return network


def weighed(
    networks: Sequence[Network], images: Tensor, targets: Targets, method: str
) -> tuple[list[Weighed], Tensor]:
    """Weigh the channels of one or several layers by the gradient of the targets, in one pass.

    Args:
        networks: of one model, by :func:`score_network`, at least one.
        images: [B, 3, h, w], checked.
        targets: as for :class:`GradCAM`.
        method: "gradcam" or "gradcam++".

    Returns:
        For each network what its layer gave, and the model's outputs [B, D] or [B, D, h', w'].

    Raises:
        TypeError, ValueError: as :class:`GradCAM`.
    """
    first, *others = networks
    with first.differentiable(images, also=tuple(others)) as captured:
        output = captured.output
        values = cotangents(output.detach(), targets)
        part = Cotangents.one_each(values)

        def of_layer(network: Network, one: Captured) -> Weighed:
            weights = vjp_grad_weights(one, output, [part], method, network)
            return Weighed(one.activations.detach(), weights, one.share)

        layers = zip(networks, (captured, *captured.also), strict=True)
        return [of_layer(network, one) for network, one in layers], output.detach()


def cotangents(output: Tensor, targets: Targets) -> Tensor:
    """Return the gradient of the targets by the output, of the output's shape.

    Args:
        output: [B, D] or [B, D, h', w'], without a graph.
        targets: as for :class:`GradCAM`.

    Raises:
        TypeError, ValueError: as :class:`GradCAM`.
    """
    if output.dtype not in (torch.float32, torch.float64):
        output = output.float()
    B = len(output)
    if targets is None:
        ids = output.argmax(1) if output.ndim == 2 else None
        if ids is None:
            raise ValueError(
                "`targets` must be functions of an image's output where the model gives "
                f"{list(output.shape)}, got None"
            )
        return F.one_hot(ids, output.shape[1]).to(output)
    if isinstance(targets, np.generic | np.ndarray):
        targets = torch.as_tensor(targets)
    one = callable(targets) or isinstance(targets, int)
    one = one or (isinstance(targets, Tensor) and targets.ndim == 0)
    many: Any = targets if not one else [targets] * B
    if not isinstance(many, Tensor | Sequence) or isinstance(many, str):
        raise TypeError(
            "`targets` must be None, class numbers, or functions of an image's output, got "
            f"{type(targets).__name__}"
        )
    if len(many) != B:
        raise ValueError(f"`targets` must be B = {B} of them, got {len(many)}")
    functions = [target for target in many if callable(target)]
    if B and len(functions) == B:
        return _by_functions(output, functions)
    return _of_classes(output, many)


def _of_classes(output: Tensor, numbers: Any) -> Tensor:
    """One-hot rows of class numbers [B]."""
    try:
        ids = torch.as_tensor(numbers, device=output.device)
    except (RuntimeError, TypeError, ValueError):
        ids = None
    if ids is None or ids.ndim != 1 or (ids.numel() and ids.dtype not in _WHOLE):
        kinds = sorted({type(n).__name__ for n in numbers})
        raise TypeError(
            "`targets` must be whole numbers of classes [B], or a function for each image, got "
            f"{' and '.join(kinds)}"
        )
    if output.ndim != 2:
        raise ValueError(
            "`targets` must be functions of an image's output where the model gives "
            f"{list(output.shape)}, got class numbers"
        )
    require_ids("targets", ids, 0, output.shape[1])
    return F.one_hot(ids.long(), output.shape[1]).to(output)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _by_functions(output: Tensor, functions: Sequence[Target]) -> Tensor:
    """The gradient of each function at its row of the output."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = output.clone().requires_grad_()
        values = [function(row) for function, row in zip(functions, leaf, strict=True)]
        for value in values:
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"`targets` must give a tensor of one number each, got {got}")
        total = torch.stack([value.reshape(()) for value in values]).sum()
        if not total.requires_grad:
            raise ValueError("`targets` must depend on the output, got constants")
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient
