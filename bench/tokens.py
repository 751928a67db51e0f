"""What transfers to vision transformers: deletion, insertion and heat on the telling part.

    python bench/tokens_networks.py --data DATA          # trains the networks, once
    python bench/tokens.py --data DATA [--images 54] [--only "birds, average"] [--json FILE]
    python bench/tokens.py --cost [--model vit_tiny_patch16_224] [--batch 8] [--json FILE]

The networks are those of `tokens_networks.py`: a class token or the average of the tokens, on the
demonstration's birds or on photographs of clothing. Birds that are explained are of species that
neither the networks nor the rows have; clothing is the half of the photographs that was not
learnt, of the same classes. Settings are gcfast's defaults but for the method, the layer too; and
then once more with the mean over all pairs of DistanceDifference for the objective ("distances"),
since triplets of positive loss are few in networks that have learnt their classes well.

A map is one number a patch. Deletion takes the hottest patches away, none, 1/9, 1/3, 2/3 and all of
them, equally hot ones in random order (the same order for all maps), and puts the picture's mean
color there; insertion puts them on that color. The score is the mean cosine to the picture's own
embedding over the five: low for deletion and high for insertion is good. Heat on the part is
the share of the enlarged map on the part that tells the species, and AP ranks its pixels.

"own" maps are of the picture's own triplets against the rows: by its class where the rows have it
(clothing), by its nearest row's class where they do not (birds). Controls: 50 random channels, each
with weight 1; the row of a random picture; the same map everywhere.

``--cost`` times explain_batch, method="elementwise", against Grad-CAM and against the forward pass,
turn about. The model is one of timm's, untrained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from faithfulness import blank
from paired import conditions, paired
from tokens_networks import GRID, POOLS, SETS, clothing, network_of
from torch import Tensor, nn

import gcfast
from gcfast import ops
from gcfast.evaluation.table import statistics
from gcfast.explain.direct.own_maps import cotangent_maps
from gcfast.explain.result import Finish
from gcfast.metrics import ranking_scores, region_sums
from gcfast.metrics.agreement import cosine
from gcfast.metrics.controls import random_channels, random_rows

BATCH = 18
TAKEN = (0, 9, 27, 54, 81)  # patches, of the 81
ROWS_EACH = 8  # rows of each training species
Scores = dict[str, dict[str, Tensor]]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "": {},
    ", distances": {"objective": gcfast.DistanceDifference(), "triplets": "all"},
}
# Pairs whose differences are given, with each objective.
RIVALS = {
    "element-wise": ("Grad-CAM", "proxy", "random row, element-wise", "random channels", "uniform"),
    "Grad-CAM": ("random row, Grad-CAM", "random channels", "uniform"),
    "element-wise, own": ("Grad-CAM, own", "element-wise"),
}


class Queries:
    """Pictures to explain, and what is known of them."""

    def __init__(
        self, images: Tensor, labels: list[str], regions: dict[str, Tensor], rows: Any
    ) -> None:
        self.images = images  # [n, 3, S, S]
        self.labels = labels  # the family of a bird
        self.regions = regions  # [n, S, S] bool each
        self.rows = rows  # a loader

    def batches(self) -> Iterator[slice]:
        """Ranges of pictures."""
        for start in range(0, len(self.images), BATCH):
            yield slice(start, start + BATCH)


def bird_queries(count: int) -> Queries:
    """Birds of species that are in no row."""
    from gcfast.demo.birds import as_batch, draw_bird
    from gcfast.demo.species import SPECIES, TRAINING_LABELS, UNSEEN_LABELS

    rows = []
    for label in TRAINING_LABELS:
        birds = [draw_bird(label, seed=0, index=2 * i) for i in range(ROWS_EACH)]
        rows.append((as_batch(birds), [SPECIES[label].name] * ROWS_EACH))
    chosen = [UNSEEN_LABELS[i % len(UNSEEN_LABELS)] for i in range(count)]
    birds = [draw_bird(y, seed=0, index=2 * i + 1) for i, y in enumerate(chosen)]
    regions = {
        "part": torch.stack([torch.from_numpy(bird.part) for bird in birds]),
        "bird": torch.stack([torch.from_numpy(bird.bird) for bird in birds]),
    }
    return Queries(as_batch(birds), [SPECIES[y].part for y in chosen], regions, rows)


def clothing_queries(data: Path, count: int) -> Queries:
    """Photographs that were not learnt, spread over the classes."""
    train, names = clothing(data, 0)
    test, _ = clothing(data, 1)
    rows = [
        (part / 255, [names[i] for i in labels])
        for part, labels in zip(
            train.images.split(BATCH), train.levels[0].split(BATCH), strict=True
        )
    ]
    chosen = torch.linspace(0, len(test.images) - 1, min(count, len(test.images))).long()
    labels = [names[i] for i in test.levels[0][chosen]]
    return Queries(test.images[chosen] / 255, labels, {}, rows)


def maps_of(network: nn.Module, queries: Queries) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Maps [n, GRID, GRID] in [0, 1] by name, and what was found on the way."""
    proxy = gcfast.Explainer(network, method="proxy")
    proxies = proxy.build(queries.rows)
    explainers = {
        (method, end): gcfast.Explainer(network, method=method, **settings)
        for end, settings in OBJECTIVES.items()
        for method in ("gradcam", "elementwise")
    }
    databases = {key: one.build(queries.rows) for key, one in explainers.items()}
    known, right = set(proxies.class_names), []
    parts: dict[str, Any] = {}
    for part in queries.batches():
        images, labels = queries.images[part], queries.labels[part]
        why = proxy.explain_batch(images, size=GRID, details=True)
        nearest = [names[0] for names in why.label_names]
        pairs = list(zip(labels, nearest, strict=True))
        right += [near == own or near.endswith(f"-{own}") for own, near in pairs]
        asked = [own if own in known else near for own, near in pairs]
        numbers = torch.arange(len(images)) + part.start
        rows = random_rows(numbers, len(proxies), 0)
        with proxy.network.differentiable(images) as captured:
            made = {"uniform": torch.ones((len(images), GRID, GRID)), "proxy": why.maps}
            activations = captured.activations.detach()
            chosen = torch.zeros(activations.shape[:2])
            chosen.scatter_(1, random_channels(numbers, chosen.shape[1], 50, 0), 1.0)
            made["random channels"] = ops.dense_cam(activations, chosen, size=(GRID, GRID))
            for (method, end), one in explainers.items():
                database = databases[method, end]
                if method == "gradcam":
                    kept = database.channels, database.weights
                    random = ops.sparse_cam(activations, rows[:, None], *kept, size=(GRID, GRID))
                else:
                    lent, finish = database.cotangents[rows], Finish.checked(images, size=GRID)
                    random = cotangent_maps(one.network, captured, lent, True, finish)
                name = {"gradcam": "Grad-CAM", "elementwise": "element-wise"}[method]
                made[f"{name}{end}"] = one.explain_batch(images, size=GRID)
                made[f"{name}, own{end}"] = one.explain_labelled(images, asked, size=GRID)
                made[f"random row, {name}{end}"] = random
        for name, maps in made.items():
            parts.setdefault(name, []).append(maps)
    found = {
        "layer": proxy.layer_name,
        "closed form": databases["gradcam", ""].manifest["closed_form"],
        "rows": len(proxies),
        "nearest row right": sum(right) / len(right),
    }
    return {name: torch.cat(maps) for name, maps in sorted(parts.items())}, found


@torch.inference_mode()
def faithfulness(
    network: nn.Module, images: Tensor, maps: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Deletion and insertion [n] of maps [n, GRID, GRID], by name, of images [n, 3, S, S]."""
    n, side = len(images), images.shape[2] // GRID
    ties = torch.rand((n, GRID**2), generator=torch.Generator().manual_seed(0))
    order = ties.argsort(1)
    own, empty = network(images), blank(images)
    whole, nothing = torch.ones(n), (network(empty) * own).sum(1)
    scores = {}
    for name, heat in maps.items():
        hottest = heat.flatten(1).gather(1, order).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(1, order.gather(1, hottest), torch.arange(GRID**2).expand(n, -1))
        pixels = rank.view(n, 1, GRID, GRID).repeat_interleave(side, 2).repeat_interleave(side, 3)
        curves: dict[str, list[Tensor]] = {
            "deletion": [whole, nothing], "insertion": [whole, nothing]
        }  # fmt: skip
        for count in TAKEN[1:-1]:
            gone = pixels < count
            seen = torch.where(gone, empty, images), torch.where(gone, images, empty)
            for curve, one in zip(curves.values(), seen, strict=True):
                curve.append((network(one) * own).sum(1))
        scores[name] = {curve: torch.stack(parts).mean(0) for curve, parts in curves.items()}
    return scores


def scores_of(network: nn.Module, queries: Queries, maps: dict[str, Tensor]) -> Scores:
    """Scores [n] by map and by name."""
    scores: Scores = {}
    parts = [
        faithfulness(network, queries.images[p], {name: heat[p] for name, heat in maps.items()})
        for p in queries.batches()
    ]
    for name, heat in maps.items():
        scores[name] = {c: torch.cat([part[name][c] for part in parts]) for c in parts[0][name]}
        if queries.regions:
            masks = torch.stack(list(queries.regions.values()), 1)
            shares = region_sums(heat[:, None], masks).shares()[:, 0]  # [n, regions]
            for i, region in enumerate(queries.regions):
                scores[name][f"{region} share"] = shares[:, i]
            size = queries.images.shape[2:]
            large = torch.nn.functional.interpolate(heat[:, None], size=size, mode="bilinear")
            scores[name]["part AP"] = ranking_scores(large[:, 0], masks[:, 0])[0]
    # What is transferred, and what a random row's would have been.
    for kind in ("Grad-CAM", "element-wise"):
        for end in OBJECTIVES:
            for name in (f"{kind}{end}", f"random row, {kind}{end}"):
                scores[name]["cosine to own"] = cosine(maps[name], maps[f"{kind}, own{end}"])
    return scores


def told(scores: Scores) -> dict[str, Any]:
    """Print means and paired differences with their intervals; returns both."""
    columns = list(scores["Grad-CAM"])
    record: dict[str, Any] = {"means": {}, "differences": {}}
    print(" " * 46 + "".join(f"{c:>22s}" for c in columns))
    for name, row in scores.items():
        record["means"][name] = {c: float(v.mean()) for c, v in row.items()}
        cells = "".join(f"{float(row[c].mean()):22.4f}" if c in row else 22 * " " for c in columns)
        print(f"{name:46s}{cells}", flush=True)
    for name, rival in _pairs():
        title, cells = f"{name} less {rival}", ""
        record["differences"][title] = {}
        for c in columns:
            if c not in scores[name] or c not in scores[rival]:
                cells += 22 * " "
                continue
            one = statistics((scores[name][c] - scores[rival][c])[:, None])[0]
            record["differences"][title][c] = [one.mean, one.low, one.high]
            cells += f"{one.mean:7.4f} {one.low:6.3f} {one.high:6.3f}".rjust(22)
        print(f"{title:46s}{cells}", flush=True)
    return record


def _pairs() -> Iterator[tuple[str, str]]:
    """The names of maps whose differences are given."""
    for end in OBJECTIVES:
        for name, rivals in RIVALS.items():
            for rival in rivals:
                alone = rival in ("proxy", "random channels", "uniform")
                yield f"{name}{end}", rival if alone else f"{rival}{end}"


def cost(model: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time explain_batch of a transformer by both methods, and its forward pass."""
    from peers import make_torchvision_importable

    make_torchvision_importable()
    import timm

    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=0).eval().requires_grad_(False)
    rows = [(torch.randn(8, 3, 224, 224), [i % 3 for i in range(8)]) for _ in range(2)]
    explainers = {m: gcfast.Explainer(network, method=m) for m in ("gradcam", "elementwise")}
    for one in explainers.values():
        one.build(rows)
    images = torch.randn(batch, 3, 224, 224)

    def forward() -> Tensor:
        with torch.inference_mode():
            return network(images)

    plain, element = (
        lambda: explainers["gradcam"].explain_batch(images),
        lambda: explainers["elementwise"].explain_batch(images),
    )
    record: dict[str, Any] = {"layer": explainers["elementwise"].layer_name, "batch": batch}
    for title, a, b in (
        ("element-wise / Grad-CAM", element, plain),
        ("element-wise / forward", element, forward),
        ("Grad-CAM / forward", plain, forward),
    ):
        timed = paired(a, b, rounds=rounds)
        print(f"{model}, B = {batch}, {record['layer']}: {title} {timed}", flush=True)
        record[title] = timed.record()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--images", type=int, default=54)
    parser.add_argument("--only", choices=[f"{n}, {p}" for n in SETS for p in POOLS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"conditions": conditions()}
    if options.cost:
        record[options.model] = cost(options.model, options.batch, options.rounds)
    else:
        if options.json and options.json.exists():
            record = json.loads(options.json.read_text()) | record
        for name in SETS:
            pools = [p for p in POOLS if options.only in (None, f"{name}, {p}")]
            if not pools:
                continue
            queries = (
                bird_queries(options.images)
                if name == "birds"
                else clothing_queries(options.data, options.images)
            )
            for pool in pools:
                network = network_of(name, pool, options.data, options.cache)
                maps, found = maps_of(network, queries)
                print(f"\n{name}, {pool}, {len(queries.images)} pictures: {found}", flush=True)
                scores = scores_of(network, queries, maps)
                about = {"images": len(queries.images)} | found
                record[f"{name}, {pool}"] = about | told(scores)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
