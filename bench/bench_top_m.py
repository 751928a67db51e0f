"""ops.top_m beside torch.topk, which leaves the order of ties open."""

import pytest
import torch

from gcfast import ops

B, M = 256, 50


@pytest.mark.parametrize("side", ["gcfast", "torch.topk"])
@pytest.mark.parametrize("channels", [768, 2048])
def test_strongest(benchmark, channels, side):
    benchmark.group = f"B = {B}, C = {channels}, M = {M}, float32"
    torch.manual_seed(0)
    weights = torch.randn(B, channels)
    wanted = weights.sort(dim=1, descending=True).values[:, :M]
    if side == "gcfast":
        ids, values = benchmark(ops.top_m, weights, M)
    else:
        values, ids = benchmark(torch.topk, weights, M)
    assert torch.equal(values, wanted)
    assert torch.equal(weights.gather(1, ids), wanted)
