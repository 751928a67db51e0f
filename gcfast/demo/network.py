"""The small network of the demonstration, and the weights that ship with it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("network.safetensors")
EMBEDDING_SIZE = 64


class BirdNet(nn.Module):
    """Images [B, 3, S, S] in [0, 1] to unit embeddings [B, 64].

    Five convolutions at a stride of 8 in all, global average pooling, one linear layer. Each place
    of the last map `features` [B, 192, S/8, S/8] sees 63 pixels a side: a part of a bird and what
    it sits on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _stage(3, 24, stride=2),
            _stage(24, 48, stride=2),
            _stage(48, 80, stride=2),
            _stage(80, 112, dilation=2),
            _stage(112, 192),
        )
        self.embed = nn.Linear(192, EMBEDDING_SIZE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images [B, 3, S, S] float in [0, 1]; gives [B, 64] of unit length."""
        return F.normalize(self.embed(self.feature_maps(images).mean(dim=(2, 3))), dim=1)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature maps, [B, 192, S/8, S/8]."""
        maps: torch.Tensor = self.features((images - 0.5) * 4.0)
        return maps


def _stage(width_in: int, width_out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(),
    )


def load_network(path: Path = WEIGHTS) -> BirdNet:
    """The trained network in eval mode, float32 (the file holds float16)."""
    network = BirdNet()
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    network.load_state_dict(state)
    return network.eval()
