"""What `cub200.py` runs on: CUB-200-2011, the pictures of `bench/scenes.py`, or drawn birds.

Every subject is a network with its layer, labelled training batches, and test batches with
gcfast.evaluation.datasets.Truth: boxes, masks and labels of one object a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cub200_network import Recipe, make_network, restore, save, train
from numpy.typing import NDArray
from torch import Tensor, nn

from gcfast.evaluation.datasets import Sample, ScoredLoader, Truth, labelled_loader, read_cub
from gcfast.images.preprocessing import Preprocessing
from gcfast.metrics import box_masks

BATCH = 32
# The published split by species (Song et al., CVPR 2016): images of the classes 1-100 and 101-200.
CUB_IMAGES = {"train": 5864, "test": 5924}


@dataclass
class Subject:
    """What one run needs."""

    title: str
    network: nn.Module
    layer: str
    train: Iterable[Any]  # (images, labels, ids)
    test: Iterable[tuple[Tensor, Truth]]
    images: int  # how many ``test`` gives, before any are skipped
    facts: list[str] = field(default_factory=list)
    skipped: Any = None  # () -> list of (id, reason), after the pass


class Drawn:
    """Pictures in memory, as training batches or as test batches with their truth."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        masks: NDArray[np.bool_],
        boxes: NDArray[np.int64],
        labels: Sequence[str],
        to_input: Any,
        *,
        truth: bool,
    ) -> None:
        self.images, self.masks, self.boxes = images, masks, boxes
        self.labels, self.to_input, self.truth = list(labels), to_input, truth

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.images), BATCH):
            part = slice(start, min(len(self.images), start + BATCH))
            inputs, labels = self.to_input(self.images[part]), self.labels[part]
            ids = [f"{label}#{i}" for i, label in enumerate(labels, start)]
            if not self.truth:
                yield inputs, labels, ids
                continue
            boxes, masks = torch.from_numpy(self.boxes[part]), torch.from_numpy(self.masks[part])
            inside = box_masks(boxes, *masks.shape[1:])
            yield inputs, Truth(ids, labels, list(boxes[:, None]), inside, masks)


def cached_name(
    origin: str, recipe: Recipe, size: int, seed: int, samples: Sequence[Sample]
) -> str:
    """The file of a trained network: another for whatever makes it another network.

    Args:
        origin: where its ImageNet weights are from.
        recipe: how it is trained.
        size: of its input.
        seed: of the training.
        samples: the training pictures.
    """
    what = [origin, repr(recipe), size, seed, [(sample.id, sample.label) for sample in samples]]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return f"cub200-{seed}-{recipe.epochs}x{recipe.steps}-{digest[:12]}.safetensors"


def cub(options: argparse.Namespace) -> Subject:
    """CUB-200-2011, its network trained here or read from the cache.

    Raises:
        FileNotFoundError, ValueError: as :func:`gcfast.evaluation.datasets.read_cub`.
        GcfastError: no ResNet-50 can be had.
    """
    device = torch.device(options.device)
    halves = {half: read_cub(options.root, half) for half in ("train", "test")}
    preprocessing = Preprocessing(size=options.size)
    network, layer, origin = make_network(options.backbone, options.imagenet, options.seed)
    facts = [f"network: {origin}, D = {network.project.out_features}, layer {layer}"]
    for half, found in halves.items():
        count = len(found.samples) + len(found.skipped)
        whole = "" if count == CUB_IMAGES[half] else f"; the published split has {CUB_IMAGES[half]}"
        facts.append(f"{half}: {count} images of {len(found.class_names)} species{whole}")
    recipe = Recipe(epochs=options.epochs, steps=options.steps)
    path = options.weights or options.cache / cached_name(
        origin, recipe, options.size, options.seed, halves["train"].samples
    )
    if path.exists() and not options.retrain:
        restore(network, path)
        facts.append(f"weights: {path}")
    else:
        if options.weights is not None:
            raise FileNotFoundError(f"`--weights` must exist, got {path}")
        facts.append(
            train(
                network,
                halves["train"].samples,
                preprocessing,
                recipe,
                device=device,
                seed=options.seed,
                workers=options.workers,
                progress=sys.stderr.isatty(),
            )
        )
        save(network, path)
    network.to(device)
    common = {"batch_size": BATCH, "workers": options.workers}
    scored = ScoredLoader(halves["test"], preprocessing, **common)
    labelled = labelled_loader(halves["train"], preprocessing, **common)
    return Subject(
        title="CUB-200-2011",
        network=network,
        layer=layer,
        train=labelled,
        test=OnDevice(scored, device),
        images=len(halves["test"].samples),
        facts=facts,
        skipped=lambda: [*labelled.unreadable, *halves["train"].skipped, *scored.skipped],
    )


class OnDevice:
    """A loader's batches with their images on a device."""

    def __init__(self, loader: ScoredLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[tuple[Tensor, Truth]]:
        for images, truth in self.loader:
            yield images.to(self.device), truth


def scenes(options: argparse.Namespace) -> Subject:
    """The one-object pictures of `bench/scenes.py` and its fine-tuned network.

    Raises:
        FileNotFoundError: the stamps are not there.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    import scenes as bench
    from scenes_compose import load_photographs
    from scenes_network import to_input

    arguments = ["--seed", str(options.seed), "--cache", str(options.cache)]
    arguments += ["--stamps", str(options.stamps)] if options.stamps else []
    arguments += ["--quick"] if options.quick else []
    like = bench.parse(arguments)
    rows, one, _ = bench.compose_all(like, load_photographs())
    network, learnt = bench.fine_tune(like, rows, one, sys.stderr.isatty())
    return Subject(
        title="scenes, one object",
        network=network,
        layer=bench.LAYER,
        train=_drawn(rows, to_input, truth=False),
        test=_drawn(one, to_input, truth=True),
        images=len(one),
        facts=[f"{name}: {value}" for name, value in learnt],
    )


def _drawn(pictures: Any, to_input: Any, *, truth: bool) -> Drawn:
    labels = [names[0] for names in pictures.names]
    return Drawn(
        pictures.images, pictures.masks[:, 0], pictures.boxes[:, 0], labels, to_input, truth=truth
    )


def demo(options: argparse.Namespace) -> Subject:
    """The drawn birds of `gcfast demo` and the network that ships with it."""
    from gcfast.demo.birds import draw_bird
    from gcfast.demo.network import load_network
    from gcfast.demo.species import SPECIES, TRAINING_LABELS, UNSEEN_LABELS

    def draw(labels: Sequence[int], each: int, stream: int, truth: bool) -> Drawn:
        # As `gcfast demo` numbers them: no test picture shares its scene with a training one.
        pictures = [
            draw_bird(label, seed=options.seed, index=(label * each + i) * 2 + stream)
            for label in labels
            for i in range(each)
        ]
        return Drawn(
            np.stack([p.image for p in pictures]),
            np.stack([p.bird for p in pictures]),
            np.array([p.box for p in pictures], np.int64),
            [SPECIES[p.label].name for p in pictures],
            _unit,
            truth=truth,
        )

    known, unseen = (4, 2) if options.quick else (24, 8)
    test = draw(UNSEEN_LABELS, unseen, 1, True)
    return Subject(
        title="demonstration, unseen species",
        network=load_network(),
        layer="features",
        train=draw(TRAINING_LABELS, known, 0, False),
        test=test,
        images=len(test.images),
    )


def _unit(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


SUBJECTS = {"cub": cub, "scenes": scenes, "demo": demo}
