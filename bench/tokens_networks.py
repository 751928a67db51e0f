"""The networks of `bench/tokens.py`: small vision transformers, and the pictures they learn from.

    python bench/tokens_networks.py [--data ../shared/data] [--cache bench/.cache]

Two networks for each of two sets of pictures: one embeds its class token, one the average of its
patch tokens. The pictures are the demonstration's birds, drawn with other seeds than any that is
measured, and product photographs of clothing, every second one of each class; the other half is
measured. Training is plain: cosines to one vector a class, by softmax. The birds' networks learn
families as well as species, as the network of the demonstration does, since of a species that they
never saw only the family can be right. No setting was chosen by what a map looks like or scores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gcfast.demo.network import load_network

WIDTH, DEPTH, HEADS, EMBEDDING = 96, 3, 4, 64
GRID = 9  # patches a side
SCALE = 16.0  # of the cosines
BATCH = 40
LEARNING_RATE = 1e-3
SEED = 0
POOLS = ("class token", "average")
SETS = ("birds", "clothing")
BIRD_SCENES, BIRD_SEED = 40, 201  # scenes that each training species is drawn into
SIDES = {"birds": 144, "clothing": 72}
STAGES = {"birds": 6, "clothing": 4}  # of the demonstration's network
STEPS = {"birds": 100, "clothing": 150}


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, P, WIDTH] to the same shape."""
        B, P, _ = tokens.shape
        parts = self.qkv(self.norm1(tokens)).view(B, P, 3, HEADS, WIDTH // HEADS)
        attended = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.out(attended.transpose(1, 2).reshape(B, P, WIDTH))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """Images [B, 3, S, S] in [0, 1] to unit embeddings [B, 64]; 0.5 M parameters.

    Patches are made of the outputs of the demonstration's convolutions, which stay as they are: a
    hybrid, as the first vision transformers had it. Little else is learnt in ten minutes on one
    thread. For the birds these are the last feature maps, for clothing those of the four
    convolutions before the last.
    """

    def __init__(self, name: str, pool: str) -> None:
        super().__init__()
        self.stem = load_network().features[: STAGES[name]].requires_grad_(False)
        step = SIDES[name] // (4 * GRID)
        self.patch = nn.Conv2d(128 if STAGES[name] == 6 else 96, WIDTH, step, step)
        self.pool = pool
        first = pool == "class token"
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH)) if first else None
        self.place = nn.Parameter(0.02 * torch.randn(1, GRID**2 + first, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.embed = nn.Linear(WIDTH, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.behind(self.stem((images - 0.5) * 4))

    def behind(self, maps: Tensor) -> Tensor:
        """Embed what the convolutions give."""
        tokens = self.patch(maps).flatten(2).transpose(1, 2)
        if self.token is not None:
            tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.norm(self.blocks(tokens + self.place))
        pooled = tokens.mean(1) if self.token is None else tokens[:, 0]
        return F.normalize(self.embed(pooled), dim=1)


@dataclass(frozen=True)
class Pictures:
    """Pictures and the classes they are of, on one or two levels."""

    images: Tensor  # uint8 [N, 3, S, S]
    levels: list[Tensor]  # [N] int64 each


def birds_to_train() -> Pictures:
    """Birds of the training species; the species of a scene follow one another."""
    from gcfast.demo.birds import draw_bird
    from gcfast.demo.species import PARTS, SPECIES, TRAINING_LABELS

    tasks = [(y, i) for i in range(BIRD_SCENES) for y in TRAINING_LABELS]
    images = np.stack([draw_bird(y, seed=BIRD_SEED, index=i).image for y, i in tasks])
    species = torch.tensor([y for y, _ in tasks])
    family = torch.tensor([PARTS.index(SPECIES[y].part) for y, _ in tasks])
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [species, family])


def clothing(data: Path, half: int) -> tuple[Pictures, list[str]]:
    """Every second photograph of each class, and the classes' names.

    Args:
        data: the folder that has ``clothing``, with a folder for each class.
        half: 0 to train on, 1 to measure.
    """
    names = sorted(folder.name for folder in (data / "clothing").iterdir() if folder.is_dir())
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((data / "clothing" / name).iterdir())[half::2]:
            with Image.open(file) as one:
                small = one.convert("RGB").resize(
                    (SIDES["clothing"], SIDES["clothing"]), Image.Resampling.BICUBIC
                )
            images.append(np.asarray(small))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Pictures(stacked, [torch.tensor(labels)]), names


def augmented(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Mirror, crop and brighten images uint8 [B, 3, S, S] at random: float32 in [0, 1]."""
    B = len(images)
    size, x, y, mirror, light = torch.rand((5, B), generator=generator)
    size = smallest + (1 - smallest) * size  # side of the crop, a share
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = torch.where(mirror < 0.5, -size, size)
    theta[:, 1, 1] = size
    theta[:, 0, 2], theta[:, 1, 2] = (1 - size) * (2 * x - 1), (1 - size) * (2 * y - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    pixels = images.float() / 255
    crops = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return (crops * (0.8 + 0.4 * light)[:, None, None, None]).clamp(0, 1)


def trained(name: str, pool: str, pictures: Pictures) -> Transformer:
    """Train a network by softmax over cosines, a level at a time added up.

    Clothing is cropped, mirrored and brightened at random; birds differ enough as they are drawn,
    and go through the convolutions once.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network, steps = Transformer(name, pool), STEPS[name]
    network.stem.eval()
    maps = None
    if name == "birds":
        with torch.no_grad():
            parts = [network.stem((x / 255 - 0.5) * 4).half() for x in pictures.images.split(16)]
        maps = torch.cat(parts)
    vectors = nn.ParameterList(
        nn.Parameter(torch.randn(int(level.max()) + 1, EMBEDDING)) for level in pictures.levels
    )
    parameters = [*network.parameters(), *vectors.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.15)
    begun, N = time.monotonic(), len(pictures.images)
    for step in range(steps):
        chosen = torch.randint(N, (BATCH,), generator=generator)
        if maps is not None:
            # Neighbours in the order of the birds are twins: one scene, other species.
            starts = torch.randint(N // 8, (BATCH // 8,), generator=generator)
            chosen = (8 * starts[:, None] + torch.arange(8)).flatten()
            embeddings = network.behind(maps[chosen].float())
        else:
            embeddings = network(augmented(pictures.images[chosen], 0.4, generator))
        levels = [level[chosen] for level in pictures.levels]
        loss = torch.zeros(())
        for level, vector in zip(levels, vectors, strict=True):
            loss = loss + F.cross_entropy(SCALE * embeddings @ F.normalize(vector, dim=1).T, level)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            print(f"  {step + 1}: {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return network.eval()


def network_of(name: str, pool: str, data: Path, cache: Path) -> Transformer:
    """Return a trained network; trained now where its weights are not in ``cache``."""
    path = cache / f"tokens-{name}-{pool.replace(' ', '-')}.safetensors"
    if not path.exists():
        print(f"training {name}, {pool}", flush=True)
        pictures = birds_to_train() if name == "birds" else clothing(data, 0)[0]
        network = trained(name, pool, pictures)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path)
    network = Transformer(name, pool)
    network.load_state_dict(load_file(path))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in SETS:
        for pool in POOLS:
            network_of(name, pool, options.data, options.cache)


if __name__ == "__main__":
    main()
