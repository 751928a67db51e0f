"""build against one forward pass over the images, and against the paper's loop by autograd.

    python bench/build_speed.py [--network efficientnet-lite0] [--images 256] [--json FILE]

First the weights: for 24 images, every valid triplet is differentiated by autograd from the layer
on, in float64, and averaged; build with `triplets="all"` has to agree, both methods, both signs,
both head paths. Then the time of build against one forward pass over the same images
(channels-last, as build runs it, and NCHW, as a user writes it), and of a database row against the
paper's loop for one row: 50 triplets, three forward passes and one backward pass each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import conditions, paired
from subjects import CONVOLUTIONAL, loader, network
from torch import Tensor, nn

import gcfast
from gcfast.builder import embed as embedding_module
from gcfast.method import head as head_module

MARGIN = 0.2
TRIPLETS = 50


def by_autograd(
    model: nn.Module, layer: str, batches: list[tuple[Tensor, Tensor]], plus: bool, sign: int
) -> Tensor:
    """Dense weights [N, C]: one backward pass for each valid triplet, from the layer on, float64.

    The model's own layers after the captured one run in float64; its embeddings are taken as given
    (float32), so that both sides see the same valid triplets.
    """
    explainer = gcfast.Explainer(model, layer)
    embeddings, features = [], []
    for images, _ in batches:
        captured = explainer.network.embed(images)
        embeddings.append(head_module.normalized(captured.output, True))
        features.append(captured.activations)
    table, maps = torch.cat(embeddings), torch.cat(features).double()
    labels = torch.cat([labels for _, labels in batches])
    project = model.get_submodule("project")
    assert isinstance(project, torch.nn.Linear)
    weight, bias = project.weight.double(), project.bias.double()
    distances = (table.double()[:, None] - table.double()).square().sum(-1)
    rows = []
    for a in range(len(table)):
        total, count = torch.zeros(maps.shape[1], dtype=torch.float64), 0
        leaf = maps[a : a + 1].clone().requires_grad_()
        f = F.normalize(leaf.mean((2, 3)) @ weight.T + bias, dim=1)
        for p, n in itertools.product(range(len(table)), repeat=2):
            if p == a or labels[p] != labels[a] or labels[n] == labels[a]:
                continue
            if distances[a, p] + MARGIN <= distances[a, n]:
                continue
            cotangent = sign * 2 * (table[n] - table[p]).double()[None]
            (g,) = torch.autograd.grad(f, leaf, cotangent, retain_graph=True)
            if plus:
                positive = g[0].clamp(min=0)
                sums = maps[a].sum((1, 2)).clamp(min=0)[:, None, None]
                total += (positive / (2 + positive * sums)).sum((1, 2))
            else:
                total += g[0].mean((1, 2))
            count += 1
        rows.append(total / max(count, 1))
    return torch.stack(rows)


def agreement(model: nn.Module, layer: str) -> dict[str, float]:
    """The largest |w - w_ref| / |w_ref| over the rows, for each way of building."""
    batches = loader(24, 12, 6)
    errors = {}
    probe = embedding_module.probe
    for method, evidence, path in itertools.product(
        ("gradcam", "gradcam++"), ("for", "against"), ("closed form", "autograd")
    ):
        sign = -1 if evidence == "for" else 1
        wanted = by_autograd(model, layer, batches, method == "gradcam++", sign)
        explainer = gcfast.Explainer(
            model, layer, method=method, evidence=evidence, triplets="all", channels="all"
        )
        # The autograd path is forced by a probe that recognises nothing.
        embedding_module.probe = probe if path == "closed form" else lambda *_: None
        try:
            database = explainer.build(batches)
        finally:
            embedding_module.probe = probe
        assert database.manifest["closed_form"] == (path == "closed form")
        dense = torch.zeros_like(wanted)
        dense.scatter_(1, database.channels, database.weights.double())
        drawn = database.triplet_counts > 0
        difference = (dense - wanted)[drawn].norm(dim=1) / wanted[drawn].norm(dim=1)
        errors[f"{method}, {evidence}, {path}"] = float(difference.max())
    return errors


def paper_row(model: nn.Module, layer: str, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds for one row by the paper's loop: T triplets, each through the whole network."""
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    positives = (labels == labels[0]).nonzero().flatten()[1:]
    negatives = (labels != labels[0]).nonzero().flatten()
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _module, _args, output: kept.append(
            output if isinstance(output, Tensor) else output[0]
        )
    )
    start = time.perf_counter()
    total = torch.zeros(())  # without dimensions, it adds to gradients on any device
    for t in range(TRIPLETS):
        kept.clear()
        pick = [0, int(positives[t % len(positives)]), int(negatives[t % len(negatives)])]
        a, p, n = (F.normalize(model(images[i : i + 1]), dim=1) for i in pick)
        loss = (a - p).square().sum() - (a - n).square().sum() + MARGIN
        (gradient,) = torch.autograd.grad(loss, kept[0])
        total = total + gradient.mean((0, 2, 3))
    hook.remove()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=CONVOLUTIONAL, choices=CONVOLUTIONAL)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record = {"conditions": conditions(), "images": arguments.images}
    print(record)
    for name in arguments.network:
        model, layer = network(name)
        errors = agreement(model, layer)
        print(f"{name}: largest error of a row against autograd in float64, triplets='all'")
        for way, error in errors.items():
            print(f"  {way:34s} {error:.1e}")
        assert max(errors.values()) <= 1e-5

        batches = loader(arguments.images, 32, 16)
        last = [i.contiguous(memory_format=torch.channels_last) for i, _ in batches]

        def forward(inputs: list[Tensor], model: nn.Module = model) -> None:
            with torch.inference_mode():
                for images in inputs:
                    model(images)

        record[name] = {"errors": errors}
        for method in ("gradcam", "gradcam++"):
            explainer = gcfast.Explainer(model, layer, method=method)
            same = paired(
                lambda e=explainer, b=batches: e.build(b),
                lambda x=last: forward(x),
                rounds=arguments.rounds,
                warmup=1,
            )
            print(f"  build ({method}) / one forward pass, channels-last: {same}")
            record[name][f"build {method}, same format"] = same.record()
        explainer = gcfast.Explainer(model, layer)
        written = paired(
            lambda e=explainer, b=batches: e.build(b),
            lambda b=batches: forward([images for images, _ in b]),
            rounds=arguments.rounds,
            warmup=1,
        )
        print(f"  build (gradcam) / one forward pass as a user writes it: {written}")
        record[name]["build gradcam, as written"] = written.record()

        paper = [paper_row(model, layer, batches) for _ in range(3)]
        ours = sorted(same.a)[len(same.a) // 2] / arguments.images
        speedup = sorted(paper)[1] / ours
        print(
            f"  the paper's loop, one row: {sorted(paper)[1]:.2f} s; build, one row: "
            f"{ours * 1e3:.2f} ms (gradcam++); {speedup:.0f} times faster"
        )
        record[name]["paper_row_seconds"] = paper
        record[name]["speedup_a_row"] = speedup
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
