"""Rows and maps of transformers, channels-last and GeM networks equal one backward pass a triplet.

What is expected is written out here: one triplet after another through the whole model, its loss
differentiated by ``torch.autograd.grad`` at the layer's output. Each case states the layer and its
layout itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import norm_error
from libraries import library
from networks import DIM, GeM, Net, pictures
from torch import Tensor, nn

import gcfast

CHANNELS = 12
ROWS = 6


class Case(NamedTuple):
    """A network, and what its default layer must be."""

    make: Callable[[], nn.Module]
    layer: str
    maps: Callable[[Tensor], Tensor]  # from the layer's output to [B, C, H, W]
    size: tuple[int, int] = (16, 24)


def tokens(height: int, width: int, prefix: int = 1) -> Callable[[Tensor], Tensor]:
    """From [B, prefix + H W, C] to [B, C, H, W]."""
    return lambda out: out[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


class ClassToken(nn.Module):
    """Patches of 4 x 4, a class token, two blocks; the class token is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.one = nn.TransformerEncoderLayer(CHANNELS, 2, 2 * CHANNELS, 0.0, batch_first=True)
        self.norm = nn.LayerNorm(CHANNELS)
        self.attend = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        found = self.one(torch.cat([self.token.expand(len(images), -1, -1), patches], 1))
        normed = self.norm(found)
        return (found + self.attend(normed, normed, normed, need_weights=False)[0])[:, 0]


class Windows(nn.Module):
    """As Swin: attention within windows of [B, H, W, C], patches merged, a norm, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.merge = nn.Linear(24, CHANNELS, bias=False)
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, DIM)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images).permute(0, 2, 3, 1)
        B, H, W, C = maps.shape
        windows = maps.unflatten(2, (W // 4, 4)).unflatten(1, (H // 4, 4))  # [B, ·, 4, ·, 4, C]
        windows = windows.transpose(2, 3).reshape(-1, 16, C)
        seen = self.attend(windows, windows, windows, need_weights=False)[0]
        seen = seen.reshape(B, H // 4, W // 4, 4, 4, C).transpose(2, 3).reshape(B, H, W, C)
        maps = maps + seen
        merged = maps.unflatten(2, (W // 2, 2)).unflatten(1, (H // 2, 2))
        merged = merged.transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C)
        return self.head(self.norm(self.merge(merged)).mean((1, 2)))


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of timm with random weights, small enough for a test."""

    def make() -> nn.Module:
        library("timm")
        import timm

        return timm.create_model(name, num_classes=0, **settings)  # type: ignore[no-any-return]

    return make


def timm_gem() -> nn.Module:
    """A ResNet of timm with a pooling of its user's."""
    model = of_timm("resnet18")()
    model.global_pool = GeM()
    return model


VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": (32, 48)}
SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 32}
CASES = {
    "class token": Case(ClassToken, "norm", tokens(4, 6)),
    "windows": Case(Windows, "norm", lambda out: out.permute(0, 3, 1, 2)),
    "gem": Case(
        lambda: Net(nn.Sequential(GeM(), nn.Linear(CHANNELS, DIM))), "backbone", lambda o: o
    ),
    "timm class token": Case(
        of_timm("vit_tiny_patch16_224", **VIT), "blocks.2.norm1", tokens(4, 6), (32, 48)
    ),
    "timm swin": Case(
        of_timm("swin_tiny_patch4_window7_224", **SWIN),
        "norm",
        lambda out: out.permute(0, 3, 1, 2),
        (32, 32),
    ),
    "timm gem": Case(timm_gem, "layer4", lambda out: out, (64, 64)),
}


def weights_by_hand(model: nn.Module, case: Case, triplet: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-weights [C] and feature maps [C, H, W] of the first image of [3, 3, h, w]."""
    kept: list[Tensor] = []
    layer = model.get_submodule(case.layer)
    handle = layer.register_forward_hook(lambda _module, _args, out: kept.append(out))
    try:
        anchor, positive, negative = F.normalize(model(triplet), dim=1)
    finally:
        handle.remove()
    loss = (anchor - positive.detach()).square().sum() - (anchor - negative.detach()).square().sum()
    (gradient,) = torch.autograd.grad(loss, kept[0])
    return -case.maps(gradient)[0].mean((1, 2)), case.maps(kept[0].detach())[0]


@pytest.mark.parametrize("name", CASES)
def test_rows_and_maps(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().eval()
    images, _ = pictures(ROWS, size=case.size)
    labels = ["a", "b"] * (ROWS // 2)
    explainer = gcfast.Explainer(
        model, channels="all", triplets="all", objective=gcfast.DistanceDifference()
    )
    database = explainer.build([(images, labels)])
    assert explainer.layer_name == case.layer
    maps = explainer.explain_batch(images, normalize=None, relu=False, size=(8, 12))
    for a in range(ROWS):
        same = [i for i in range(ROWS) if labels[i] == labels[a] and i != a]
        other = [i for i in range(ROWS) if labels[i] != labels[a]]
        found = [weights_by_hand(model, case, images[[a, p, n]]) for p in same for n in other]
        weights, activations = torch.stack([w for w, _ in found]).mean(0), found[0][1]
        row = torch.zeros_like(weights)
        row[database.channels[a]] = database.weights[a]
        assert norm_error(row[None], weights[None]) < 1e-5
        cam = (weights[:, None, None] * activations).sum(0)
        wanted = F.interpolate(cam[None, None], (8, 12), mode="bilinear")[0, 0]
        assert norm_error(maps[a][None], wanted[None]) < 1e-4
