"""Small embedding networks that the tests explain, and pictures for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 12
DIM = 6


class Backbone(nn.Module):
    """Two convolutions: [B, 3, h, w] → [B, C, h / 2, w / 2], not negative."""

    def __init__(self, channels: int = CHANNELS, *, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.last = nn.Conv2d(8, channels, 3, padding=1, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.last(F.relu(self.norm(self.stem(images)))))


class Net(nn.Module):
    """A backbone and any head on its feature maps."""

    def __init__(self, head: nn.Module, *, channels: int = CHANNELS, norm: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(channels, norm=norm)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Pool(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


class MaxPool(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.amax((2, 3))


class GeM(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


class Normalize(nn.Module):
    """x / |x|, times a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=1)


class Lambda(nn.Module):
    """A function as a module, for one test's odd forward pass."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object) -> object:
        return self.function(*args)


def _bn_neck(channels: int) -> nn.Module:
    neck = nn.BatchNorm1d(DIM)
    with torch.no_grad():
        neck.running_mean.uniform_(-0.2, 0.2)
        neck.running_var.uniform_(0.5, 2)
        neck.weight.uniform_(0.5, 2)
        neck.bias.uniform_(-0.2, 0.2)
    return nn.Sequential(Pool(), nn.Linear(channels, DIM), neck)


# Heads of the closed form, [B, C, H, W] → [B, D].
AFFINE_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM)),
    "no bias": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM, bias=False)),
    "identity": lambda _: Pool(),
    "two linears": lambda c: nn.Sequential(Pool(), nn.Linear(c, 9), nn.Linear(9, DIM)),
    "bn neck": _bn_neck,
    "normalising": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM), Normalize()),
    "normalising, scaled": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM), Normalize(16.0)),
    "conv 1x1": lambda c: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, DIM, 1), nn.Flatten()
    ),
    "conv then pool": lambda c: nn.Sequential(nn.Conv2d(c, DIM, 1), Pool()),
    "dropout": lambda c: nn.Sequential(Pool(), nn.Dropout(0.5), nn.Linear(c, DIM)),
}

# Heads that only autograd can go through.
OTHER_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "gem": lambda c: nn.Sequential(GeM(), nn.Linear(c, DIM)),
    "max": lambda c: nn.Sequential(MaxPool(), nn.Linear(c, DIM)),
    "mlp": lambda c: nn.Sequential(Pool(), nn.Linear(c, 9), nn.ReLU(), nn.Linear(9, DIM)),
    "relu last": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM), nn.ReLU()),
    "relu before pool": lambda c: nn.Sequential(nn.Conv2d(c, DIM, 1), nn.ReLU(), Pool()),
    "flatten": lambda c: nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, DIM)
    ),
    "tanh": lambda c: nn.Sequential(Pool(), nn.Linear(c, DIM), nn.Tanh()),
}


class TokenNet(nn.Module):
    """A transformer block on 4 x 4 patches behind a class token: [B, 3, 8, 8] → [B, D]."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.first = nn.Linear(channels, channels)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.last = nn.Linear(channels, DIM)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1)
        tokens = self.first(tokens)  # [B, 17, C]
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.last((tokens + mixed)[:, 0])


def common(channels: int = CHANNELS, *, norm: bool = False) -> Net:
    """The common head: pooling and a linear layer."""
    return Net(AFFINE_HEADS["linear"](channels), channels=channels, norm=norm)


def other(channels: int = CHANNELS) -> Net:
    """A head that needs autograd."""
    return Net(OTHER_HEADS["mlp"](channels), channels=channels)


def pictures(count: int, classes: int = 3, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, h, w] of classes that differ, overlapping; labels [count] int64."""
    labels = torch.arange(count) % classes
    colours = torch.randn(classes, 3, 1, 1)
    return colours[labels] + torch.randn(count, 3, *size), labels


def loader(
    images: Tensor, labels: Tensor | list[str] | list[int], batch: int = 5
) -> list[tuple[Tensor, Tensor | list[str] | list[int]]]:
    """(images, labels) in batches."""
    return [(images[i : i + batch], labels[i : i + batch]) for i in range(0, len(images), batch)]
