"""What else was tried on the photographs, for `bench/photographs.py --trials`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from photographs_data import Photograph
from photographs_maps import PROXY_ROW, Explained, outputs
from torch import Tensor

from gcfast import ops
from gcfast.explain.confidence import Confidence
from gcfast.method.proxies import Classes, directions, proxy_weights
from gcfast.method.tail import pooled_by
from gcfast.metrics import auroc
from gcfast.search.classes import nearest_by_class

RATIOS = (1.0, 1.1, 1.25, 1.5)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, h, w] divided by their maxima, at another size."""
    high = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return F.interpolate(high[:, None], list(size), mode="bilinear", align_corners=False)[:, 0]


def spread(maps: Tensor, features: Tensor, power: int) -> Tensor:
    """Heat shared out to places of like activations [B, C, H, W], by their cosine's power."""
    B, _, H, W = features.shape
    unit = F.normalize(features.flatten(2), dim=1)
    like = torch.einsum("bcp,bcq->bpq", unit, unit).clamp(min=0) ** power
    like = like / like.sum(2, keepdim=True).clamp(min=1e-12)  # a place may have no activations
    return torch.einsum("bpq,bq->bp", like, resized(maps, (H, W)).flatten(1)).view(B, H, W)


def proxy_maps(activations: Tensor, proxies: Tensor) -> Tensor:
    """Maps [B, H, W] of proxies [B, C] at any size of the input or layer."""
    weights = proxy_weights(activations, proxies)
    return torch.einsum("nc,nchw->nhw", weights, activations).clamp(min=0)


def proxies_of(one: Explained, rows: Tensor) -> Tensor:
    """The proxies [B, C] of the classes of rows [B]."""
    proxies, labels = one.trained.proxies, one.trained.database.labels[rows]
    return proxies.mixed(proxies.places(labels[:, None]))


def refined(maps: Tensor, finer: Sequence[Tensor]) -> Tensor:
    for one in finer:
        maps = ops.refine(maps, one)
    return maps


def further_maps(one: Explained, larger: Sequence[Photograph]) -> dict[str, Tensor]:
    """Maps with a finer start or kept extents, refined like the table's.

    Args:
        one: A fold.
        larger: Its queries at twice the side.
    """
    start, target = one.maps[PROXY_ROW], one.target
    twice = outputs(one.trained, [photograph.image for photograph in larger])
    fine = proxy_maps(twice.activations, proxies_of(one, one.nearest))
    both = resized(fine, fine.shape[1:]) + resized(start, fine.shape[1:])
    rows = directions(outputs(one.trained, one.fold.crops).finer[0].mean((2, 3)))
    earlier = Classes.of(rows, one.fold.numbers).proxies()[target]
    early = proxy_maps(one.query.finer[0], earlier)
    joined = resized(start, early.shape[1:]) + resized(early, early.shape[1:])
    found = {
        "input twice the size": fine,
        "input twice the size, refined": refined(fine, twice.finer),
        "sum of both sizes, refined": refined(both, one.query.finer),
        "start at 14 x 14": early,
        "start at 14 x 14, refined": refined(early, one.query.finer[1:]),
        "sum of 7 x 7 and 14 x 14, refined": refined(joined, one.query.finer),
    }
    for power in (4, 16):
        first = refined(start, one.query.finer[:1])
        found[f"spread to the like (cosine^{power}), then refined"] = refined(
            spread(start, one.query.activations, power), one.query.finer
        )
        found[f"refined to 14 x 14, then spread (cosine^{power})"] = spread(
            first, one.query.finer[0], power
        )
    final = one.maps[f"{PROXY_ROW}, refined"]
    found["square root of the refined map"] = final.sqrt()
    found["mean of the map before and after"] = (resized(start, final.shape[1:]) + final) / 2
    return found


def second_search(one: Explained) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What the nearest row of all says, no class given.

    Returns:
        Ratio to whether the class after the second search is on the picture, [B] bool; signals
        of confidence in the first search's class, [B]; and whether that class is there, [B] bool.
    """
    numbers, query, table = one.fold.numbers, one.query, one.trained.table
    first = numbers[query.nearest]
    start = proxy_maps(query.activations, proxies_of(one, query.nearest))
    maps = resized(refined(start, query.finer), start.shape[1:])
    hot = F.normalize(pooled_by(query.activations, maps.square()), dim=1)
    near, whole = (nearest_by_class(q, table, numbers, first) for q in (hot, query.embeddings))
    on_picture = [photograph.masks.keys() for photograph in one.fold.queries]

    def there(classes: Tensor) -> Tensor:
        names = [one.fold.classes[k] for k in classes.tolist()]
        return torch.tensor([name in on for name, on in zip(names, on_picture, strict=True)])

    after = {
        f"switch at {ratio}": there(
            torch.where(near.own >= ratio * near.other, numbers[near.other_row], first)
        )
        for ratio in RATIOS
    }
    signals = {
        "similarity of the nearest row": -query.distances,
        "log-ratio, hot pixels": near.log_ratio,
        "log-ratio, whole picture": whole.log_ratio,
    }
    return after, signals, there(first)


def calibration_error(probability: Tensor, right: Tensor, bins: int = 5) -> float:
    """Mean distance of stated and found shares over groups of equal size."""
    groups = probability.argsort().tensor_split(bins)
    gaps = [len(g) * float((probability[g].mean() - right[g].float().mean()).abs()) for g in groups]
    return sum(gaps) / len(probability)


def confidence(folds: Sequence[Explained]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Share of right classes by ratio, and for each signal AUROC and error of calibration.

    Each fold's probabilities come from a fit on the other fold.
    """
    found = [second_search(one) for one in folds]
    searched = {"first search": float(torch.cat([r for _, _, r in found]).double().mean())}
    for name in found[0][0]:
        searched[name] = float(torch.cat([after[name] for after, _, _ in found]).double().mean())
    table = {}
    for name in found[0][1]:
        stated = []
        for here, there in ((0, 1), (1, 0)):
            fitted = Confidence.fit(found[there][1][name], found[there][2])
            stated.append(fitted(found[here][1][name]))
        areas = [auroc(signals[name], right) for _, signals, right in found]
        right = torch.cat([r for _, _, r in found])
        table[name] = {
            "AUROC, mean of the folds": sum(areas) / len(areas),
            "calibration error": calibration_error(torch.cat(stated), right),
            "Brier score": float((torch.cat(stated) - right.float()).square().mean()),
        }
    return searched, table
