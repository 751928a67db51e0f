"""ops.grad_weights beside a backward pass's own averages, one triplet after another."""

import pytest
import torch

from gcfast import ops

B, T, C, P = 4, 50, 256, 7


def one_by_one(gradients: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What a loop over triplets adds up, each as it comes from its backward pass."""
    total = torch.zeros(gradients.shape[0], gradients.shape[2])
    for t in range(gradients.shape[1]):
        total += gradients[:, t].mean((2, 3)) * valid[:, t, None]
    return total / valid.sum(1, keepdim=True)


@pytest.mark.parametrize("side", ["gradcam", "gradcam++", "one by one"])
def test_weights(benchmark, side):
    benchmark.group = f"B = {B}, T = {T}, C = {C}, {P} x {P}, float32"
    torch.manual_seed(0)
    gradients, activations = torch.randn(B, T, C, P, P), torch.rand(B, C, P, P)
    valid = torch.rand(B, T) < 0.9
    if side == "one by one":
        got = benchmark(one_by_one, gradients, valid)
    else:
        got = benchmark(ops.grad_weights, gradients, valid, activations=activations, method=side)
    doubled = (gradients.double(), valid)
    method = "gradcam++" if side == "gradcam++" else "gradcam"
    wanted = ops.grad_weights(*doubled, activations=activations.double(), method=method)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-5)
