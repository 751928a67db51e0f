"""ops.dense_cam beside the sum over all channels as one would write it, and sparse_cam of 50."""

import pytest
import torch
import torch.nn.functional as F

from gcfast import ops

SIZE = (224, 224)
SHAPES = {"ResNet-50": (2048, 7), "EfficientNet-Lite0": (1280, 7), "ViT-B/16": (768, 14)}


def plain(activations, weights):
    cam = torch.einsum("bchw,bc->bhw", activations, weights).clamp(min=0)
    cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    return F.interpolate(cam[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("side", ["gcfast", "plain", "sparse_cam of 50"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_cam(benchmark, shape, memory_format, side):
    benchmark.group = f"{shape}, B = 32, {memory_format}"
    torch.manual_seed(0)
    C, width = SHAPES[shape]
    activations = torch.rand(32, C, width, width).contiguous(memory_format=memory_format)
    weights = torch.randn(32, C)
    if side == "sparse_cam of 50":
        rows, (kept, channels) = torch.arange(32)[:, None], weights.topk(50)
        benchmark(ops.sparse_cam, activations, rows, channels, kept, size=SIZE)
        return
    call = plain if side == "plain" else lambda a, w: ops.dense_cam(a, w, size=SIZE)
    got = benchmark(call, activations, weights)
    torch.testing.assert_close(got, plain(activations, weights), atol=1e-5, rtol=1e-4)
