"""Which heads the closed form is taken for, and gradients in half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import norm_error
from networks import (
    AFFINE_HEADS,
    CHANNELS,
    DIM,
    OTHER_HEADS,
    Lambda,
    Net,
    Pool,
    common,
    other,
    pictures,
)
from torch import Tensor, nn

import gcfast.method.head as head_module
from gcfast.method.head import AffineHead, normalized, probe, vjp_grad_weights
from gcfast.method.pairs import Cotangents
from gcfast.model.network import Network


def probed(head: nn.Module, *, l2_normalize: bool = True, count: int = 4) -> AffineHead | None:
    return probe(Network(Net(head).eval(), "backbone"), pictures(count)[0], l2_normalize)


@pytest.mark.parametrize("l2_normalize", [True, False], ids=["l2", "raw"])
@pytest.mark.parametrize("name", AFFINE_HEADS)
def test_affine_heads_are_found_and_reproduce_the_model(name: str, l2_normalize: bool) -> None:
    model = Net(AFFINE_HEADS[name](CHANNELS)).eval()
    images, _ = pictures(12)
    network = Network(model, "backbone")
    head = probe(network, images, l2_normalize)
    if name == "normalising, scaled" and not l2_normalize:
        assert head is None, "16 f is neither affine nor a unit vector"
        return
    assert head is not None
    captured = network.embed(images)
    embeddings = normalized(captured.output, l2_normalize)
    pooled = captured.activations.mean((2, 3))
    assert norm_error(head.project(pooled)[0], embeddings) < 1e-5
    assert head.agrees(pooled, embeddings, torch.float32)
    assert head.unit is (l2_normalize or "normalising" in name)


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_other_heads_are_not_taken_for_affine(name: str) -> None:
    assert probed(OTHER_HEADS[name](CHANNELS)) is None


def test_a_hidden_nonlinearity_is_known_without_a_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand outputs behind the first of many layers would each cost a backward pass."""
    taken = []
    true = head_module._jacobian
    monkeypatch.setattr(head_module, "_jacobian", lambda *args: taken.append(1) or true(*args))
    assert probed(OTHER_HEADS["mlp"](CHANNELS)) is None
    assert not taken
    assert probed(Loose()) is not None
    assert taken


def test_weight_and_bias_are_the_models_own() -> None:
    linear = nn.Linear(CHANNELS, DIM)
    head = probed(nn.Sequential(Pool(), linear))
    assert head is not None
    torch.testing.assert_close(head.weight, linear.weight.detach())
    torch.testing.assert_close(head.bias, linear.bias.detach())


def test_one_image_is_enough_for_the_probe() -> None:
    assert probed(AFFINE_HEADS["normalising"](CHANNELS), count=1) is not None
    assert probed(OTHER_HEADS["mlp"](CHANNELS), count=1) is None


class Loose(nn.Module):
    """A linear layer by a parameter that no module of its own holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, DIM))

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3)) @ self.weight


@pytest.mark.parametrize(
    ("head", "passes"),
    [(AFFINE_HEADS["bn neck"], 2 + 1), (lambda _: Loose(), 2 + 1 + 1 + 1)],
    ids=["modules", "gradients"],
)
def test_the_backbone_runs_on_few_images_for_the_probe(
    head: Callable[[int], nn.Module], passes: int
) -> None:
    """Variants of the activation are many behind the layer alone: the backbone is what costs."""
    model = Net(head(CHANNELS)).eval()
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, args
        seen.append(len(output))

    # Copied with the model, and so told of the passes through its copy.
    model.backbone.register_forward_hook(note)
    assert probe(Network(model, "backbone"), pictures(4)[0], True) is not None
    assert sum(seen) == passes


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_model_that_counts_its_images_is_probed_with_as_many(error: type[Exception]) -> None:
    class Counting(Net):
        def forward(self, images: Tensor) -> Tensor:
            maps = self.backbone(images)
            if len(maps) != len(images):
                raise error("as many maps as images")
            return self.head(maps)

    model = Counting(AFFINE_HEADS["normalising"](CHANNELS)).eval()
    assert probe(Network(model, "backbone"), pictures(4)[0], True) is not None


def test_a_relu_that_never_closed_in_the_probe_is_noticed_where_it_closes() -> None:
    linear = nn.Linear(CHANNELS, DIM)
    with torch.no_grad():
        linear.bias.fill_(50.0)
    head = probed(nn.Sequential(Pool(), linear, nn.ReLU()), l2_normalize=False)
    assert head is not None, "affine as far as these images reach"
    pooled = torch.rand(9, CHANNELS)
    assert head.agrees(pooled, linear(pooled).relu().detach(), torch.float32)
    pooled[4] = -200 * linear.weight[0].detach().sign()
    assert not head.agrees(pooled, linear(pooled).relu().detach(), torch.float32)


def test_a_head_that_reads_the_batch_is_not_taken() -> None:
    assert probed(nn.Sequential(Pool(), Lambda(lambda x: x - x.mean(0)))) is None


class Stubborn(Net):
    def __deepcopy__(self, memo: Any) -> None:
        raise copy.Error("no copies")


def test_modules_that_are_affine_need_no_copy_of_the_model() -> None:
    assert probe(Network(Stubborn(AFFINE_HEADS["bn neck"](CHANNELS))), pictures(4)[0], True)


def test_a_head_that_is_no_module_needs_a_copy_or_autograd() -> None:
    assert probe(Network(Net(Loose())), pictures(4)[0], True) is not None
    assert probe(Network(Stubborn(Loose())), pictures(4)[0], True) is None


def test_a_model_that_casts_inside() -> None:
    cast = Lambda(lambda maps: maps.float())
    found = probed(nn.Sequential(cast, *AFFINE_HEADS["linear"](CHANNELS)))
    assert found is not None
    assert probed(nn.Sequential(cast, Loose())) is None  # its twin in float64 is none


@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(CHANNELS), nn.Softmax(dim=1)])
def test_modules_with_something_else_between_are_not_affine(between: nn.Module) -> None:
    assert probed(nn.Sequential(Pool(), between, nn.Linear(CHANNELS, DIM), nn.Tanh())) is None
    assert probed(nn.Sequential(Pool(), nn.Linear(CHANNELS, CHANNELS), between)) is None


def test_project_divides_by_a_norm_that_may_be_zero() -> None:
    head = AffineHead(torch.eye(3), torch.zeros(3), True)
    embeddings, norms = head.project(torch.zeros(2, 3))
    assert torch.equal(embeddings, torch.zeros(2, 3))
    assert (norms > 0).all()


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4], ids=["tiny", "plain", "huge"])
def test_half_precision_keeps_small_gradients(scale: float, method: str) -> None:
    model = other().half()
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        exact.backbone.load_state_dict(model.backbone.state_dict())
    images = pictures(4, size=(64, 64))[0].half()
    cotangents = scale * 1e-3 * torch.randn(4, 3, DIM)
    part = Cotangents(cotangents, torch.ones(4, 3, dtype=torch.bool), torch.full((4,), 3))

    def weights(net: nn.Module, x: Tensor) -> Tensor:
        network = Network(net, "backbone")
        with network.differentiable(x) as captured:
            embeddings = normalized(captured.output, True)
            return vjp_grad_weights(captured, embeddings, [part], method, network)

    got = weights(model, images)
    assert got.dtype == torch.float32
    assert norm_error(got, weights(exact, images.float())) < 0.03


def test_a_cotangent_of_zero_gives_zero_in_half_precision() -> None:
    network = Network(other().half(), "backbone")
    valid = torch.ones(2, 1, dtype=torch.bool)
    part = Cotangents(torch.zeros(2, 1, DIM), valid, valid[:, 0].long())
    with network.differentiable(pictures(2)[0].half()) as captured:
        embeddings = normalized(captured.output, True)
        weights = vjp_grad_weights(captured, embeddings, [part], "gradcam", network)
    assert torch.equal(weights, torch.zeros(2, CHANNELS))


def test_triplets_that_do_not_count_do_not_reach_the_weights() -> None:
    network = Network(common(), "backbone")
    values = torch.randn(2, 3, DIM)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    broken = values.masked_fill(~valid[..., None], float("nan"))
    with network.differentiable(pictures(2)[0]) as captured:
        embeddings = normalized(captured.output, True)

        def weights(part: Tensor, mask: Tensor) -> Tensor:
            cotangents = Cotangents(part, mask, mask.sum(1))
            return vjp_grad_weights(captured, embeddings, [cotangents], "gradcam++", network)

        got = weights(broken, valid)
        wanted = weights(values[:1, [0, 2]].expand(2, -1, -1), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[1], torch.zeros(CHANNELS))
