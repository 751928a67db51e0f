"""The rank siamese network: which of two houses sold for more, from their tiles alone.

Each branch turns a tile into four features; the difference of two houses' features goes through a
linear layer 4 x 2 into a cross-entropy. Source: paper, house price application. The branch's layers
are ours, small enough for one CPU thread. Its two fully connected layers, with a ReLU between them,
are not affine: gradients differ from house to house, so that which row lends its weights matters.
(With one layer alone all rows of a database would hold the same weights, up to a factor.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

FEATURES = 4
LAYER = "maps"  # the last convolutional layer of Branch
BATCH = 64  # houses; all their pairs are compared
LEARNING_RATE = 4e-3


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Branch(nn.Module):
    """Tiles [B, 3, S, S] in [0, 1] to features [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 24, 5, 2), _block(24, 32, 3, 1), _block(32, 64, 3, 2))
        self.maps = _block(64, 128, 3, 1)  # [B, 128, S / 4, S / 4]
        self.hidden = nn.Linear(128, 32)
        self.project = nn.Linear(32, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.maps(self.stem((images - 0.45) / 0.2)).mean((2, 3))
        return self.project(F.relu(self.hidden(pooled)))


class RankSiamese(nn.Module):
    """A branch and the linear layer over differences of features."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()
        self.rank = nn.Linear(FEATURES, 2)  # in the order "sold for less", "sold for more"

    def loss(self, images: Tensor, price: Tensor) -> Tensor:
        """Mean cross-entropy over the pairs of a batch whose prices differ, both orders."""
        features = self.branch(images)
        logits = self.rank(features[:, None] - features[None])  # [B, B, 2]
        more = price[:, None] > price[None]
        differ = price[:, None] != price[None]
        return F.cross_entropy(logits[differ], more[differ].long())


@dataclass(frozen=True)
class Training:
    """How a training went."""

    seconds: float
    losses: list[float]  # mean of each epoch


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S] in [0, 1], channels-last in memory."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return values.contiguous(memory_format=torch.channels_last)


def train(
    images: NDArray[np.uint8],
    price: NDArray[np.float64],
    *,
    epochs: int,
    seed: int,
    progress: bool = False,
) -> tuple[RankSiamese, Training]:
    """Train from scratch; the same seed gives the same network on the same machine.

    Batches are mirrored and turned as a whole: a tile has no up.

    Args:
        images: uint8 [N, S, S, 3].
        price: [N].
        epochs: passes over the houses.
        seed: of weights, batches and turns.
        progress: show a bar.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RankSiamese()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    prices = torch.from_numpy(np.log(price))
    steps = epochs * max(1, len(price) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    losses = []
    for _ in tqdm(range(epochs), desc="rank siamese", disable=not progress, leave=False):
        order = torch.randperm(len(price), generator=generator)
        total = []
        for batch in order.split(BATCH)[: max(1, len(price) // BATCH)]:
            turns = int(torch.randint(4, (1,), generator=generator))
            mirror = int(torch.randint(2, (1,), generator=generator))
            values = torch.rot90(to_input(images[batch.numpy()]), turns, (2, 3))
            values = values.flip(3) if mirror else values
            loss = network.loss(values.contiguous(memory_format=torch.channels_last), prices[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total.append(loss.item())
        losses.append(sum(total) / len(total))
    network.eval().requires_grad_(False)
    return network, Training(time.perf_counter() - start, losses)


@torch.inference_mode()
def features_of(branch: Branch, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, 4] of uint8 [N, S, S, 3]."""
    parts = [branch(to_input(images[i : i + 256])) for i in range(0, len(images), 256)]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def pair_accuracy(
    network: RankSiamese, features: NDArray[np.float32], price: NDArray[np.float64]
) -> float:
    """Share of all pairs with different prices that the network orders as they sold."""
    f = torch.from_numpy(features)
    direction = network.rank.weight[1] - network.rank.weight[0]
    shift = network.rank.bias[1] - network.rank.bias[0]
    score = (f @ direction).double()
    prices = torch.from_numpy(price)
    more = score[:, None] - score[None] + shift > 0
    differ = prices[:, None] != prices[None]
    return float((more == (prices[:, None] > prices[None]))[differ].double().mean())
