"""The network of the paper's Table 1: ResNet-50 to D = 128, trained as Wu et al. 2017.

Margin loss with distance-weighted sampling (Wu, Manmatha, Smola and Krähenbühl, "Sampling matters
in deep embedding learning", ICCV 2017, arXiv:1706.07567). The settings below are the defaults of
the authors' example for MXNet (example/gluon/embedding_learning/train.py); the loss and the miner
are pytorch-metric-learning's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gcfast.cli.models import load_model
from gcfast.errors import GcfastError
from gcfast.evaluation.datasets import Sample
from gcfast.images.preprocessing import Preprocessing, decode

EMBEDDING = 128
# Where a ResNet-50 comes from, and its last convolutional layer.
SOURCES = {
    "torchvision/resnet50": "layer4",
    "timm/resnet50": "layer4",
    "hf/microsoft/resnet-50": "encoder.stages.3",
}
TINY = "tiny"


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; the defaults are those of Wu et al.'s example."""

    epochs: int = 20
    steps: int = 200  # batches an epoch
    classes: int = 14  # a batch of 70
    pictures: int = 5  # of each class
    rate: float = 1e-4  # Adam
    backbone_factor: float = 0.01  # of the rate, for what comes with ImageNet weights
    decay: float = 1e-4
    margin: float = 0.2
    beta: float = 1.2
    beta_rate: float = 0.1  # SGD with momentum 0.9, a β for each class
    milestones: tuple[int, ...] = (12, 14, 16, 18)  # epochs after which rates are halved
    resize: int = 256  # the shorter side, of which a square is cut at random


class Embedder(nn.Module):
    """A backbone and a linear layer: images [B, 3, S, S] to embeddings [B, 128], not normalised."""

    def __init__(self, backbone: nn.Module, width: int, output_key: str | int | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_key = output_key
        self.project = nn.Linear(width, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        output = self.backbone(images)
        if self.output_key is not None:
            output = output[self.output_key]
        return self.project(output.flatten(1))


class Tiny(nn.Module):
    """Three convolutions to 64 pooled channels: shows that the script runs."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 16, 5, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).mean((2, 3))


def make_network(backbone: str, weights: Path | None, seed: int) -> tuple[Embedder, str, str]:
    """A network before its training.

    Args:
        backbone: "auto", one of SOURCES, or "tiny". "auto" takes the first of SOURCES whose library
            is installed and whose ImageNet weights can be had.
        weights: a file of ImageNet weights for the backbone, instead of the library's download.
        seed: of the linear layer (and of the tiny network).

    Returns:
        (network, its layer, where it is from).

    Raises:
        GcfastError: none of the sources can be had; what each of them said.
    """
    torch.manual_seed(seed)
    if backbone == TINY:
        return Embedder(Tiny(), 64, None), "backbone.maps", "a tiny network, random weights"
    said = []
    for spec in SOURCES if backbone == "auto" else [backbone]:
        try:
            loaded = load_model(spec, weights)
        except GcfastError as error:
            said.append(f"{spec}: {error}")
            continue
        network = Embedder(loaded.module, 2048, loaded.output_key)
        return network, f"backbone.{SOURCES[spec]}", f"{spec}, {weights or 'ImageNet weights'}"
    raise GcfastError(
        "no ResNet-50 with ImageNet weights can be had; --imagenet FILE reads them from a file. "
        + "; ".join(said)
    )


class Crops(Dataset[NDArray[np.uint8]]):
    """Random squares of the training pictures, mirrored half of the time; a function of the draw.

    Indexed by (number of the draw, number of the picture).
    """

    def __init__(self, samples: Sequence[Sample], size: int, resize: int, seed: int) -> None:
        self.samples, self.size, self.resize, self.seed = list(samples), size, resize, seed

    def __getitem__(self, key: tuple[int, int]) -> NDArray[np.uint8]:
        draw, index = key
        rng = np.random.default_rng([self.seed, draw])
        picture = decode(self.samples[index].path)
        scale = self.resize / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        left = int(rng.integers(width - self.size + 1))
        top = int(rng.integers(height - self.size + 1))
        x, y = picture.size[0] / width, picture.size[1] / height
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        cut = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        view = np.asarray(cut)
        return np.ascontiguousarray(view[:, ::-1] if rng.random() < 0.5 else view)


def draws(
    numbers: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[list[tuple[int, int]]]:
    """Batches of keys for Crops: some classes, some pictures of each, all epochs.

    Args:
        numbers: class number of each picture, [N].
        recipe: sizes; classes of fewer pictures than it wants give one more than once.
        generator: of the choices.
    """
    classes = [(numbers == c).nonzero()[:, 0] for c in numbers.unique()]
    draw = 0
    for _ in range(recipe.epochs * recipe.steps):
        batch = []
        for c in torch.randperm(len(classes), generator=generator)[: recipe.classes].tolist():
            members = classes[c]
            if len(members) >= recipe.pictures:
                picks = torch.randperm(len(members), generator=generator)[: recipe.pictures]
            else:
                picks = torch.randint(len(members), (recipe.pictures,), generator=generator)
            for index in members[picks].tolist():
                batch.append((draw, index))
                draw += 1
        yield batch


def train(
    network: Embedder,
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    device: torch.device,
    seed: int,
    workers: int = 0,
    progress: bool = False,
) -> str:
    """Train in place; in evaluation mode afterwards.

    Returns:
        A sentence on how it went.
    """
    from pytorch_metric_learning.losses import MarginLoss
    from pytorch_metric_learning.miners import DistanceWeightedMiner

    start = time.perf_counter()
    names = sorted({sample.label for sample in samples})
    place = {name: i for i, name in enumerate(names)}
    numbers = torch.tensor([place[sample.label] for sample in samples])
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the miner draws from the global generator
    criterion = MarginLoss(
        margin=recipe.margin, beta=recipe.beta, nu=0, learn_beta=True, num_classes=len(names)
    ).to(device)
    miner = DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    network.to(device).train()
    convolutions = {
        id(p)
        for module in network.backbone.modules()
        if isinstance(module, nn.Conv2d)
        for p in module.parameters()
    }
    factor = 1.0 if isinstance(network.backbone, Tiny) else recipe.backbone_factor
    parts = [
        {"params": [p for p in network.parameters() if id(p) in convolutions],
         "lr": factor * recipe.rate},
        {"params": [p for p in network.parameters() if id(p) not in convolutions],
         "lr": recipe.rate},
    ]  # fmt: skip
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(parts, weight_decay=recipe.decay, eps=1e-7),
        torch.optim.SGD(criterion.parameters(), lr=recipe.beta_rate, momentum=0.9),
    ]
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(o, [m * recipe.steps for m in recipe.milestones], 0.5)
        for o in optimizers
    ]
    batches = list(draws(numbers, recipe, generator))
    side = preprocessing.size
    assert isinstance(side, int)  # the recipe's view is a square
    loader = DataLoader(
        Crops(samples, side, recipe.resize, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_stacked,
        generator=torch.Generator(),
    )
    losses = []
    total = len(batches)
    for keys, views in zip(
        batches, tqdm(loader, "train", total, disable=not progress, leave=False), strict=True
    ):
        labels = numbers[[index for _, index in keys]].to(device)
        embeddings = network(preprocessing.normalize(views).to(device))
        loss = criterion(embeddings, labels, miner(embeddings, labels))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    network.eval().requires_grad_(False)
    epoch = recipe.steps
    first, last = (sum(part) / len(part) for part in (losses[:epoch], losses[-epoch:]))
    minutes = (time.perf_counter() - start) / 60
    return (
        f"margin loss, distance-weighted sampling: {recipe.epochs} epochs of {recipe.steps} "
        f"batches, loss {first:.4f} to {last:.4f}, {minutes:.1f} min"
    )


def save(network: Embedder, path: Path) -> None:
    """Write the weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, partial)
    partial.replace(path)


def restore(network: Embedder, path: Path) -> None:
    """Read what `save` wrote."""
    network.load_state_dict(load_file(path))
    network.eval().requires_grad_(False)


def _stacked(views: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(views))
