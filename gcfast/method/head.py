"""From cotangents on the embedding to grad-weights: in closed form where the head allows it.

The common head averages the activations over space, maps the average affinely and may normalise
the result. Its gradient is the same at every pixel and needs no autograd (``ops.head_grad_weights``
derives it). Whether a model has such a head is found by probing it: the affine map is the one that
the modules behind the layer make together, or else is read off the model's own gradients, and then
has to reproduce the model's outputs and vector-Jacobian products. Every other head goes through
autograd, from the layer on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcfast import ops
from gcfast.method.pairs import Cotangents
from gcfast.model.capture import Captured
from gcfast.model.network import Network
from gcfast.ops.precision import full_precision

# Largest norm-relative error with which the closed form may reproduce the model, by its precision.
# The worst seen on the tested heads: 4e-7 in float32, 2e-3 in float16, 2e-2 in bfloat16.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PROBE_IMAGES = 2
# Sizes of the activations that the map has to reproduce: the image's own, a relative, and strangers
# of both signs, so that whatever is not affine bends somewhere (a hidden ReLU switches). One more
# is the mean of the last two.
VARIANTS = (1.0, 1.0, -1.0, 6.0, -4.0)
JACOBIAN_BYTES = 2**26  # of the gradients of one batched product
EXACT_TOLERANCE = 1e-8
# What the largest element of a float16 cotangent is scaled to, a row; the gradient of one pixel is
# some thousand times smaller and would be lost below 6e-8. Divided by BACK_OFF where it overflows.
HALF_SCALE = 1024.0
BACK_OFF = 64.0
UNIT_TOLERANCE = 1e-9  # how far norms may differ in float64 to be equal by the model's own doing


def normalized(output: Tensor, l2_normalize: bool) -> Tensor:
    """The model's output as the embedding: float32, divided by its norm where that is wanted."""
    output = output.float()
    if not l2_normalize:
        return output
    # As F.normalize, whose Python takes longer than to launch a kernel.
    norms: Tensor = torch.linalg.vector_norm(output, dim=1, keepdim=True)
    return output / norms.clamp_min(1e-12)


class AffineHead(NamedTuple):
    """u = weight · mean(A) + bias, and f = u / |u| where ``unit``."""

    weight: Tensor  # [D, C] float32
    bias: Tensor  # [D] float32
    unit: bool

    def project(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(f [B, D], |u| [B]) of the pooled activations [B, C]; |u| is 1 where nothing divides."""
        with full_precision(pooled.device):
            raw = pooled @ self.weight.T + self.bias
        if not self.unit:
            return raw, torch.ones_like(raw[:, 0])
        norms = raw.norm(dim=1).clamp(min=1e-12)
        return raw / norms[:, None], norms

    def norms_and_agreement(
        self, pooled: Tensor, embeddings: Tensor, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """|u| [B], and whether the embeddings [B, D] are what this head makes of the pooled maps.

        The latter is a bool tensor without dimensions: nothing here waits for the device.
        """
        projected, norms = self.project(pooled)
        wanted = embeddings.double()
        missed = (projected.double() - wanted).norm(dim=1)
        sizes = wanted.norm(dim=1)
        # Each row by itself, so that one stranger does not hide in a large batch; a row near zero
        # is measured against the others.
        scale = sizes.maximum(sizes.square().mean().sqrt().clamp(min=1e-30))
        return norms, (missed <= TOLERANCES[precision] * scale).all()

    def agrees(self, pooled: Tensor, embeddings: Tensor, precision: torch.dtype) -> bool:
        """Whether the embeddings [B, D] are what this head makes of the pooled activations."""
        return bool(self.norms_and_agreement(pooled, embeddings, precision)[1])

    def grad_weights(
        self,
        parts: Iterable[Cotangents],
        method: str,
        *,
        embeddings: Tensor,
        norms: Tensor,
        pixels: Tensor,
        pooled: Tensor | None,
    ) -> Tensor:
        """Grad-weights [B, C] of the mean over all valid triplets of the parts.

        Args:
            parts: cotangents [B, T, D] with the sign of the evidence, in any number of pieces.
            method: "gradcam" or "gradcam++".
            embeddings: [B, D] float32.
            norms: [B] float32.
            pixels: [B] int64, P of each image's feature map.
            pooled: [B, C] float32, the pooled activations; Grad-CAM++ only.
        """
        # With P = 1 and the mean for the sum, Grad-CAM++ comes out as for any P, in which it
        # cancels; Grad-CAM is divided by its own P. So images of several sizes share one call.
        weights = _mean_of(
            (
                ops.head_grad_weights(
                    part.values,
                    self.weight,
                    part.valid,
                    pixels=1,
                    embeddings=embeddings if self.unit else None,
                    norms=norms if self.unit else None,
                    activation_sums=pooled,
                    method=method,
                ),
                part.valid,
            )
            for part in parts
        )
        return weights / pixels[:, None] if method == "gradcam" else weights


def vjp_grad_weights(
    captured: Captured,
    embeddings: Tensor,
    parts: Iterable[Cotangents],
    method: str,
    network: Network,
) -> Tensor:
    """Grad-weights [B, C] by autograd from the captured layer on, one pass for each triplet.

    Args:
        captured: of :meth:`Network.differentiable`, inside its block.
        embeddings: [B, D], of ``captured.output`` by :func:`normalized`, inside the block.
        parts: cotangents [B, T, D] with the sign of the evidence, in any number of pieces.
        method: "gradcam" or "gradcam++".
        network: whose ``reshape`` the gradients go through.
    """
    activations = captured.activations.detach()

    def triplet_weights(part: Cotangents) -> Tensor:
        total = torch.zeros(activations.shape[:2], device=activations.device)
        for t in range(part.values.shape[1]):
            gradient = vjp(network, captured, embeddings, part.values[:, t])
            weights = ops.grad_weights(
                gradient[:, None], part.valid[:, t : t + 1], activations=activations, method=method
            )
            total += weights
        return total / part.valid.sum(1).clamp(min=1)[:, None]

    return _mean_of((triplet_weights(part), part.valid) for part in parts)


def probe(network: Network, images: Tensor, l2_normalize: bool) -> AffineHead | None:
    """The model's head, if it is the common one: found by its gradients, checked by its outputs.

    Args:
        network: the model, its layer known or not.
        images: [B, 3, h, w], a few real ones on the model's device; the first PROBE_IMAGES are
            used.
        l2_normalize: whether the embedding is normalised after the model.

    Returns:
        The head in float32 on the images' device, or None for any other head, or where the model
        cannot be copied and run in float64.
    """
    images = images[:PROBE_IMAGES]
    generator = torch.Generator().manual_seed(0)
    with network.differentiable(images) as captured:
        precision = captured.output.dtype
        embeddings = normalized(captured.output, l2_normalize)
        cotangent = torch.randn(embeddings.shape, generator=generator).to(embeddings)
        gradient = vjp(network, captured, embeddings, cotangent).float()
        embeddings = embeddings.detach()
        pooled = captured.activations.detach().float().mean((2, 3))
    tolerance = TOLERANCES[precision]
    flat = gradient.mean((2, 3), keepdim=True)
    # Most other heads end here, before anything is copied: their gradient differs between pixels.
    if not _error(gradient, flat.expand_as(gradient)) <= tolerance:
        return None

    head = _from_modules(network, images[:1]) or _from_gradients(network, images[:1])
    if head is None:
        return None
    head = head._replace(unit=head.unit or l2_normalize)
    predicted, norms = head.project(pooled)
    pixels = torch.full((len(images),), gradient[0, 0].numel(), device=images.device)
    weights = head.grad_weights(
        [Cotangents.one_each(cotangent)],
        "gradcam",
        embeddings=predicted,
        norms=norms,
        pixels=pixels,
        pooled=None,
    )
    if not head.agrees(pooled, embeddings, precision):
        return None
    return head if _error(weights, flat[:, :, 0, 0]) <= tolerance else None


def _from_modules(network: Network, image: Tensor) -> AffineHead | None:
    """The affine map that the modules behind the layer make; None where the model does another.

    Args:
        network: the model, its layer known.
        image: [1, 3, h, w].
    """
    with _behind(network) as behind:
        try:
            with network.differentiable(image, replace=_varied(image.dtype)) as captured:
                output = captured.output.detach().double()
                pooled = captured.activations.detach().double().mean((2, 3))
        except Exception:  # whatever the model says to several activations for one image
            return None
    composed = _composed(behind, pooled.shape[1])
    if composed is None or len(output) != len(VARIANTS) + 1:
        return None
    weight, bias = composed
    raw = pooled @ weight.T + bias
    if raw.shape != output.shape:
        return None
    tolerance = TOLERANCES[captured.output.dtype]
    norms = output.norm(dim=1)
    unit = bool((norms - norms[0]).abs().max() < tolerance * norms[0])
    for got, wanted in zip(raw, output, strict=True):
        if unit:
            got, wanted = got / got.norm(), wanted / wanted.norm()
        if not _error(got, wanted) <= tolerance:
            return None
    return AffineHead(weight.float(), bias.float(), unit)


def _composed(modules: Iterable[nn.Module], channels: int) -> tuple[Tensor, Tensor] | None:
    """Weight [D, C] and bias [D] of modules one after the other, float64; None for other kinds."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    for module in modules:
        if not any(True for _ in module.parameters(recurse=False)) and not any(
            True for _ in module.buffers(recurse=False)
        ):
            continue
        step = _affine(module)
        if step is None or step[0].shape[1] != (channels if weight is None else len(weight)):
            return None
        if weight is None or bias is None:
            weight, bias = step
        else:
            weight, bias = step[0] @ weight, step[0] @ bias + step[1]
    if weight is None or bias is None:
        device = next((p.device for m in modules for p in m.parameters()), None)
        weight = torch.eye(channels, dtype=torch.float64, device=device)
        bias = weight.new_zeros(channels)
    return weight, bias


def _affine(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of one module that maps the channels affinely, float64."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None or module.running_var is None:
            return None
        scale = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach().double()
        bias = -module.running_mean.double() * scale
        if module.bias is not None:
            bias = bias + module.bias.detach().double()
        return scale.diag(), bias
    pointwise = isinstance(module, nn.Conv2d) and module.weight.shape[2:] == (1, 1)
    if not (type(module) is nn.Linear or pointwise) or not module.weight.is_floating_point():  # type: ignore[operator]
        return None
    weight = module.weight.detach().double().flatten(1)  # type: ignore[operator]
    if module.bias is None:
        return weight, weight.new_zeros(len(weight))
    return weight, module.bias.detach().double()  # type: ignore[operator]


def _from_gradients(network: Network, image: Tensor) -> AffineHead | None:
    """Weight and bias from a copy of the model with its head in float64; None for other heads.

    Args:
        network: the model, its layer known.
        image: [1, 3, h, w].
    """
    try:
        twin = Network(
            copy.deepcopy(network.model),
            network.layer_name,
            output_key=network.output_key,
            reshape=network.reshape or network.layout,
        )
        _double_behind_the_layer(twin, image)
    except (RuntimeError, TypeError, ValueError, AttributeError, copy.Error):
        return None  # no copy, or no float64: autograd takes this model
    # The backbone is what costs. Most models let one image through it be several behind the layer;
    # one that has counted its images by then does not.
    for copies in (1, len(VARIANTS) + 1):
        try:
            head = _from_jacobian(twin, image.repeat(copies, 1, 1, 1))
        except Exception:
            continue  # whatever the model says to another number of images, or to float64
        if head is not None:
            return head
    return None


def _from_jacobian(twin: Network, images: Tensor) -> AffineHead | None:
    """Weight and bias from the Jacobian at one image.

    A model that normalises its own output hides the part of W along f: at m0, with the free scale
    of (W, b) chosen so that |u| = 1 there, the Jacobian is J = (I - f f^T) W and W = J + f r^T. At
    a second point m1 = m0 + d let t = 1 + r·d, so that u = t f + J d. For v = J d (orthogonal to f)
    the ratio h(m) = <v, f(m)> / <f, f(m)> equals v^T J (m - m0) / (1 + r·(m - m0)), and its
    gradient at m1 gives r = (t v^T J - t^2 grad h) / (v · v).

    Args:
        twin: a copy of the model, float64 behind the layer.
        images: [1 or V, 3, h, w] for V variants, all the same.
    """
    with twin.differentiable(images, replace=_varied(torch.float64)) as captured:
        at = captured.output.detach()
        if len(at) != len(VARIANTS) + 1:
            return None
        if not _keeps_lines(at):
            return None
        norms = at.norm(dim=1)
        unit = bool((norms - norms[0]).abs().max() < UNIT_TOLERANCE * norms[0])
        scale = norms[0] if unit else 1.0
        output, at = captured.output / scale, at / scale  # [variants, D]
        pooled = captured.activations.detach().mean((2, 3))  # [variants, C]
        jacobian = _jacobian(twin, captured, output)
        if unit:
            first, second = at[:2]
            step = pooled[1] - pooled[0]
            v = jacobian @ step
            along, across = second @ first, second @ v
            t = along * (v @ v) / across
            cotangent = torch.zeros_like(at)
            cotangent[1] = v / along - across * first / along.square()
            slope = vjp(twin, captured, output, cotangent)[1].sum((1, 2))
            r = (t * (v @ jacobian) - t.square() * slope) / (v @ v)
            jacobian = jacobian + first[:, None] * r
        bias = at[0] - jacobian @ pooled[0]
    raw = pooled @ jacobian.T + bias
    if not _error(raw / raw.norm(dim=1, keepdim=True) if unit else raw, at) <= EXACT_TOLERANCE:
        return None  # NaN included
    return AffineHead(jacobian.float(), bias.float(), unit)


def _varied(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """From the activation of one image, or of several that are the same, to variants of it."""

    def vary(activation: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (len(VARIANTS), *activation.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise[0] = 0
        sizes = torch.tensor(VARIANTS, dtype=torch.float64)
        factors = sizes.view(-1, *[1] * (noise.ndim - 1)) * (1 + noise)
        # One image, or several that are the same.
        varied = activation[:1].double() * factors.to(activation.device)
        return torch.cat([varied, varied[-2:].mean(0, keepdim=True)]).to(dtype)

    return vary


def _keeps_lines(output: Tensor) -> bool:
    """Whether the last of the outputs [variants, D] is in the plane of the two before it.

    An affine map keeps it there, divided by its norm or not. A head with a hidden nonlinearity
    hardly does, and is known by one product instead of a whole Jacobian.
    """
    plane = torch.linalg.qr(output[-3:-1].T).Q  # [D, 2]
    off = output[-1] - plane @ (plane.T @ output[-1])
    return bool(off.norm() <= EXACT_TOLERANCE * output[-3:].norm())  # NaN included


def _jacobian(twin: Network, captured: Captured, output: Tensor) -> Tensor:
    """The derivative of output[0] by the sum of each channel of the first activation, [D, C]."""
    assert captured.leaf is not None
    columns = output.shape[1]
    step = max(1, JACOBIAN_BYTES // (captured.leaf.numel() * captured.leaf.element_size()))
    parts = []
    for start in range(0, columns, step):
        wanted = torch.arange(start, min(start + step, columns), device=output.device)
        cotangents = output.new_zeros((len(wanted), *output.shape))
        cotangents[torch.arange(len(wanted)), 0, wanted] = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an operation that has to be done one by one
                (gradients,) = torch.autograd.grad(
                    output, captured.leaf, cotangents, retain_graph=True, is_grads_batched=True
                )
            first = twin.arranged(gradients[:, 0], captured.image_size)
        except RuntimeError:  # an operation that takes no batch of gradients
            first = torch.stack([vjp(twin, captured, output, c)[0] for c in cotangents])
        parts.append(first.sum((2, 3)))
    return torch.cat(parts)


@contextmanager
def _behind(network: Network) -> Iterator[list[nn.Module]]:
    """The modules that run after the layer in the passes inside the block, in their order."""
    behind: list[nn.Module] = []
    runs = 0

    def note(module: nn.Module, args: Any) -> None:
        del args
        if runs >= network.layer_run:
            behind.append(module)

    def passing(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal runs
        del module, args, output
        runs += 1

    assert network.layer is not None
    handles = [module.register_forward_pre_hook(note) for module in network.model.modules()]
    handles.append(network.layer.register_forward_hook(passing))
    try:
        yield behind
    finally:
        for handle in handles:
            handle.remove()


def _double_behind_the_layer(twin: Network, image: Tensor) -> None:
    """Turn to float64 what runs after the layer; the backbone, far costlier there, stays as it is.

    Parameters that a module from before the layer holds (the model itself, say) are not found so,
    and then the whole copy is turned.
    """
    with _behind(twin) as behind:
        twin.embed(image)
    for module in behind:
        module.double()
    for module in twin.model.modules():
        holds_layer = module is not twin.layer and twin.layer in set(module.modules())
        if holds_layer and any(True for _ in module.parameters(recurse=False)):
            twin.model.double()
            return


def vjp(network: Network, captured: Captured, output: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent [B, D] of the output pulled back to the layer, [B, C, H, W]."""
    assert captured.leaf is not None
    if captured.leaf.dtype == torch.float16:
        gradient = _half_vjp(captured.leaf, output, cotangent)
    else:
        (gradient,) = torch.autograd.grad(
            output,
            captured.leaf,
            cotangent.to(output.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        if gradient is None:
            raise network.without_gradient()
    return network.arranged(gradient, captured.image_size)


def _half_vjp(leaf: Tensor, output: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient in float32, each row scaled through float16 so that it keeps its digits."""
    cotangent = cotangent.float()
    peaks = cotangent.abs().flatten(1).amax(1)
    scales = torch.where(peaks > 0, HALF_SCALE / peaks, 1.0)
    while True:
        scaled = (cotangent * scales.view(-1, *[1] * (cotangent.ndim - 1))).to(output.dtype)
        (gradient,) = torch.autograd.grad(output, leaf, scaled, retain_graph=True)
        bad = ~torch.isfinite(gradient).flatten(1).all(1)
        if not bool((bad & (scales * peaks > 1)).any()):
            return gradient.float() / scales.view(-1, *[1] * (gradient.ndim - 1))
        scales = torch.where(bad, scales / BACK_OFF, scales)


def _mean_of(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all valid triplets from the means [B, C] and validity [B, T] of each part."""
    total: Tensor | None = None
    used: Tensor | None = None
    for mean, valid in parts:
        count = valid.sum(1)
        if total is None or used is None:
            total, used = mean.double() * count[:, None], count
        else:
            total, used = total + mean.double() * count[:, None], used + count
    assert total is not None
    assert used is not None
    return (total / used.clamp(min=1)[:, None]).float()


def _error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| over everything; NaN compares as unequal."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
