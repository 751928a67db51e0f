"""What else was tried on the photographs, for `bench/photographs.py --trials`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from photographs_data import Backbone, Outputs, Photograph, outputs
from photographs_maps import PROXY, Explained, class_proxies, proxy_maps, refined
from torch import Tensor

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
    like = like / like.sum(2, keepdim=True)
    return torch.einsum("bpq,bq->bp", like, resized(maps, (H, W)).flatten(1)).view(B, H, W)


def further_maps(
    network: Backbone, one: Explained, larger: Sequence[Photograph]
) -> dict[str, Tensor]:
    """Maps with a finer start or kept extents, refined like the table's.

    Args:
        network: As for the table.
        one: A fold.
        larger: Its queries at twice the side.
    """
    start, target = one.maps[PROXY], one.target
    twice = outputs(network, [photograph.image for photograph in larger])
    fine = proxy_maps(twice.activations, one.proxies[target])
    both = resized(fine, fine.shape[1:]) + resized(start, fine.shape[1:])
    rows = outputs(network, one.fold.crops).finer[0].mean((2, 3))
    earlier = class_proxies(rows, one.fold.numbers, len(one.fold.classes))[target]
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
    final = one.maps[f"{PROXY}, refined"]
    found["square root of the refined map"] = final.sqrt()
    found["mean of the map before and after"] = (resized(start, final.shape[1:]) + final) / 2
    return found


def best_of_class(one: Explained, embeddings: Tensor) -> Tensor:
    """The highest similarity of embeddings [B, C] to a row of each class, [B, K]."""
    best = torch.full((len(embeddings), len(one.fold.classes)), -1.0)
    labels = one.fold.numbers[None].expand(len(embeddings), -1)
    return best.scatter_reduce_(1, labels, embeddings @ one.rows.T, "amax")


def log_ratio(best: Tensor, chosen: Tensor) -> Tensor:
    """log[(1 - s_other) / (1 - s_mine)] of the best similarities [B, K] for classes [B]."""
    mine = best.gather(1, chosen[:, None])[:, 0]
    other = best.scatter(1, chosen[:, None], -2.0).amax(1)
    return (1 - other).clamp(min=1e-4).log() - (1 - mine).clamp(min=1e-4).log()


def hot_embeddings(query: Outputs, maps: Tensor) -> Tensor:
    """The activations pooled by the square of maps [B, h, w], as unit vectors."""
    weight = resized(maps, query.activations.shape[2:]).square() + 1e-12
    return F.normalize(torch.einsum("nchw,nhw->nc", query.activations, weight), dim=1)


def second_search(one: Explained) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What the nearest row of all says, no class given.

    Returns:
        Ratio to whether the class after the second search is on the picture, [B] bool; signals
        of confidence in the first search's class, [B]; and whether that class is there, [B] bool.
    """
    numbers = one.fold.numbers
    first = numbers[one.first]
    maps = proxy_maps(one.query.activations, one.proxies[first])
    whole = F.normalize(one.query.pooled, dim=1)
    hot = best_of_class(one, hot_embeddings(one.query, refined(maps, one.query.finer)))
    best = best_of_class(one, whole)
    other = hot.argmax(1)
    far = (1 - hot.gather(1, first[:, None]))[:, 0] / (1 - hot.gather(1, other[:, None]))[:, 0]
    names = [photograph.masks.keys() for photograph in one.fold.queries]

    def there(classes: Tensor) -> Tensor:
        chosen = [one.fold.classes[k] for k in classes.tolist()]
        return torch.tensor([c in on for c, on in zip(chosen, names, strict=True)])

    after = {f"switch at {r}": there(torch.where(far >= r, other, first)) for r in RATIOS}
    signals = {
        "similarity of the nearest row": (whole * one.rows[one.first]).sum(1),
        "log ratio, hot pixels": log_ratio(hot, first),
        "log ratio, whole picture": log_ratio(best, first),
    }
    return after, signals, there(first)


def auroc(signal: Tensor, right: Tensor) -> float:
    """How often a right one has the higher signal than a wrong one; ties count half."""
    difference = signal[right][:, None] - signal[~right][None]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def logistic(signal: Tensor, right: Tensor) -> tuple[float, float]:
    """Fits sigmoid(a + b signal) by maximum likelihood; returns a and b."""
    x = torch.stack([torch.ones_like(signal), signal], 1).double()
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):  # Newton's method
        p = torch.sigmoid(x @ weights)
        # The ridge keeps the matrix invertible where the signal separates the two.
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * torch.eye(2, dtype=torch.float64)
        weights = weights - torch.linalg.solve(curvature, x.T @ (p - right.double()))
    a, b = weights.tolist()
    return a, b


def calibration_error(probability: Tensor, right: Tensor, bins: int = 5) -> float:
    """Mean distance of stated and found shares over groups of equal size."""
    groups = probability.argsort().tensor_split(bins)
    gaps = [
        len(g) * float((probability[g].mean() - right[g].double().mean()).abs()) for g in groups
    ]
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
            a, b = logistic(found[there][1][name], found[there][2])
            stated.append(torch.sigmoid(a + b * found[here][1][name].double()))
        areas = [auroc(signals[name], right) for _, signals, right in found]
        right = torch.cat([r for _, _, r in found])
        table[name] = {
            "AUROC, mean of the folds": sum(areas) / len(areas),
            "calibration error": calibration_error(torch.cat(stated), right),
            "Brier score": float((torch.cat(stated) - right.double()).square().mean()),
        }
    return searched, table
