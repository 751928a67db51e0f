"""Train the network of the demonstration, on the training half of the species.

    python bench/train_demo.py [--steps 1100] [--seed 0] [--out gcfast/demo/network.safetensors]

Triplet loss (squared distances of unit embeddings, margin 0.2) over every triplet of a batch that
violates the margin; a batch holds four pictures of each of 14 species. The pooled features are
centred by a batch normalisation that is folded into the linear layer at the end, and the
background comes out of a grey fog over the first part of the run. It runs on one CPU thread,
prints the recall at 1 among pictures of species it never saw, and writes the weights as float16.
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
SPECIES_IN_BATCH, PER_SPECIES = 14, 4
FOG_LIFTS = 0.35  # the share of the steps after which nothing is hidden
# Pictures of the demonstration come from other seeds: none of them was trained on.
TRAIN_SEED, TEST_SEED = 101, 102


def _draw(task: tuple[int, int, int]) -> np.ndarray:
    label, seed, index = task
    picture = draw_bird(label, seed=seed, index=index)
    return np.dstack([picture.image, picture.bird.astype(np.uint8) * 255])


def pictures(
    labels: tuple[int, ...], each: int, seed: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `each` pictures of every label: uint8 [n, 4, S, S], the mask last, and labels [n]."""
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


class Centred(torch.nn.Module):
    """The network with its pooled features centred and scaled.

    At first all pooled features point the same way, and so do all embeddings: without this the
    triplets of the first few hundred steps differ too little to learn from.
    """

    def __init__(self, network: BirdNet) -> None:
        super().__init__()
        self.network = network
        self.centre = torch.nn.BatchNorm1d(network.embed.in_features, affine=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.centre(self.network.feature_maps(images).mean(dim=(2, 3)))
        return torch.nn.functional.normalize(self.network.embed(pooled), dim=1)

    @torch.no_grad()
    def folded(self) -> BirdNet:
        """The network alone, its linear layer changed so that it gives the same embeddings."""
        embed = self.network.embed
        embed.weight /= (self.centre.running_var + self.centre.eps).sqrt()
        embed.bias -= embed.weight @ self.centre.running_mean
        return self.network


@torch.inference_mode()
def recall_at_1(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures whose nearest other picture is of their species."""
    network.eval()
    embeddings = torch.cat([network(part[:, :3].float() / 255) for part in images.split(64)])
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    return float((labels[similarity.argmax(dim=1)] == labels).float().mean())


def augment(images: torch.Tensor, fog: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of them, shift all by up to 8 pixels, and hide the background in grey `fog`.

    From uint8 [B, 4, S, S], the mask of the bird last, to float32 [B, 3, S, S] in [0, 1].
    """
    flips = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images).float() / 255
    dy, dx = torch.randint(-8, 9, (2,), generator=generator).tolist()
    colours, bird = images.roll((dy, dx), dims=(2, 3)).split((3, 1), dim=1)
    return torch.lerp(colours, torch.full_like(colours, 0.5), fog * (1 - bird))


def train(steps: int, seed: int, each: int, lr: float, workers: int) -> BirdNet:
    """Train from scratch; everything random comes from `seed` and the pictures' own seeds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    images, labels = pictures(TRAINING_LABELS, each, TRAIN_SEED, workers)
    print(f"{len(labels)} pictures drawn in {time.perf_counter() - start:.0f} s", flush=True)
    rows = torch.arange(len(labels)).view(len(TRAINING_LABELS), each)

    network = Centred(BirdNet())
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    start = time.perf_counter()
    losses: list[float] = []
    for step in range(steps):
        # Berries and flowers hide the little that matters: they come out of the fog by and by.
        fog = max(0.0, 1 - step / (FOG_LIFTS * steps))
        columns = torch.rand(rows.shape, generator=generator).argsort(dim=1)[:, :PER_SPECIES]
        species = torch.randperm(len(rows), generator=generator)[:SPECIES_IN_BATCH]
        batch = rows.gather(1, columns)[species].flatten()
        network.train()
        embeddings = network(augment(images[batch], fog, generator))
        loss = triplet_loss(embeddings, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: fog {fog:.2f}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return network.folded()


def main() -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=160, help="of each training species")
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
    print(f"recall@1 among {len(labels)} pictures of unseen species: {recall:.3f}")


if __name__ == "__main__":
    main()
