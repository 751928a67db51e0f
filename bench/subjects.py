"""The networks and databases that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gcfast

EMBEDDING = 128


class ResNet50(nn.Module):
    """Hugging Face's ResNet-50 (He et al. 2015), random weights, with a linear layer to D = 128."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        self.backbone = ResNetModel(ResNetConfig())
        self.project = nn.Linear(2048, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.backbone(images).pooler_output.flatten(1))


class ViTB16(nn.Module):
    """Hugging Face's ViT-B/16 (Dosovitskiy et al. 2020), random weights, averaged patches to 128.

    What is explained is the last layer norm, whose patch tokens the embedding is made of.
    """

    reshape = gcfast.TokenGrid(prefix=1)

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        self.backbone = ViTModel(ViTConfig(), add_pooling_layer=False)
        self.project = nn.Linear(768, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images).last_hidden_state[:, 1:]
        return self.project(tokens.mean(1))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a random linear layer to D = 128."""
    from scenes_network import SceneNetwork

    return SceneNetwork()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "efficientnet-lite0": (efficientnet_lite0, "head"),
    "resnet50": (ResNet50, "backbone.encoder"),
    "vit-b16": (ViTB16, "backbone.layernorm"),
}
CONVOLUTIONAL = ("efficientnet-lite0", "resnet50")


def network(name: str) -> tuple[nn.Module, str]:
    """(network in eval mode, the name of its last convolutional layer)."""
    torch.manual_seed(0)
    make, layer = NETWORKS[name]
    return make().eval(), layer


def images(count: int, seed: int = 0, side: int = 224) -> Tensor:
    """Random images [count, 3, side, side]; a convolution's time does not depend on its values."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def loader(count: int, batch: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of random images, each class with a mean of its own, and labels."""
    batches = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        labels = torch.arange(start, start + size) % classes
        shift = torch.linspace(-1, 1, classes)[labels]
        batches.append((images(size, seed=start) + shift[:, None, None, None], labels))
    return batches


def explainer_with_rows(
    model: nn.Module, layer: str, rows: int, **settings: Any
) -> gcfast.Explainer:
    """An explainer whose database was built on 64 images and filled up to N rows.

    The rows beyond the built ones repeat their channels and weights under embeddings moved at
    random, so that search and gather have N different rows to deal with.
    """
    reshape = getattr(model, "reshape", None)
    explainer = gcfast.Explainer(model, layer, reshape=reshape, **settings)
    built = explainer.build(loader(64, 32, 8))
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(built), (rows,), generator=generator)
    noise = 0.05 * torch.randn((rows, built.dim), generator=generator)
    tensors = {
        name: getattr(built, name)[pick]
        for name in ("channels", "weights", "offsets", "labels", "triplet_counts")
    }
    tensors["embeddings"] = torch.nn.functional.normalize(built.embeddings[pick] + noise, dim=1)
    ids = [str(i) for i in range(rows)]
    explainer.database = gcfast.Database(tensors, ids, built.manifest, classes=built.classes)
    return explainer
