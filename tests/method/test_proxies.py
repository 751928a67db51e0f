"""Class proxies by the formula, sums that are exact in any order, and what the method refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gcfast
from gcfast.method.proxies import Classes, Proxies, directions, proxy_weights


def rows(count: int = 40, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    pooled = torch.rand(count, channels, dtype=torch.float64)
    labels = torch.randint(3, (count,)) * 10 - 10
    labels[0] = 77  # seen once
    return pooled, labels


def test_proxies_are_contrasted_means_of_unit_vectors() -> None:
    pooled, labels = rows()
    r = F.normalize(pooled, dim=1)
    known = labels.unique()
    means = torch.stack([r[labels == label].mean(0) for label in known])
    classes = Classes.of(directions(pooled), labels)
    assert torch.equal(classes.labels, known)
    assert classes.counts.tolist() == [int((labels == label).sum()) for label in known]
    torch.testing.assert_close(
        classes.proxies(), (means - means.mean(0)).float(), atol=1e-7, rtol=0
    )


def test_weights_leave_half_of_the_tangent() -> None:
    activations, proxies = torch.rand(4, 6, 3, 5), torch.randn(4, 6)
    for b in range(4):
        x = activations[b].mean((1, 2)).double()
        q, a = x / x.norm(), proxies[b].double()
        wanted = a - 0.5 * q * (q @ a)
        got = proxy_weights(activations, proxies)[b]
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


def test_sums_are_the_same_bits_in_any_order() -> None:
    pooled, labels = rows(500)
    r = directions(pooled)
    whole = Classes.of(r, labels)
    order = torch.randperm(500)
    first, second = order[:123], order[123:]
    joined = Classes.of(r[first], labels[first]).plus(Classes.of(r[second], labels[second]))
    left = whole.minus(Classes.of(r[first], labels[first])).only(labels[second])
    assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
    alone = Classes.of(r[second], labels[second])
    assert all(torch.equal(a, b) for a, b in zip(left, alone, strict=True))


def test_rows_without_a_direction_are_not_counted() -> None:
    pooled, labels = rows(12)
    labels[3:] = labels[3:].clamp(max=0)
    zero = torch.cat([pooled, torch.zeros(2, 6)])
    classes = Classes.of(directions(zero), torch.cat([labels, labels[5:6], torch.tensor([99])]))
    plain = Classes.of(directions(pooled), labels)
    assert torch.equal(classes.proxies()[:-1], plain.proxies())
    assert torch.equal(
        classes.proxies()[-1], torch.zeros(6)
    )  # a flat map, not the others' opposite


def test_classes_become_one_under_one_label() -> None:
    pooled, labels = rows()
    r = directions(pooled)
    merged = Classes.of(r, labels).renamed(torch.tensor([5, 1, 5, 2]))
    renamed = torch.tensor([5, 1, 5, 2])[torch.searchsorted(labels.unique(), labels)]
    again = Classes.of(r, renamed)
    assert all(torch.equal(a, b) for a, b in zip(merged, again, strict=True))


def test_neighbors_are_mixed_and_missing_ones_weigh_nothing() -> None:
    pooled, labels = rows()
    classes = Classes.of(directions(pooled), labels)
    proxies = Proxies.of(classes, torch.device("cpu")).of_rows(labels)
    vectors = dict(zip(classes.labels.tolist(), classes.proxies(), strict=True))
    a, b, none = vectors[-10], vectors[77], torch.zeros(6)
    asked = torch.tensor([[77, -10], [-10, -1], [-1, -1], [7, 77]])
    shares = torch.tensor([[0.75, 0.25], [0.5, 0.0], [0.0, 0.0], [0.5, 0.5]])
    wanted = torch.stack([0.75 * b + 0.25 * a, 0.5 * a, none, 0.5 * b])
    torch.testing.assert_close(proxies.mixed(proxies.places(asked), shares), wanted)
    alone = proxies.mixed(proxies.places(asked[:, :1]))
    assert torch.equal(alone, torch.stack([b, a, none, none]))
    assert proxies.rows is not None
    neighbors = torch.tensor([[0], [5], [-1]])
    by_row = proxies.mixed(proxies.rows[neighbors])
    assert torch.equal(by_row, torch.stack([b, vectors[int(labels[5])], none]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"triplets": 49}, "`triplets` must be left out with method='proxy', which draws no"),
        ({"channels": "all"}, "`channels` must be left out .* weighs every channel, got 'all'"),
        ({"evidence": "against"}, "`evidence` must be left out .* either sign, got 'against'"),
        ({"on_no_triplet": "skip"}, "`on_no_triplet` must be left out with method='proxy'"),
        ({"objective": gcfast.TripletLoss(0.3)}, "`objective` must be left out .* differentiates"),
        (
            {"objective": gcfast.RankLoss(nn.Linear(6, 2)), "l2_normalize": False},
            "must be 'gradcam' or 'gradcam\\+\\+' with a RankLoss, whose labels are real numbers",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_knows_nothing_of_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gcfast.Explainer(nn.Identity(), method="proxy", **settings)
