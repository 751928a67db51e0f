"""ops.sparse_cam beside a dense weighted sum over all channels with the same finish."""

import pytest
import torch
import torch.nn.functional as F

from gcfast import ops

N, M, SIZE = 10_000, 50, (224, 224)


def dense(activations, rows, channels, weights):
    full = torch.zeros(activations.shape[:2])
    full.scatter_(1, channels[rows], weights[rows])
    cam = torch.einsum("bchw,bc->bhw", activations, full).clamp(min=0)
    cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    return F.interpolate(cam[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("side", ["gcfast", "dense"])
@pytest.mark.parametrize("batch", [1, 32])
def test_maps(benchmark, batch, side):
    benchmark.group = f"B = {batch}, C = 2048, 7 x 7, M = {M}, to 224 x 224"
    torch.manual_seed(0)
    activations = torch.rand(batch, 2048, 7, 7).contiguous(memory_format=torch.channels_last)
    channels = torch.rand(N, 2048).argsort(1)[:, :M].contiguous()
    weights, rows = torch.randn(N, M), torch.randint(N, (batch,))
    wanted = dense(activations, rows, channels, weights)
    if side == "gcfast":
        got = benchmark(ops.sparse_cam, activations, rows[:, None], channels, weights, size=SIZE)
    else:
        got = benchmark(dense, activations, rows, channels, weights)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
