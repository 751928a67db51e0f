"""ops.head_grad_weights beside autograd through the head, which holds a gradient for each pixel."""

import pytest
import torch
import torch.nn.functional as F

from gcfast import ops

B, T, C, D, P = 4, 20, 512, 128, 7


def by_autograd(
    activations: torch.Tensor, weight: torch.Tensor, cotangents: torch.Tensor, method: str
) -> torch.Tensor:
    """A backward pass through pooling, linear layer and norm for each triplet."""
    leaf = activations.clone().requires_grad_()
    embeddings = F.normalize(leaf.mean((2, 3)) @ weight.T, dim=1)
    gradients = [
        torch.autograd.grad(embeddings, leaf, cotangents[:, t], retain_graph=True)[0]
        for t in range(cotangents.shape[1])
    ]
    return ops.grad_weights(torch.stack(gradients, 1), activations=activations, method=method)


@pytest.mark.parametrize("side", ["closed form", "autograd"])
@pytest.mark.parametrize("method", ops.METHODS)
def test_weights(benchmark, method, side):
    benchmark.group = f"{method}, B = {B}, T = {T}, C = {C}, D = {D}, {P} x {P}, float32"
    torch.manual_seed(0)
    activations = torch.rand(B, C, P, P)
    weight, cotangents = torch.randn(D, C) / C**0.5, torch.randn(B, T, D)
    raw = activations.mean((2, 3)) @ weight.T
    if side == "autograd":
        got = benchmark(by_autograd, activations, weight, cotangents, method)
    else:
        got = benchmark(
            ops.head_grad_weights,
            cotangents,
            weight,
            pixels=P * P,
            embeddings=F.normalize(raw, dim=1),
            norms=raw.norm(dim=1),
            activation_sums=activations.sum((2, 3)),
            method=method,
        )
    wanted = by_autograd(activations.double(), weight.double(), cotangents.double(), method)
    error = (got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < 1e-5
