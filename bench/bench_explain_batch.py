"""Latency of explain_batch beside the forward pass it rests on; the demonstration's network."""

import pytest
import torch
from subjects import loader

import gcfast
from gcfast.demo.network import load_network


@pytest.fixture(scope="module")
def explainer() -> gcfast.Explainer:
    made = gcfast.Explainer(load_network())
    made.build(
        [(images[..., :128, :128].sigmoid(), labels) for images, labels in loader(64, 32, 8)]
    )
    return made


@pytest.mark.parametrize("side", ["explain_batch", "forward"])
@pytest.mark.parametrize("batch", [1, 32])
def test_latency(benchmark, explainer, batch, side):
    benchmark.group = f"B = {batch}, 128 x 128, channels-last"
    images = torch.rand(batch, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        if side == "forward":
            output = benchmark(explainer.network.model, images)
            assert output.shape == (batch, 64)
        else:
            maps = benchmark(explainer.explain_batch, images)
            assert maps.shape == (batch, 128, 128)
            assert torch.equal(maps, explainer.explain_batch(images, details=True).maps)
