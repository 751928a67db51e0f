"""Which layer is explained by default, and in which layout, for every kind of network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import CHANNELS, DIM, Lambda, Net, Pool, TokenNet, common, other, pictures
from torch import Tensor, nn

import gcfast
from gcfast.model.layers import candidates, default_of, layout_of
from gcfast.model.network import Network
from gcfast.model.tokens import ChannelsLast, TokenGrid, patch_of

PATCH = 4


class Block(nn.Module):
    """A transformer's block, as timm and transformers write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, dim=-1)
        tokens = tokens + self.proj(F.scaled_dot_product_attention(q, k, v))
        return tokens + self.mlp(self.norm2(tokens))


class Vit(nn.Module):
    """Patches, tokens before them, blocks, a norm; the class token or the mean is the embedding."""

    def __init__(self, pool: str = "class", prefix: int = 1, *, conv: bool = True) -> None:
        super().__init__()
        width, self.pool, self.prefix, self.conv = 16, pool, prefix, conv
        self.patch = nn.Conv2d(3, width, PATCH, PATCH) if conv else nn.Linear(3 * PATCH**2, width)
        self.extra = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIM)

    def forward(self, images: Tensor) -> Tensor:
        if self.conv:
            tokens = self.patch(images).flatten(2).transpose(1, 2)
        else:
            tokens = self.patch(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2))
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], 1)
        tokens = self.norm(self.blocks(tokens))
        pooled = tokens[:, 0] if self.pool == "class" else tokens[:, self.prefix :].mean(1)
        return self.head(pooled)


class LastChannels(nn.Module):
    """As Swin: [B, H, W, C] from the stem on."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, PATCH, PATCH), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, DIM)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).permute(0, 2, 3, 1)
        return self.head(self.norm(maps + F.gelu(self.block(maps))).mean((1, 2)))


class SharedActivation(nn.Module):
    """One activation for all layers, as networks from before modules were free of charge."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(CHANNELS), nn.ReLU()
        self.head = nn.Linear(CHANNELS, DIM)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.norm(self.two(self.act(self.one(images)))))
        return self.head(maps.mean((2, 3)))


class Residual(nn.Module):
    """A residual sum and an activation that are no modules, and then a module or none."""

    def __init__(self, after: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.after, self.head = nn.BatchNorm2d(8), after, nn.Linear(8, DIM)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        maps = F.relu(maps + self.norm(self.conv(F.relu(maps))))
        return self.head((maps if self.after is None else self.after(maps)).mean((2, 3)))


class Gated(nn.Module):
    """A spatial gate [B, 1, H, W] is the last module of the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU())
        self.gate, self.head = nn.Conv2d(CHANNELS, 1, 1), nn.Linear(CHANNELS, DIM)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        return self.head((maps * torch.sigmoid(self.gate(maps))).mean((2, 3)))


def found(model: nn.Module, size: tuple[int, int] = (32, 32)) -> gcfast.LayerTable:
    return gcfast.layers(model.eval(), torch.rand(3, *size))


@pytest.mark.parametrize(
    ("model", "layer", "layout"),
    [
        (lambda: Vit(), "blocks.2.norm1", "TokenGrid(patch=(4, 4))"),
        (lambda: Vit(prefix=5), "blocks.2.norm1", "TokenGrid(prefix=5, patch=(4, 4))"),
        (lambda: Vit("mean"), "norm", "TokenGrid(patch=(4, 4))"),
        (lambda: Vit("mean", 0), "norm", "TokenGrid(prefix=0, patch=(4, 4))"),
        (lambda: Vit("mean", 4, conv=False), "norm", "TokenGrid(prefix=4, patch=(4, 4))"),
        (LastChannels, "norm", "ChannelsLast()"),
        (SharedActivation, "act@2", "[B, C, H, W]"),
        (lambda: Residual(nn.Identity()), "after", "[B, C, H, W]"),
        (Gated, "body", "[B, C, H, W]"),
        (common, "backbone", "[B, C, H, W]"),
        (other, "backbone", "[B, C, H, W]"),
        (lambda: nn.DataParallel(common()), "backbone", "[B, C, H, W]"),
        (TokenNet, "first", "TokenGrid(patch=(2, 2))"),
    ],
    ids=[
        "class token", "registers", "mean of tokens", "no prefix", "linear patches",
        "channels last", "shared activation", "sum, then a module", "gate",
        "average and linear", "MLP", "data parallel", "no norm",
    ],
)  # fmt: skip
def test_the_default(model: Callable[[], nn.Module], layer: str, layout: str) -> None:
    default = found(model()).default
    assert default is not None
    assert (default.name, default.layout) == (layer, layout)


def test_the_default_is_what_an_explainer_takes() -> None:
    for model in (Vit().eval(), LastChannels().eval(), SharedActivation().eval()):
        default = found(model).default
        assert default is not None
        network = Network(model)
        captured = network.embed(torch.rand(2, 3, 32, 32))
        assert network.layer_name == default.name
        assert captured.activations.shape == (2, default.channels, *default.grid)


def test_the_shared_activations_last_run_is_behind_the_norm() -> None:
    model = SharedActivation().eval()
    with torch.no_grad():
        model.norm.bias.fill_(-0.5)
    images = torch.rand(2, 3, 8, 8)
    wanted = F.relu(model.norm(model.two(F.relu(model.one(images)))))
    torch.testing.assert_close(Network(model).embed(images).activations, wanted.detach())


def test_the_closed_form_is_told() -> None:
    assert [layer.closed_form for layer in found(common()) if layer.default] == [True]
    assert [layer.closed_form for layer in found(other()) if layer.default] == [False]
    assert [layer.closed_form for layer in found(Vit("mean")) if layer.default] == [True]


def test_the_table_says_why_a_later_layer_is_not_the_default() -> None:
    table = found(Vit())
    reasons = {layer.name: layer.why for layer in table}
    assert reasons["norm"] == "the embedding does not depend on its places"
    assert reasons["blocks.2.norm1"].startswith("default")
    assert {layer.name: layer.why for layer in found(Gated())}["gate"] == (
        "the image reaches the embedding past it"
    )
    assert "* blocks.2.norm1" in str(table)
    assert "91%" in str(table) or "parameters" in str(table)


def test_branches_that_no_module_joins_need_a_name() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.left, self.right = nn.Conv2d(4, 32, 3), nn.Conv2d(4, 32, 3)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.stem(images)
            return torch.cat([self.left(maps), self.right(maps)], 1).mean((2, 3))

    for model in (Branches().eval(), Residual(None).eval()):
        assert found(model).default is None
        with pytest.raises(ValueError, match="`layer` must be given: the image reaches the"):
            Network(model).embed(torch.rand(1, 3, 8, 8))


def test_a_model_that_turns_gradients_off_has_a_default() -> None:
    class Off(Net):
        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)

    assert Network(Off(Pool())).embed(pictures(2)[0]).activations.shape[1] == CHANNELS


def test_inference_mode_and_frozen_parameters() -> None:
    model = Vit().eval().requires_grad_(False)
    with torch.inference_mode():
        network = Network(model)
        network.embed(torch.rand(2, 3, 32, 32))
    assert network.layer_name == "blocks.2.norm1"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "module", "wanted"),
    [
        ((1, 16, 7, 7), nn.Identity(), None),
        ((1, 7, 7, 16), nn.Identity(), ChannelsLast),
        ((1, 64, 64, 96), nn.LayerNorm(96), ChannelsLast),
        ((1, 96, 64, 64), nn.BatchNorm2d(96), None),
        ((1, 65, 16), nn.Identity(), TokenGrid),
    ],
    ids=["first", "last", "last by its norm", "first by its norm", "tokens"],
)
def test_layouts(shape: tuple[int, ...], module: nn.Module, wanted: type | None) -> None:
    spatial, layout = layout_of(shape, module, (128, 128))
    assert spatial
    assert layout is None if wanted is None else isinstance(layout, wanted)


@pytest.mark.parametrize(
    ("shape", "module"),
    [
        ((1, 3, 197, 64), nn.LayerNorm(64)),
        ((1, 3, 197, 64), nn.Identity()),
        ((1, 16, 1, 1), nn.Identity()),
        ((1, 3, 16), nn.Identity()),
    ],
    ids=["heads by their norm", "heads", "one place", "too few tokens"],
)
def test_what_does_not_lie_on_the_image(shape: tuple[int, ...], module: nn.Module) -> None:
    assert layout_of(shape, module, (224, 224)) == (False, None)


def test_a_named_layer_is_laid_out_too() -> None:
    images = torch.rand(2, 3, 16, 32)
    captured = Network(LastChannels().eval(), "norm").embed(images)
    assert captured.activations.shape == (2, 16, 4, 8)
    captured = Network(Vit().eval(), "blocks.1").embed(images)
    assert captured.activations.shape == (2, 16, 4, 8)


def test_a_named_layer_that_lies_nowhere_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), Lambda(lambda x: x.reshape(len(x), 2, 64, 4)), Pool()
    )
    with pytest.raises(ValueError, match=r"lies on the image, got '1' with \[1, 2, 64, 4\]"):
        Network(model, "1").embed(torch.rand(1, 3, 32, 32))


def test_a_run_of_a_layer_is_explained_by_its_name() -> None:
    model, images = SharedActivation().eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        Network(model, "act@1").embed(images).activations, F.relu(model.one(images)).detach()
    )
    with pytest.raises(
        gcfast.UnsupportedModelError, match=r"'act', which ran 2 times; 'NAME@2' is its last run"
    ):
        Network(model, "act").embed(images)
    with pytest.raises(gcfast.UnsupportedModelError, match="'act@3', which ran 2 times"):
        Network(model, "act@3").embed(images)


def test_tokens_with_the_batch_second() -> None:
    class Second(TokenNet):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patch(images).flatten(2).permute(2, 0, 1)
            return self.last(self.first(tokens).mean(0))

    model, images = Second().eval(), torch.rand(3, 3, 8, 8)
    captured = Network(model, "first").embed(images)
    wanted = model.first(model.patch(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(captured.activations, wanted.detach())


@pytest.mark.parametrize(
    ("places", "size", "patch"),
    [
        (196, (224, 224), 16),
        (196, (230, 230), 16),
        (144, (144, 256), 16),
        (128, (256, 128), 16),
        (225, (230, 230), 15),
        (7, (224, 224), None),
    ],
)
def test_the_patch_of_so_many_places(places: int, size: tuple[int, int], patch: int | None) -> None:
    assert patch_of(places, size) == (None if patch is None else (patch, patch))


def test_the_gradient_of_every_layer_is_asked_for_in_a_table_alone() -> None:
    model, image = Vit().eval(), torch.rand(1, 3, 32, 32)
    network = Network(model)
    last = candidates(model, image, network.embedding, every=False)
    every = candidates(model, image, network.embedding)
    assert len(last) < len(every)
    assert default_of(last).name == default_of(every).name  # type: ignore[union-attr]
