"""The quality table on photographs: `python bench/photographs.py [--data DIR] [--json FILE]`.

Photographs with instance masks in COCO's layout. The rows of the database are crops of instances
(boxes of at least 32 pixels a side), the queries whole photographs; both are squashed to
224 x 224. Two folds by picture: rows from every other photograph, queries from the rest, and the
other way round. EfficientNet-Lite0 with ImageNet weights, nothing trained; its averaged
activations are the embedding. Every map is for the nearest row of a class that is on the picture,
the same for all methods.

Scores, of the map at the size of the picture; own is the mask of all instances of that class:
  share  of the heat on labelled objects, the part on own      pictures with other classes
  right  how often own has a higher mean heat a pixel than     pictures with other classes
         the mask of any other class
  mask   share of the heat on own                              all pictures
  AP     average precision of own's pixels by heat             all pictures
  IoU    of own at the best threshold of each map              all pictures
A flat map has share, right and mask 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paired import conditions
from photographs_data import SIDE, Backbone, load_photographs
from photographs_maps import MAIN_ROW, PROXY_ROW, Explained, explain, folds
from photographs_trials import confidence, further_maps
from PIL import Image
from scenes_overlays import MATCH, outlined
from torch import Tensor

from gcfast.evaluation.table import Statistic, aligned, statistics, upsampled
from gcfast.images.overlay import overlay
from gcfast.metrics import mask_score, ranking_scores

AREAS = (0.0, 0.02, 0.1, 1.0)
COLUMNS = ("share", "right", "mask", "AP", "IoU")
BEST = f"{PROXY_ROW}, refined"
RIVALS = ("EmbeddingCAM, refined", f"{MAIN_ROW}, center=1")

Scores = dict[str, dict[str, Tensor]]  # row to column to [pictures]


@dataclass(frozen=True)
class Regions:
    """What the maps of some queries are scored against."""

    own: Tensor  # bool [B, S, S], the class that is explained
    others: list[Tensor]  # B of bool [n, S, S], every other class on the picture

    @classmethod
    def of(cls, explained: Explained) -> Regions:
        own, others = [], []
        for one, label in zip(explained.fold.queries, explained.classes, strict=True):
            masks = {name: torch.from_numpy(mask) for name, mask in one.masks.items()}
            own.append(masks.pop(label))
            others.append(torch.stack([*masks.values()]) if masks else own[-1][None][:0])
        return cls(torch.stack(own), others)


def score(maps: Tensor, regions: Regions) -> dict[str, Tensor]:
    """The columns of maps [B, h, w], [B] each; NaN where a column does not apply."""
    own = regions.own
    large = upsampled(maps[:, None], (own.shape[1], own.shape[2]))[:, 0]
    share, right = torch.full((2, len(maps)), torch.nan)
    for i, others in enumerate(regions.others):
        if not len(others):
            continue
        heat, mask = large[i].double(), own[i]
        labelled = float(heat[mask | others.any(0)].sum())
        share[i] = float(heat[mask].sum()) / labelled if labelled > 0 else 0.0
        rival = max(float(heat[other].mean()) for other in others)
        right[i] = float(heat[mask].mean()) > rival * (1 + 1e-6)  # a tie is a miss
    precision, overlap = ranking_scores(large, own)
    columns = (share, right, mask_score(large, own), precision, overlap)
    return dict(zip(COLUMNS, columns, strict=True))


def scores_of(folds: Sequence[Regions], maps: Sequence[dict[str, Tensor]]) -> Scores:
    """All rows of all folds' pictures."""
    table: Scores = {}
    for name in maps[0]:
        found = [score(m[name], regions) for m, regions in zip(maps, folds, strict=True)]
        table[name] = {c: torch.cat([part[c] for part in found]) for c in COLUMNS}
    return table


def gains(row: dict[str, Tensor], rival: dict[str, Tensor]) -> dict[str, Statistic]:
    """Means over the pictures of row less rival, with paired bootstrap intervals."""
    return {c: statistics((row[c] - rival[c])[:, None])[0] for c in COLUMNS}


def means(scores: Scores, chosen: Tensor | None = None) -> dict[str, dict[str, float]]:
    """Row to column to the mean over the chosen pictures that have it."""
    part = slice(None) if chosen is None else chosen
    return {r: {c: float(v[part].nanmean()) for c, v in cs.items()} for r, cs in scores.items()}


def say(title: str, rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    cells = [[title, *names], *([r, *(f"{v[c]:.3f}" for c in names)] for r, v in rows.items())]
    print(f"\n{aligned(cells)}")


def trials(options: argparse.Namespace, explained: Sequence[Explained]) -> list[dict[str, Tensor]]:
    """The maps of `photographs_trials`, one dict a fold."""
    twice = {p.name: p for p in load_photographs(options.data, options.limit, 2 * SIDE)}
    return [
        further_maps(one, [twice[query.name] for query in one.fold.queries]) for one in explained
    ]


def save_overlays(explained: Sequence[Explained], path: Path) -> None:
    """Twelve photographs, spread evenly, with three maps each and the class that they are for."""
    lines: list[NDArray[np.uint8]] = []
    for one in explained:
        step = -(-len(one.fold.queries) // 6)
        for i in range(0, len(one.fold.queries), step):
            photograph, label = one.fold.queries[i], one.classes[i]
            marked = outlined(photograph.image, photograph.masks[label][None], [MATCH])
            panels = [marked]
            for name in (RIVALS[1], RIVALS[0], BEST):
                low = one.maps[name][i : i + 1, None]
                heat = upsampled(low / low.amax().clamp(min=1e-12), marked.shape[:2])[0, 0]
                panels.append(overlay(photograph.image, heat.clamp(0, 1).numpy()))
            print(f"overlays, line {len(lines) + 1}: {photograph.name}, {label}")
            lines.append(np.concatenate(panels, axis=1))
    half = -(-len(lines) // 2)
    lines += [np.zeros_like(lines[0])] * (2 * half - len(lines))
    sides = [np.concatenate(lines[:half]), np.concatenate(lines[half:])]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sides, axis=1)).save(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables; returns what goes to the file."""
    photographs = load_photographs(options.data, options.limit)
    network = Backbone().eval().requires_grad_(False)
    explained = [explain(network, fold, options.seed) for fold in folds(photographs)]
    regions = [Regions.of(one) for one in explained]
    scores = scores_of(regions, [one.maps for one in explained])
    area = torch.cat([one.own.float().mean((1, 2)) for one in regions])
    facts: dict[str, Any] = {
        "photographs": len(photographs),
        "queries": len(area),
        "queries with other classes": int((~scores[BEST]["share"].isnan()).sum()),
        "rows": [len(one.fold.labels) for one in explained],
        "classes of the rows": [len(one.fold.classes) for one in explained],
        "seed": options.seed,
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    record: dict[str, Any] = {"conditions": conditions(), "facts": facts}
    record["means"] = means(scores)
    say("", record["means"])
    record["by area"] = {}
    for low, high in pairwise(AREAS):
        chosen = (area >= low) & (area < high)
        if bool(chosen.any()):
            title = f"own is {low:.0%} to {high:.0%} of the picture ({int(chosen.sum())})"
            record["by area"][title] = means({r: scores[r] for r in (BEST, *RIVALS)}, chosen)
            say(title, record["by area"][title])
    if options.overlays:
        save_overlays(explained, options.overlays)
    record["gains"] = {}
    for row in (BEST, PROXY_ROW):
        for rival in RIVALS:
            found = gains(scores[row], scores[rival])
            print(f"\n{row} less {rival}")
            for c, one in found.items():
                print(f"  {c:6s}{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]")
            record["gains"][f"{row} less {rival}"] = {c: s._asdict() for c, s in found.items()}
    if options.trials:
        tried = scores_of(regions, trials(options, explained))
        record["trials"] = means(tried)
        small = means(tried, area < AREAS[1])
        for name, values in record["trials"].items():
            values["AP, small"] = small[name]["AP"]
        say("tried", record["trials"])
        searched, table = confidence(explained)
        record["second search"], record["confidence"] = searched, table
        say("class on the picture", {name: {"share": v} for name, v in searched.items()})
        say("confidence", table)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder in COCO's layout")
    parser.add_argument("--limit", type=int, help="the first photographs alone")
    parser.add_argument("--trials", action="store_true", help="what else was tried as well")
    parser.add_argument("--overlays", type=Path, metavar="PNG", help="twelve pictures with maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = measure(options)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
