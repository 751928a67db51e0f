"""Train the network of the demonstration, on the training half of the species.

    python bench/train_demo.py [--steps 640] [--seed 0] [--out gcfast/demo/network.safetensors]

Triplet loss (squared distances of unit embeddings, margin 0.2) over every triplet of a batch that
violates the margin; each batch holds three pictures of each training species. It runs on one
CPU thread, prints the recall at 1 among pictures of species it never saw, and writes the weights
as float16.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gcfast.demo.birds import draw_bird
from gcfast.demo.network import WEIGHTS, BirdNet, load_network
from gcfast.demo.species import TRAINING_LABELS, UNSEEN_LABELS

MARGIN = 0.2
PER_BATCH = 3
# Pictures of the demonstration come from other seeds: none of them was trained on.
TRAIN_SEED, TEST_SEED = 101, 102


def _draw(task: tuple[int, int, int]) -> np.ndarray:
    label, seed, index = task
    return draw_bird(label, seed=seed, index=index).image


def pictures(
    labels: tuple[int, ...], each: int, seed: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `each` pictures of every label: uint8 [n, 3, S, S] and labels [n]."""
    tasks = [(label, seed, label * 100_000 + i) for label in labels for i in range(each)]
    with ProcessPoolExecutor(workers) as pool:
        images = np.stack(list(pool.map(_draw, tasks, chunksize=64)))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([t[0] for t in tasks])


def triplet_loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of [D(a,p) - D(a,n) + margin]+ over the triplets of a batch where it is positive."""
    distances = (2 - 2 * embeddings @ embeddings.T).clamp_min(0)  # [B, B]
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    anchors, positives = positive.nonzero(as_tuple=True)
    losses = distances[anchors, positives, None] - distances[anchors] + MARGIN  # [pairs, B]
    losses = losses.masked_fill(same[anchors], 0).relu()
    return losses.sum() / (losses > 0).sum().clamp_min(1)


@torch.inference_mode()
def recall_at_1(network: BirdNet, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures whose nearest other picture is of their species."""
    network.eval()
    embeddings = torch.cat([network(part.float() / 255) for part in images.split(64)])
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    return float((labels[similarity.argmax(dim=1)] == labels).float().mean())


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of them and shift each by up to 8 pixels; float32 [B, 3, S, S] in [0, 1]."""
    flips = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images).float() / 255
    dy, dx = torch.randint(-8, 9, (2,), generator=generator).tolist()
    return images.roll((dy, dx), dims=(2, 3))


def train(steps: int, seed: int, each: int, lr: float, workers: int) -> BirdNet:
    """Train from scratch; everything random comes from `seed` and the pictures' own seeds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    images, labels = pictures(TRAINING_LABELS, each, TRAIN_SEED, workers)
    test_images, test_labels = pictures(UNSEEN_LABELS, 12, TEST_SEED, workers)
    print(f"{len(labels)} pictures drawn in {time.perf_counter() - start:.0f} s", flush=True)
    rows = torch.arange(len(labels)).view(len(TRAINING_LABELS), each)

    network = BirdNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    start = time.perf_counter()
    running = 0.0
    for step in range(steps):
        columns = torch.rand(rows.shape, generator=generator).argsort(dim=1)[:, :PER_BATCH]
        batch = rows.gather(1, columns).flatten()
        network.train()
        loss = triplet_loss(network(augment(images[batch], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running += loss.item()
        if (step + 1) % 40 == 0:
            recall = recall_at_1(network, test_images, test_labels)
            print(
                f"step {step + 1}: loss {running / 40:.4f}, recall@1 unseen {recall:.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            running = 0.0
    return network


def main() -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=240, help="of each training species")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = train(args.steps, args.seed, args.pictures, args.lr, args.threads)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, args.out)
    images, labels = pictures(UNSEEN_LABELS, 40, TEST_SEED, args.threads)
    recall = recall_at_1(load_network(args.out), images, labels)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    print(
        f"recall@1 among {len(labels)} pictures of {len(UNSEEN_LABELS)} unseen species: {recall:.3f}"
    )


if __name__ == "__main__":
    main()
