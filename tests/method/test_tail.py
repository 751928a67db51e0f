"""The model behind the layer, on pooled activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import common, pictures
from torch import Tensor, nn

from gcfast.method.tail import Tail, pooled_by
from gcfast.model.network import Network


class GeMNet(nn.Module):
    """A convolution, generalized mean pooling and a linear layer; maps [B, C, H, W] or last."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU())
        self.arrange = nn.Identity()
        self.project = nn.Linear(12, 5)
        self.channels_last = channels_last

    def tail(self, maps: Tensor) -> Tensor:
        return self.project(maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        if self.channels_last:
            maps = self.arrange(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.tail(maps)


def test_pooled_by_hand() -> None:
    activations = torch.tensor([[[[1.0, 3.0]], [[2.0, 6.0]]]]).repeat(2, 1, 1, 1)
    weights = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert pooled_by(activations, weights).tolist() == [[2.5, 5.0], [2.0, 4.0]]


def test_the_common_head_is_a_product() -> None:
    images, _ = pictures(4)
    network = Network(common(), "backbone")
    tail = Tail.make(network, images, True)
    assert tail.head is not None
    captured = network.embed(images)
    whole = pooled_by(captured.activations, torch.ones(captured.activations[:, 0].shape))
    torch.testing.assert_close(tail(whole, images), F.normalize(captured.output, dim=1))


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_any_other_head_sees_the_pooled_value_everywhere(channels_last: bool) -> None:
    images, _ = pictures(4)
    model = GeMNet(channels_last).eval()
    network = Network(model, "arrange" if channels_last else "backbone")
    tail = Tail.make(network, images, True)
    assert tail.head is None
    weights = torch.rand(network.embed(images).activations[:, 0].shape)
    pooled = pooled_by(network.embed(images).activations, weights)
    wanted = F.normalize(model.tail(pooled[:, :, None, None]), dim=1)
    torch.testing.assert_close(tail(pooled, images), wanted)
