"""Models that come compiled: explained through their compiler, with the same maps."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Net, common, loader, other, pictures
from torch import Tensor, nn

import gcfast


class Backend:
    """A compiler that counts its graphs and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return module(*args)

        return run


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("refine", [None, ["backbone.stem"]], ids=["plain", "refined"])
def test_maps_are_those_of_the_uncompiled_model(fullgraph: bool, refine: Any) -> None:
    images, labels = pictures(24)
    model = common(norm=True).eval()
    plain = gcfast.Explainer(model, "backbone", channels=6, refine=refine)
    wanted_rows = plain.build(loader(images[:12], labels[:12]))
    wanted = plain.explain_batch(images[12:], details=True)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    one = gcfast.Explainer(compiled, "backbone", channels=6, refine=refine)
    rows = one.build(loader(images[:12], labels[:12]))
    assert torch.equal(rows.channels, wanted_rows.channels)
    torch.testing.assert_close(rows.embeddings, wanted_rows.embeddings)
    one.explain_batch(images[12:])  # the first pass that takes a layer's output is not compiled
    before = backend.calls
    got = one.explain_batch(images[12:], details=True)
    assert backend.calls > before
    assert one.network.compiled is not None
    torch.testing.assert_close(got.maps, wanted.maps)
    torch.testing.assert_close(got.embeddings, wanted.embeddings)
    assert torch.equal(got.neighbors, wanted.neighbors)
    graphs = backend.graphs
    one.explain_batch(images[12:])
    assert backend.graphs == graphs  # nothing is compiled twice


class Scaled(nn.Module):
    """A flag that changes what the network makes."""

    def __init__(self) -> None:
        super().__init__()
        self.negates = False
        self.project = nn.Linear(12, 6)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.project(maps.mean((2, 3)))
        return -out if self.negates else out


def test_changes_of_the_model_are_followed() -> None:
    images, labels = pictures(12)
    model = Net(Scaled()).eval()
    one = gcfast.Explainer(torch.compile(model, backend=Backend()), "backbone", channels=6)
    one.build(loader(images, labels))
    batch = images[:5]
    before = one.network.embed(batch)
    head = model.head
    assert isinstance(head, Scaled)
    head.negates = True
    torch.testing.assert_close(one.network.embed(batch).output, -before.output)
    with torch.no_grad():
        head.project.weight.mul_(2)
        head.project.bias.mul_(2)
    torch.testing.assert_close(one.network.embed(batch).output, -2 * before.output)
    head.project = nn.Linear(12, 6)
    torch.testing.assert_close(one.network.embed(batch).output, model(batch))
    model.train()
    assert torch.equal(one.network.embed(batch).activations, before.activations)
    assert model.training


def test_embeddings_are_the_callers_own() -> None:
    """As far as a compiler may give the same memory again, which reduced overhead does."""
    static = torch.zeros(5, 6)

    def reuses(module: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            out = list(module(*args))
            for i, part in enumerate(out):
                if part.shape == static.shape:
                    out[i] = static.copy_(part)
            return out

        return run

    images, _ = pictures(15)
    network = gcfast.Explainer(
        torch.compile(common().eval(), backend=reuses), "backbone", l2_normalize=False
    ).network
    network.embed(images[:5])  # tells what the layer gives
    first = network.embed(images[5:10]).output
    kept = first.clone()
    network.embed(images[10:])
    assert torch.equal(first, kept)


def test_what_cannot_be_compiled_again_runs_uncompiled_and_says_so() -> None:
    class Uncopied(Net):
        def __deepcopy__(self, _memo: Any) -> Any:
            raise TypeError("not to be copied")

    images, labels = pictures(12)
    model = Uncopied(Scaled()).eval()
    one = gcfast.Explainer(torch.compile(model, backend=Backend()), "backbone", channels=6)
    with pytest.warns(UserWarning, match=r"runs uncompiled.*'backbone'.*not to be copied"):
        one.build(loader(images, labels))
    assert one.explain_batch(images[:3]).shape == (3, 8, 8)  # once


def test_other_heads_and_pickles() -> None:
    images, labels = pictures(12)
    one = gcfast.Explainer(torch.compile(other().eval(), backend=Backend()), "backbone", channels=6)
    one.build(loader(images, labels))
    assert one.explain_batch(images).shape == (12, 8, 8)
    again = pickle.loads(pickle.dumps(one.network))
    assert again.compiled is None
    torch.testing.assert_close(again.embed(images).output, one.network.embed(images).output)
