"""The small network of the demonstration, and the weights that ship with it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("network.safetensors")
CHANNELS = 128
EMBEDDING_SIZE = 64


class BirdNet(nn.Module):
    """Images [B, 3, S, S] in [0, 1] → unit embeddings [B, 64].

    Five convolutions with a total stride of 4, global average pooling, one linear layer. The
    receptive field of the last map ``features`` [B, 128, S/4, S/4] is 31 pixels: a part of a bird
    and its surroundings, not the whole bird, so that a channel can only fire where the part is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _stage(3, 32, stride=2),
            _stage(32, 48, stride=2),
            _stage(48, 64),
            _stage(64, 96, dilation=2),
            # Not normalized, which would move the threshold that a channel was trained to.
            nn.Conv2d(96, CHANNELS, 1),
            nn.ReLU(),
        )
        self.embed = nn.Linear(CHANNELS, EMBEDDING_SIZE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images [B, 3, S, S] float in [0, 1] as [B, 64] of unit length."""
        return F.normalize(self.embed(self.feature_maps(images).mean(dim=(2, 3))), dim=1)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the last feature maps, [B, 128, S/4, S/4], not negative."""
        maps: torch.Tensor = self.features(_scaled(images))
        return maps

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what refines the last feature maps, [B, 32, S/2, S/2], and those maps."""
        finer: torch.Tensor = self.features[0](_scaled(images))
        maps: torch.Tensor = self.features[1:](finer)
        return finer, maps

    def evidence(self, images: torch.Tensor) -> torch.Tensor:
        """Return the last feature maps before their ReLU, [B, 128, S/4, S/4]."""
        maps: torch.Tensor = self.features[:-1](_scaled(images))
        return maps


def _scaled(images: torch.Tensor) -> torch.Tensor:
    return (images - 0.5) * 4.0


def _stage(width_in: int, width_out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(),
    )


def load_network(path: Path = WEIGHTS) -> BirdNet:
    """Load the trained network in eval mode, float32 (the file holds float16)."""
    network = BirdNet()
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    network.load_state_dict(state)
    return network.eval()
