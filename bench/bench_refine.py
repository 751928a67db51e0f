"""ops.refine beside the formula as one would write it, for the outputs of two networks."""

import pytest
import torch
import torch.nn.functional as F

from gcfast import ops

SHAPES = {  # of the outputs before 7 x 7: [C, H, W]
    "EfficientNet-Lite0, 14 x 14": (112, 14),
    "EfficientNet-Lite0, 28 x 28": (40, 28),
    "ResNet-50, 14 x 14": (1024, 14),
    "ResNet-50, 28 x 28": (512, 28),
}


def plain(maps, finer):
    u = maps / maps.amax((1, 2), keepdim=True)
    u = F.interpolate(u[:, None], size=finer.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    cubes = u**3
    hot = torch.einsum("bchw,bhw->bc", finer, cubes) / cubes.sum((1, 2))[:, None]
    mean, variance = finer.mean((2, 3)), finer.var((2, 3), unbiased=False)
    v = (hot - mean) / (variance + 0.1 * variance.mean(1, keepdim=True))
    f = torch.einsum("bc,bchw->bhw", v, finer) - (v * mean).sum(1)[:, None, None]
    f = f.clamp(min=0)
    return u * f / f.amax((1, 2), keepdim=True)


@pytest.mark.parametrize("side", ["gcfast", "plain"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_refine(benchmark, shape, memory_format, side):
    benchmark.group = f"{shape}, B = 32, {memory_format}"
    torch.manual_seed(0)
    C, width = SHAPES[shape]
    finer = torch.rand(32, C, width, width).contiguous(memory_format=memory_format)
    maps = torch.rand(32, 7, 7)
    got = benchmark(ops.refine if side == "gcfast" else plain, maps, finer)
    torch.testing.assert_close(got, plain(maps, finer), atol=1e-4, rtol=1e-4)
