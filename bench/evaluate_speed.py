"""What `gcfast evaluate` measures against the forward passes that it needs.

    python bench/evaluate_speed.py [--network efficientnet-lite0] [--train 512] [--test 512]

One side is everything that the command measures but for reading files and drawing: the table with
both centres, the sweeps over M, T and (where FAISS is installed) k-means centres, localisation,
pointing game, fidelity, the table beyond the paper and confidence, without `--thorough`. The other
is one forward pass over the same training and test images, channels-last as gcfast runs them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from paired import conditions, paired
from subjects import CONVOLUTIONAL, loader, network

import gcfast
from gcfast.cli.evaluate import compressor
from gcfast.evaluation.datasets import Truth
from gcfast.evaluation.measure import AnnotationScore, evaluate


def truths(count: int, side: int, seed: int) -> Truth:
    """Ellipses as masks, their boxes, and class names that the training images know."""
    generator = torch.Generator().manual_seed(seed)
    half = side * (0.15 + 0.15 * torch.rand((count, 2), generator=generator))
    middle = half + (side - 2 * half) * torch.rand((count, 2), generator=generator)
    at = torch.arange(side) + 0.5
    x, y = ((at - middle[:, i, None]) / half[:, i, None] for i in (0, 1))
    masks = (x[:, None] ** 2 + y[:, :, None] ** 2) <= 1
    boxes = torch.cat([middle - half, middle + half], 1).round().long()
    inside = (x.abs() <= 1)[:, None] & (y.abs() <= 1)[:, :, None]
    return Truth(
        ids=[str(i) for i in range(count)],
        labels=[str(i % 8) for i in range(count)],
        boxes=list(boxes[:, None]),
        box_mask=inside,
        masks=masks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="efficientnet-lite0", choices=CONVOLUTIONAL)
    parser.add_argument("--train", type=int, default=512, help="training images")
    parser.add_argument("--test", type=int, default=512, help="test images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, layer = network(arguments.network)
    train = loader(arguments.train, arguments.batch, 8)
    test = [
        (images, truths(len(images), images.shape[2], seed=i))
        for i, (images, _) in enumerate(loader(arguments.test, arguments.batch, 8))
    ]
    explainer = gcfast.Explainer(model, layer)

    def everything() -> object:
        return evaluate(
            explainer,
            train,
            test,
            AnnotationScore(),
            labels=lambda truth: truth.labels,
            localised=lambda truth: truth.localised,
            objects=lambda truth, _: truth.masks,
            compress=compressor(),
            total=arguments.test,
        )

    def forward() -> None:
        with torch.inference_mode():
            for images, _ in [*train, *test]:
                model(images.contiguous(memory_format=torch.channels_last))

    measured = paired(everything, forward, rounds=arguments.rounds, warmup=1)
    print(
        f"{arguments.network}, {arguments.train} training and {arguments.test} test images, "
        f"224 x 224: evaluate / its forward passes: {measured}"
    )
    if arguments.json:
        record = {
            "conditions": conditions(),
            "network": arguments.network,
            "train": arguments.train,
            "test": arguments.test,
            "evaluate": measured.record(),
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
