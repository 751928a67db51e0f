"""Train the network of the demonstration, on the training half of the species.

    python bench/train_demo.py [--steps 800] [--seed 0] [--out gcfast/demo/network.safetensors]

First the last map learns what a species is told by: half of its channels each learn to say which
part, the others which color, by whether they fire at all, anywhere. A batch holds six scenes with
eight species each, the same bird in the same place: between those, only the telling parts differ,
so it is there that the channels come to fire. Where on the bird the part is, is never shown. For
the part, most scenes are recolored at random, as its color in the unseen half will be new.

Then the linear layer learns with the triplet loss (squared distances of unit embeddings) over every
triplet of a batch that violates the margin, at two levels: species, and families of species told by
the same part; the convolutions stay as they are.

It runs on one CPU thread, prints the recall at 1 among pictures of species it never saw, and writes
the weights as float16.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from gcfast.demo.birds import draw_bird
from gcfast.demo.network import CHANNELS, WEIGHTS, BirdNet, load_network
from gcfast.demo.species import COLORS, PARTS, SPECIES, TRAINING_LABELS, UNSEEN_LABELS

SPECIES_IN_SCENE, SCENES_IN_BATCH = 8, 6
CROP = 112  # pixels a side: most birds fit, and a step costs 0.6 of one on whole pictures
FOG_LIFTS = 0.35  # the share of the steps after which nothing of the background is hidden
RAMP = 0.4  # the share of the steps over which pooling sharpens and thresholds come in
SHARPNESS = 1.5  # of pooling over places, in the end
THRESHOLD = 1.0  # evidence at which a channel says yes; above 0, so that it fires around there too
LOWER = 0.5  # by how much thresholds come down at last, so that weak looks fire as well
TWIN_SCALE = 4.0
PART_WEIGHT, LOOK_WEIGHT = 1.0, 0.5
SHARE_WEIGHT = 0.5
PLAIN, NEGATIVE = 0.4, 0.25  # shares of scenes left as they are, and of the others made negatives
MARGIN, FAMILY_MARGIN = 0.05, 0.1  # small, as what embeddings share brings all distances down
COMMON = 4.0  # what embeddings share, before any is normalised, of the mean norm of the rest
# Pictures of the demonstration come from other seeds: none of them was trained on.
TRAIN_SEED, TEST_SEED = 101, 102

LOOKS = tuple(COLORS)
# Of every label: which part tells the species, and which color it has.
PART_OF = torch.tensor([PARTS.index(species.part) for species in SPECIES])
LOOK_OF = torch.tensor([LOOKS.index(species.look) for species in SPECIES])
# How many channels say each part and each color.
PER_PART, PER_LOOK = 8, 7
assert len(PARTS) * PER_PART + len(LOOKS) * PER_LOOK == CHANNELS

Task = tuple[int, int, int]


def _draw(task: Task) -> np.ndarray:
    label, seed, index = task
    picture = draw_bird(label, seed=seed, index=index)
    return np.dstack([picture.image, picture.bird.astype(np.uint8) * 255])


def pictures(tasks: list[Task], workers: int) -> torch.Tensor:
    """Draw (label, seed, index) tasks: uint8 [n, 4, S, S], the mask of the bird last."""
    with ProcessPoolExecutor(workers) as pool:
        images = np.stack(list(pool.map(_draw, tasks, chunksize=64)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def recolored(scene: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn colors uint8 [B, 3, H, W] about the gray axis by any angle; some become negatives."""
    angle, dice = torch.rand(2, generator=generator).tolist()
    c, s = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = c * torch.eye(3) + (1 - c) / 3 + s * across
    turned = torch.einsum("ij,bjhw->bihw", turn, scene.float()).clamp(0, 255)
    return (255 - turned if dice < NEGATIVE else turned).byte()


def corner(bird: torch.Tensor, generator: torch.Generator) -> tuple[int, int]:
    """The corner (y, x) of a random crop that holds the bird [S, S] bool, or the middle of it."""
    found = []
    for axis in (1, 0):
        where = bird.any(dim=axis).nonzero().flatten().tolist()
        low, high = where[-1] + 1 - CROP, where[0]
        if low > high:
            low = high = (low + high) // 2
        low, high = (min(max(v, 0), len(bird) - CROP) for v in (low, high))
        found.append(int(torch.randint(low, high + 1, (), generator=generator)))
    return found[0], found[1]


def augment(
    scenes: torch.Tensor, fog: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop, mirror and recolor scenes uint8 [n, species, 4, S, S], and hide places in gray `fog`.

    Returns:
        float32 [n * species, 3, CROP, CROP] in [0, 1], and bool [n * species]: the colors are as
        they were.
    """
    crops, plain = [], []
    for scene in scenes:
        y, x = corner(scene[0, 3] > 0, generator)  # all species of a scene have one outline
        crop = scene[..., y : y + CROP, x : x + CROP]
        mirror, dice = torch.rand(2, generator=generator).tolist()
        crop = crop.flip(3) if mirror < 0.5 else crop
        if dice >= PLAIN:
            crop = torch.cat([recolored(crop[:, :3], generator), crop[:, 3:]], dim=1)
        crops.append(crop)
        plain += [dice < PLAIN] * len(scene)
    colors, bird = (torch.cat(crops).float() / 255).split((3, 1), dim=1)
    gray = torch.full_like(colors, 0.5)
    return torch.lerp(colors, gray, fog * (1 - bird)), torch.tensor(plain)


def pooled_evidence(evidence: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Evidence [B, C, H, W] to [B, C]: a mean over places, weighted to the places of the most."""
    places = evidence.flatten(2)
    return ((sharpness * places).softmax(dim=2) * places).sum(dim=2)


def naming_loss(
    says: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, ramp: float
) -> tuple[torch.Tensor, float]:
    """How badly channels name the part, or the color, of pictures of whole scenes.

    Args:
        says: [scenes * species, classes, channels of a class], pooled evidence.
        truth: [scenes * species], classes.
        known: [scenes * species] bool, pictures that count.
        ramp: from 0 to 1, the weight of all but the comparison of twins.

    Returns:
        The loss, and how often the comparison of twins is right.
    """
    says, truth = says.float(), truth[known]
    if not known.any():
        return says.sum() * 0, math.nan
    # Less the mean of its scene a picture is what its telling part adds: what the eight have in
    # common cancels, and so do the gradients of all places but the parts.
    scenes = says.mean(dim=2).unflatten(0, (-1, SPECIES_IN_SCENE))
    twins = TWIN_SCALE * (scenes - scenes.mean(dim=1, keepdim=True)).flatten(0, 1)[known]
    says = says[known]
    loss = 2 * F.cross_entropy(twins, truth)
    loss = loss + ramp * F.cross_entropy(says.mean(dim=2), truth)
    # Every channel by itself: yes somewhere in a picture of its class, no all over the others.
    yes = F.one_hot(truth, says.shape[1]).float()
    miss = F.softplus(THRESHOLD - says).mean(dim=2)
    false = F.softplus(says - THRESHOLD).mean(dim=2)
    loss = loss + ramp * (miss * yes + false * (1 - yes)).sum(dim=1).mean()
    return loss, float((twins.argmax(dim=1) == truth).float().mean())


def share_loss(fires: torch.Tensor, truth: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """-log of the share that channels of the true class have in fires [B, classes, channels]."""
    if not known.any():
        return fires.sum() * 0
    classes = fires[known].sum(dim=2)
    own = classes.gather(1, truth[known, None]).squeeze(1)
    return -((own + 1e-4) / (classes.sum(dim=1) + 1e-3)).log().mean()


def train_features(
    network: BirdNet, scenes: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> None:
    """Train all but the linear layer on scenes uint8 [n, species, 4, S, S] with labels [n, s]."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(network.features.parameters(), lr=args.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
    start = time.perf_counter()
    seen: list[tuple[float, float, float]] = []
    network.train()
    for step in range(args.steps):
        # Berries and flowers hide the little that matters: they come out of the fog by and by.
        done = step / args.steps
        fog, ramp = max(0.0, 1 - done / FOG_LIFTS), min(1.0, done / RAMP)
        chosen = torch.randint(len(scenes), (SCENES_IN_BATCH,), generator=generator)
        names = labels[chosen].flatten()
        batch, plain = augment(scenes[chosen], fog, generator)
        with torch.autocast("cpu", torch.bfloat16):
            evidence = network.evidence(batch.contiguous(memory_format=torch.channels_last))
        pooled = pooled_evidence(evidence.float(), SHARPNESS * max(0.3, ramp))
        parts, looks = pooled.split((len(PARTS) * PER_PART, len(LOOKS) * PER_LOOK), dim=1)
        everything = torch.ones_like(plain)
        part_loss, part_right = naming_loss(
            parts.unflatten(1, (-1, PER_PART)), PART_OF[names], everything, ramp
        )
        look_loss, look_right = naming_loss(
            looks.unflatten(1, (-1, PER_LOOK)), LOOK_OF[names], plain, ramp
        )
        loss = PART_WEIGHT * part_loss + LOOK_WEIGHT * look_loss
        fires = evidence.float().relu().mean(dim=(2, 3))
        parts, looks = fires.split((len(PARTS) * PER_PART, len(LOOKS) * PER_LOOK), dim=1)
        loss = loss + ramp * SHARE_WEIGHT * PART_WEIGHT * share_loss(
            parts.unflatten(1, (-1, PER_PART)), PART_OF[names], everything
        )
        loss = loss + ramp * SHARE_WEIGHT * LOOK_WEIGHT * share_loss(
            looks.unflatten(1, (-1, PER_LOOK)), LOOK_OF[names], plain
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen.append((loss.item(), part_right, look_right))
        if (step + 1) % 50 == 0:
            means = np.nanmean(seen[-50:], axis=0)
            print(
                f"step {step + 1}: fog {fog:.2f}, loss {means[0]:.3f}, of twins {means[1]:.1%} "
                f"named by part, {means[2]:.1%} by color, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def triplet_loss(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of [D(a,p) - D(a,n) + margin]+ over the triplets of a batch where it is positive."""
    distances = (2 - 2 * embeddings @ embeddings.T).clamp_min(0)  # [B, B]
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    anchors, positives = positive.nonzero(as_tuple=True)
    losses = distances[anchors, positives, None] - distances[anchors] + margin  # [pairs, B]
    losses = losses.masked_fill(same[anchors], 0).relu()
    return losses.sum() / (losses > 0).sum().clamp_min(1)


def train_embedding(
    network: BirdNet, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> None:
    """Train the linear layer with the triplet loss on whole pictures uint8 [n, 4, S, S].

    It begins as one direction for every part and every color, the sum of their channels, scaled
    to vary as much as the others. One more direction is the same for all pictures and stays so:
    with it the cosine of two embeddings rises with all that fires in both, and the gradient with
    respect to a picture's own channels does not vanish where it already looks like its match.
    """
    generator = torch.Generator().manual_seed(args.seed)
    network.eval()
    with torch.no_grad():
        last = network.features[4]
        assert isinstance(last, torch.nn.Conv2d)
        assert last.bias is not None
        last.bias += LOWER
        pooled = torch.cat([
            network.feature_maps(part[:, :3].float() / 255).mean(dim=(2, 3))
            for part in images.split(64)
        ])  # fmt: skip
    sizes = [PER_PART] * len(PARTS) + [PER_LOOK] * len(LOOKS)
    member = torch.block_diag(*[torch.ones(1, size) for size in sizes])  # [classes, C]
    spread = (pooled @ member.T).std(dim=0) @ member  # [C]
    scaled = pooled / spread
    weight = torch.zeros_like(network.embed.weight)
    weight[: len(sizes)] = member
    bias = torch.zeros_like(network.embed.bias)
    bias[-1] = COMMON * (scaled @ weight.T).norm(dim=1).mean()
    weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=args.triplet_lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.triplet_lr, args.triplet_steps)
    for step in range(args.triplet_steps):
        batch = torch.randint(len(labels), (128,), generator=generator)
        embeddings = F.normalize(scaled[batch] @ weight.T + bias, dim=1)
        names = labels[batch]
        loss = triplet_loss(embeddings, names, MARGIN)
        loss = loss + triplet_loss(embeddings, PART_OF[names], FAMILY_MARGIN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"triplet step {step + 1}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        network.embed.weight.copy_(weight / spread)
        network.embed.bias.copy_(bias)


@torch.inference_mode()
def recall_at_1(network: BirdNet, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures whose nearest other picture is of their species."""
    network.eval()
    embeddings = torch.cat([network(part[:, :3].float() / 255) for part in images.split(64)])
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    return float((labels[similarity.argmax(dim=1)] == labels).float().mean())


def train(args: argparse.Namespace) -> BirdNet:
    """Train from scratch; everything random comes from the seed and the pictures' own seeds."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    known = torch.tensor(TRAINING_LABELS)
    orders = [torch.randperm(len(known), generator=generator) for _ in range(args.scenes)]
    labels = torch.stack([known[order[:SPECIES_IN_SCENE]] for order in orders])
    tasks = [(y, TRAIN_SEED, i) for i, scene in enumerate(labels.tolist()) for y in scene]
    images = pictures(tasks, args.threads)
    print(f"{len(images)} pictures drawn in {time.perf_counter() - start:.0f} s", flush=True)
    network = BirdNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_features(network, images.unflatten(0, tuple(labels.shape)), labels, args)
    train_embedding(network, images, labels.flatten(), args)
    return network


def main() -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--triplet-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=400, help="of 8 species each")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--triplet-lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    network = train(args)
    print(f"trained in {time.perf_counter() - start:.0f} s, drawing counted")
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, args.out)
    tasks = [(label, TEST_SEED, label * 40 + i) for label in UNSEEN_LABELS for i in range(40)]
    images = pictures(tasks, args.threads)
    recall = recall_at_1(load_network(args.out), images, torch.tensor([t[0] for t in tasks]))
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    print(f"recall@1 among {len(images)} pictures of unseen species: {recall:.3f}")


if __name__ == "__main__":
    main()
