"""Losses, their gradients and which triplets are valid."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from loops import hinged, smooth
from torch import Tensor, nn

import gcfast
from gcfast.method.objectives import Partners, as_objective, objective_from

OBJECTIVES = {
    "triplet": gcfast.TripletLoss(0.4),
    "difference": gcfast.DistanceDifference(),
    "positive": gcfast.PairDistance("positive"),
    "negative": gcfast.PairDistance("negative"),
    "smooth function": as_objective(smooth),
    "hinged function": as_objective(hinged),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cotangent_is_the_gradient_of_the_loss(name: str) -> None:
    objective = OBJECTIVES[name]
    anchor, positive, negative = torch.randn(3, 5), torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    got, valid = objective.cotangent(anchor, Partners(positive, negative))
    for b in range(3):
        for t in range(7):
            leaf = anchor[b : b + 1].clone().requires_grad_()
            loss = objective.loss(leaf, positive[b, t][None], negative[b, t][None], False)
            (wanted,) = torch.autograd.grad(loss.sum(), leaf)
            torch.testing.assert_close(got[b, t], wanted[0], rtol=1e-4, atol=1e-5)
            always = name in ("difference", "positive", "negative")
            assert bool(valid[b, t]) is (always or loss.item() > 0)


def test_values_by_hand() -> None:
    a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    assert gcfast.DistanceDifference().loss(a, p, n, True).item() == 1.0
    assert gcfast.TripletLoss(0.5).loss(a, p, n, True).item() == 1.5
    assert gcfast.TripletLoss(-2.0).loss(a, p, n, True).item() == 0.0
    assert gcfast.TripletLoss(-2.0).loss(a, p, n, False).item() == -1.0
    assert gcfast.PairDistance("positive").loss(a, p, n, True).item() == 5.0
    assert gcfast.PairDistance("negative").loss(a, p, n, True).item() == -4.0


def test_a_loss_of_exactly_zero_is_not_valid() -> None:
    a, p = torch.zeros(1, 2), torch.ones(1, 1, 2)
    _, valid = gcfast.TripletLoss(0.0).cotangent(a, Partners(p, p))
    assert not valid.any()


def test_which_partners_an_objective_has() -> None:
    assert OBJECTIVES["triplet"].pairs == OBJECTIVES["smooth function"].pairs == "triplet"
    assert OBJECTIVES["positive"].pairs == "positive"
    assert OBJECTIVES["negative"].pairs == "negative"
    assert OBJECTIVES["difference"].hinge == math.inf
    assert OBJECTIVES["triplet"].hinge == 0.4


@pytest.mark.parametrize("name", ["triplet", "difference", "positive", "negative"])
def test_descriptions_come_back(name: str) -> None:
    described = OBJECTIVES[name].describe()
    again = objective_from(described)
    assert again.describe() == described
    assert type(again) is type(OBJECTIVES[name])
    assert described["name"] in repr(again)


@pytest.mark.parametrize(
    "function",
    [
        smooth,
        functools.partial(torch.nn.functional.triplet_margin_loss, reduction="none"),
        nn.TripletMarginLoss(reduction="none"),
    ],
    ids=["function", "partial", "module"],
)
def test_callables_of_every_kind_are_functions(function: Any) -> None:
    objective = as_objective(function)
    gradient, valid = objective.cotangent(
        torch.randn(2, 5), Partners(torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    )
    assert gradient.shape == (2, 3, 5)
    assert valid.shape == (2, 3)
    assert objective.describe()["name"] == "function"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, p, n: (a - p + n).sum(), r"shape \[T\] = \[6\], got \[\]"),
        (lambda a, p, n: a - p + n, r"shape \[T\] = \[6\], got \[6, 5\]"),
        (lambda a, p, n: 0.5 * len(a + p + n), r"shape \[T\] = \[6\], got float"),
        (lambda a, p, n: (p - n).sum(1) + 0 * len(a), "differentiable in the anchor's embedding"),
        (lambda a, p, n: (a - p + n).sum(1).detach(), "differentiable in the anchor's embedding"),
    ],
    ids=["mean", "no sum", "float", "no anchor", "detached"],
)
def test_functions_that_are_no_loss_are_refused(function: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"`objective` must .*{words}"):
        as_objective(function).cotangent(
            torch.randn(2, 5), Partners(torch.randn(2, 3, 5), torch.randn(2, 3, 5))
        )


@pytest.mark.parametrize("value", [gcfast.TripletLoss, "triplet", None, 3], ids=str)
def test_what_is_no_objective_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"`objective` must be an Objective such as gcfast.Trip"):
        as_objective(value)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="`margin` must be finite, got inf"):
        gcfast.TripletLoss(math.inf)
    with pytest.raises(ValueError, match="`kind` must be one of 'positive', 'negative', got 'x'"):
        gcfast.PairDistance("x")


def test_a_function_works_on_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        x: list[Tensor] = [torch.randn(2, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5)]
        gradient, _ = as_objective(smooth).cotangent(x[0], Partners(x[1], x[2]))
    assert torch.isfinite(gradient).all()
