"""Heat maps of the rank siamese network, and how much of their heat lies on what drives prices.

Databases are built by back-propagating the cross-entropy of 50 pairs a house (gcfast.RankLoss);
maps of other houses take the weights of their nearest row. Three questions, three databases:

  all     the paper's: pairs with houses of any other price
  lower   what puts a house above the cheaper ones: what adds to its price
  higher  what keeps it below the dearer ones: what takes away from it

Columns, means over the tiles that have the part:
  drivers    share of the heat on the house's roof, pool, trees or busy road
  raises     on roof, pool or trees
  pool, busy road
  share      of the heat on either, the part that lies on what raises the price; busy roads only.
             It should be high for "lower" and low for "higher"; no control can have both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from house_data import Houses
from house_network import LAYER, RankSiamese, to_input
from house_tiles import PARTS
from torch import Tensor

import gcfast
from gcfast import ops
from gcfast.explain.calibration import Fidelity, transfer_fidelity
from gcfast.metrics import mask_score
from gcfast.metrics.controls import random_channels, random_rows

PAIRS, CHANNELS = 50, 50  # of the paper
BATCH = 128
FIDELITY = 128  # houses whose transferred map is compared with their own
VISIBLE = 8  # pixels of a part from which on a tile has it
QUESTIONS = ("all", "lower", "higher")
COLUMNS = ("drivers", "raises", "pool", "busy road", "share")


@dataclass(frozen=True)
class Weights:
    """Rows of channels and weights with their offsets, as gcfast.Database has them."""

    channels: Tensor  # [N, M]
    weights: Tensor  # [N, M], by falling weight
    mean: Tensor  # [C]: mean activation

    def strongest(self, m: int) -> Weights:
        """The top m of each row."""
        return Weights(self.channels[:, :m], self.weights[:, :m], self.mean)

    def negated(self) -> Weights:
        """Rows of all channels for the other evidence: Grad-CAM is linear in its gradients."""
        return Weights(self.channels.flip(1), -self.weights.flip(1), self.mean)

    @property
    def offsets(self) -> Tensor:
        """[N]."""
        return (self.weights * self.mean[self.channels]).sum(1)


def explainer(
    network: RankSiamese, question: str, seed: int, **settings: object
) -> gcfast.Explainer:
    """An explainer of the branch that asks one of QUESTIONS, with the paper's settings."""
    return gcfast.Explainer(
        network.branch,
        LAYER,
        **{  # type: ignore[arg-type]
            "objective": gcfast.RankLoss(network.rank, partners=question),
            "l2_normalize": False,
            "triplets": PAIRS,
            "channels": CHANNELS,
            "seed": seed,
            **settings,
        },
    )


class Sales:
    """Batches (tiles, prices, numbers as ids) of the training houses, the same on every pass.

    A house may be sold twice, so that its tile's name would not do as an id.
    """

    def __init__(self, houses: Houses) -> None:
        self.houses = houses

    def __len__(self) -> int:
        return -(-self.houses.train // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for start in range(0, self.houses.train, BATCH):
            part = slice(start, min(self.houses.train, start + BATCH))
            yield (
                to_input(self.houses.images[part]),
                torch.from_numpy(self.houses.price[part]),
                [str(i) for i in range(part.start, part.stop)],
            )


def databases(
    network: RankSiamese, houses: Houses, seed: int, *, progress: bool = False
) -> dict[str, gcfast.Database]:
    """One for each question, with all channels: its first 50 columns are the paper's."""
    return {
        question: explainer(network, question, seed, channels="all").build(
            Sales(houses), progress=progress
        )
        for question in QUESTIONS
    }


def strongest(database: gcfast.Database, m: int) -> gcfast.Database:
    """The same rows with their top m channels alone."""
    channels, weights = database.channels[:, :m].contiguous(), database.weights[:, :m].contiguous()
    tensors = {
        "embeddings": database.embeddings,
        "channels": channels,
        "weights": weights,
        "offsets": Weights(channels, weights, database.mean_activation).offsets,
        "labels": database.labels,
        "triplet_counts": database.triplet_counts,
    }
    settings = {**database.manifest["settings"], "channels": m}
    return gcfast.Database(tensors, database.ids, {**database.manifest, "settings": settings})


def pointing_up(tables: dict[str, gcfast.Database], houses: Houses) -> tuple[float, float]:
    """Share of the paper's rows whose evidence for is what raises the price.

    Returns:
        The share among the dearest and among the cheapest third of the training houses.
    """
    C = len(tables["all"].mean_activation)
    dense = {}
    for name in ("all", "lower"):
        rows = torch.zeros(len(tables[name]), C)
        rows.scatter_(1, tables[name].channels, tables[name].weights)
        dense[name] = dict(zip(tables[name].ids, rows, strict=True))
    up = {
        int(i): float(row @ dense["lower"][i]) > 0
        for i, row in dense["all"].items()
        if i in dense["lower"]
    }
    ranked = np.argsort(houses.price[: houses.train])
    third = len(ranked) // 3
    shares = [
        float(np.mean([up[i] for i in part.tolist() if i in up]))
        for part in (ranked[-third:], ranked[:third])
    ]
    return shares[0], shares[1]


def fidelity(
    network: RankSiamese, houses: Houses, tables: dict[str, gcfast.Database], seed: int
) -> dict[str, Fidelity]:
    """How the transferred map agrees with the map from the house's own pairs.

    For each question, over FIDELITY test houses spread evenly over time. A test house's own pairs
    take its price, which transfer does not know.
    """
    n = houses.train
    chosen = np.linspace(n, len(houses) - 1, min(FIDELITY, len(houses) - n)).round().astype(int)
    own = [(to_input(houses.images[chosen]), houses.price[chosen])]
    found = {}
    for question, database in tables.items():
        one = explainer(network, question, seed, database=strongest(database, CHANNELS))
        found[question] = transfer_fidelity(one, own)
    return found


def part_masks(houses: Houses, rows: slice) -> dict[str, Tensor]:
    """Boolean [B, S, S] by the name of a column."""
    assert houses.masks is not None
    masks = torch.from_numpy(houses.masks[rows])
    roof, pool, trees, road = (masks[:, PARTS.index(p)] for p in PARTS)
    raises = roof | pool | trees
    return {"drivers": raises | road, "raises": raises, "pool": pool, "busy road": road}


def scores(maps: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each column for a batch of maps [B, S, S]; NaN where a tile lacks the part."""
    out = {}
    for name, mask in masks.items():
        has = mask.sum((1, 2)) >= VISIBLE
        out[name] = torch.where(has, mask_score(maps, mask), torch.nan)
    raised = mask_score(maps, masks["raises"])
    lowered = mask_score(maps, masks["busy road"])
    either = raised + lowered
    has = (masks["busy road"].sum((1, 2)) >= VISIBLE) & (masks["raises"].sum((1, 2)) >= VISIBLE)
    # A map with nothing on either says nothing on them: half.
    share = torch.where(either > 0, raised / either.clamp(min=1e-12), 0.5)
    out["share"] = torch.where(has, share, torch.nan)
    return out


def _makers(
    tables: dict[str, Weights],
    nearest: dict[str, Tensor],
    channels: int,
    first: int,
    seed: int,
) -> Iterator[tuple[str, Weights | None, Tensor]]:
    """(name of the row, weights, the row each image takes); None is the uniform map.

    The random rows are drawn for each image by its number, ``first`` being that of the batch's
    first one.
    """
    B = len(nearest["all"])
    mean = tables["all"].mean
    C, own = len(mean), torch.arange(B)
    zeros = torch.zeros_like(own)
    yield "uniform", None, own
    yield "channel sum", Weights(torch.arange(C)[None], torch.ones(1, C), mean), zeros
    images = torch.arange(first, first + B)
    picks = random_channels(images, C, channels, seed)
    yield "random channels", Weights(picks, torch.ones(picks.shape), mean), own
    for question, rows in tables.items():
        taken = nearest[question]
        if question == "all":
            yield "all pairs, all channels", rows, taken
            yield f"all pairs, against, top-{channels}", rows.negated().strongest(channels), taken
        top = rows.strongest(channels)
        other = random_rows(images, len(rows.channels), seed)
        yield f"{question} pairs, random neighbor", top, other
        yield f"{question} pairs, top-{channels}", top, taken


def score_table(
    network: RankSiamese,
    houses: Houses,
    databases: dict[str, gcfast.Database],
    *,
    seed: int,
    center: float,
) -> dict[str, dict[str, Tensor]]:
    """Row to column to the scores of the test houses, one forward pass for all rows."""
    tables = {
        name: Weights(d.channels, d.weights, d.mean_activation) for name, d in databases.items()
    }
    rows = {name: d.embeddings for name, d in databases.items()}
    branch = explainer(network, "all", seed).network
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for start in range(houses.train, len(houses), BATCH):
        part = slice(start, min(len(houses), start + BATCH))
        images = to_input(houses.images[part])
        captured = branch.embed(images)
        nearest = {
            name: ops.knn(captured.output, table, 1)[1][:, 0] for name, table in rows.items()
        }
        masks = part_masks(houses, part)
        for name, weights, taken in _makers(tables, nearest, CHANNELS, start, seed):
            if weights is None:
                maps = torch.ones(images.shape[0], *images.shape[2:])
            else:
                maps = ops.sparse_cam(
                    captured.activations,
                    taken[:, None],
                    weights.channels,
                    weights.weights,
                    size=(images.shape[2], images.shape[3]),
                    offsets=weights.offsets,
                    center=center,
                )
            for column, values in scores(maps, masks).items():
                parts.setdefault(name, {}).setdefault(column, []).append(values)
    return {
        name: {column: torch.cat(values) for column, values in columns.items()}
        for name, columns in parts.items()
    }
