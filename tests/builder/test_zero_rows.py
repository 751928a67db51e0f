"""Rows whose weights are all zero, or not finite: refused, or counted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import TokenNet, loader, other, pictures
from torch import Tensor, nn

import gcfast


class ClassToken(nn.Module):
    """A transformer whose embedding is the class token after its last block."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenNet()
        self.tokens.last = nn.Identity()
        self.block = nn.Linear(12, 12)
        self.tokens.forward = self._tokens  # type: ignore[method-assign]

    def _tokens(self, images: Tensor) -> Tensor:
        net = self.tokens
        patches = net.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([net.token.expand(len(images), -1, -1), patches], 1)
        tokens = net.first(tokens)
        return tokens + net.attention(tokens, tokens, tokens, need_weights=False)[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.block(self.tokens(images))[:, 0]


def tokens(layer: str) -> gcfast.Explainer:
    return gcfast.Explainer(
        ClassToken(), layer, reshape=gcfast.TokenGrid(prefix=1), channels=5, triplets=3
    )


@pytest.mark.parametrize("stored", ["in memory", "in a folder"])
def test_a_layer_that_the_gradient_does_not_reach_is_refused(tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    wanted = (
        r"the weights of all 9 rows are zero: .* does not reach the layer 'block' .*; "
        r"take another one \(gcfast.layers"
    )
    with pytest.raises(ValueError, match=wanted):
        tokens("block").build(loader(*pictures(9)), out=out)
    if out is not None:
        assert not (out / "manifest.json").exists()
    database = tokens("tokens.first").build(loader(*pictures(9)), out=out and tmp_path / "two")
    assert database.report["zero_rows"] == 0


class Scaled(torch.autograd.Function):
    """The values as they are; the gradient of each row times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


class Dead(nn.Module):
    """The embedding of a picture with a bright corner has another gradient: none, as a rule."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__()
        self.net = other()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        bright = images[:, :1, 0, 0] > 5
        factor = torch.where(bright, self.factor, 1.0)
        return Scaled.apply(self.net(images), factor)


def dead(factor: float = 0.0) -> gcfast.Explainer:
    return gcfast.Explainer(Dead(factor), "net.backbone", channels=5, triplets=3)


def mixed(count: int, dead: int) -> list[Any]:
    images, labels = pictures(count)
    images[:, 0, 0, 0] = torch.where(torch.arange(count) < count - dead, 0.0, 9.0)
    return loader(images, labels)


@pytest.mark.parametrize("stored", ["in memory", "in a folder"])
def test_rows_of_zeros_are_counted(tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    one = dead()
    database = one.build(mixed(12, 4), out=out)
    assert database.report["zero_rows"] == 4
    assert (database.weights == 0).all(1).nonzero().flatten().tolist() == [8, 9, 10, 11]
    # Appending counts on, and takes what is all zero where the database as a whole is not.
    assert one.append(mixed(3, 3)).report["zero_rows"] == 7
    if out is not None:
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["report"]["zero_rows"] == 7


def test_an_append_counts_the_zeros_of_a_database_from_before() -> None:
    one = dead()
    database = one.build(mixed(12, 4))
    del database.manifest["report"]["zero_rows"]
    assert one.append(mixed(3, 0)).report["zero_rows"] == 4


def test_mostly_zeros_are_told() -> None:
    one = dead()
    with pytest.warns(UserWarning, match=r"the weights of 8 of 12 rows are zero: .*gcfast\.layers"):
        one.build(mixed(12, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.build(mixed(12, 6))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_row(factor: float) -> None:
    wanted = (
        r"must be finite, got NaN or infinity in row 11: the gradient at the layer "
        r"'net.backbone' is not finite there; take another layer"
    )
    with pytest.raises(ValueError, match=wanted):
        dead(factor).build(mixed(12, 1))
