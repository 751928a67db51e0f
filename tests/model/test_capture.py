"""The user's model: seen at one layer, and left as it was."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    CHANNELS,
    DIM,
    Backbone,
    Lambda,
    Net,
    Pool,
    TokenNet,
    common,
    other,
    pictures,
)
from torch import Tensor, nn

import gcfast
from gcfast.model import network as network_module
from gcfast.model.capture import evaluating
from gcfast.model.network import Network, unwrapped
from gcfast.model.tokens import TokenGrid

Pair = namedtuple("Pair", ["maps", "extra"])


def backbone_maps(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.backbone(images)


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_embed_gives_the_output_and_the_layers_own_output() -> None:
    model, (images, _) = common().eval(), pictures(4)
    captured = Network(model, "backbone").embed(images)
    torch.testing.assert_close(captured.output, model(images).detach())
    torch.testing.assert_close(captured.activations, backbone_maps(model, images))
    assert captured.leaf is None
    assert not captured.activations.requires_grad


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_training_flags_and_running_stats_survive(mode: str) -> None:
    model = common(norm=True).train(mode != "eval")
    if mode == "mixed":
        model.backbone.norm.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, _ = pictures(4)
    network = Network(model, "backbone")
    captured = network.embed(images)
    with network.differentiable(images) as graph:
        graph.output.sum().backward(inputs=[graph.leaf])
    assert {name: module.training for name, module in model.named_modules()} == flags
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    torch.testing.assert_close(captured.output, model.eval()(images).detach())


def test_evaluation_mode_lasts_until_the_last_one_leaves() -> None:
    model = common()
    with evaluating(model):
        with evaluating(model):
            assert not model.training
        assert not model.training
        assert not model.head.training
    assert all(module.training for module in model.modules())
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as threads leave: not in the order of nesting
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("how", ["exchanged", "appended", "first of its parent", "left"])
def test_evaluation_mode_is_that_of_the_modules_there_are(how: str) -> None:
    model, (images, _) = common(), pictures(3)
    model.head.append(nn.Sequential(nn.Identity(), nn.Sequential()))
    network = Network(model, "backbone")
    network.embed(images)
    late = nn.Dropout(0.5)
    if how == "exchanged":
        model.head[-1][0] = late
    elif how == "appended":
        model.head.append(late)
    elif how == "first of its parent":
        model.head[-1][1].append(late)
    else:
        del model.head[-1]
    for _ in range(2):
        output = network.embed(images).output
        assert torch.equal(output, network.embed(images).output)
    assert all(module.training for module in model.modules())
    late.eval()
    network.embed(images)
    assert not late.training


def test_no_gradient_enters_the_backbone_or_the_parameters() -> None:
    model = other()
    images, _ = pictures(3)
    images.requires_grad_()
    with Network(model, "backbone").differentiable(images) as captured:
        torch.autograd.grad(captured.output.sum(), captured.leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(captured.output.sum(), images)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None


def test_frozen_parameters_still_give_gradients() -> None:
    model = other().requires_grad_(False)
    images, _ = pictures(3)
    with Network(model, "backbone").differentiable(images) as captured:
        (gradient,) = torch.autograd.grad(captured.output.sum(), captured.leaf)
    assert gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


IN_PLACE = {
    "relu_": lambda x: F.relu_(x),
    "ReLU(inplace)": nn.ReLU(inplace=True),
    "add_": lambda x: x.add_(3.0),
    "a view": lambda x: x[:, :4].mul_(-2.0),
}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference_mode"])
@pytest.mark.parametrize("then", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_work_behind_the_layer_does_not_change_what_is_captured(
    then: object, inference: bool
) -> None:
    class InPlace(Net):
        def forward(self, images: Tensor) -> Tensor:
            maps = self.backbone.last(F.relu(self.backbone.stem(images)))
            then(maps)  # type: ignore[operator]
            return self.head(maps)

    model = InPlace(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM))).eval()
    images, _ = pictures(3)
    with torch.no_grad():
        wanted = model.backbone.last(F.relu(model.backbone.stem(images)))
        output = model(images)
    network = Network(model, "backbone.last")
    with torch.inference_mode(inference):
        for _ in range(2):
            captured = network.embed(images)
            torch.testing.assert_close(captured.activations.clone(), wanted)
            torch.testing.assert_close(captured.output.clone(), output)
        with network.differentiable(images) as graph:
            (gradient,) = torch.autograd.grad(graph.output.sum(), graph.leaf)
            torch.testing.assert_close(graph.activations.detach(), wanted)
            torch.testing.assert_close(graph.output.detach(), output)

    leaf = wanted.clone().requires_grad_()
    maps = leaf.clone()
    then(maps)  # type: ignore[operator]
    (expected,) = torch.autograd.grad(model.head(maps).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_a_model_that_raises_is_left_clean_and_works_next_time() -> None:
    model = common(norm=True)
    fail = [True]

    def head(maps: Tensor) -> Tensor:
        if fail[0]:
            raise KeyError("in the middle")
        return maps.mean((2, 3))

    model.head = Lambda(head)
    network = Network(model, "backbone")
    images, _ = pictures(3)
    with pytest.raises(KeyError, match="in the middle"):
        network.embed(images)
    with (
        pytest.raises(KeyError, match="in the middle"),
        network.differentiable(images) as _,
    ):
        pass
    assert_no_hooks(model)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    fail[0] = False
    network.embed(images)
    assert_no_hooks(model)


def test_the_users_own_hooks_stay() -> None:
    model, (images, _) = common(), pictures(2)
    seen: list[torch.Size] = []
    model.backbone.register_forward_hook(lambda *given: seen.append(given[2].shape))
    Network(model, "backbone").embed(images)
    assert seen == [(2, CHANNELS, 4, 4)]
    assert len(model.backbone._forward_hooks) == 1


def test_gradient_mode_is_as_before() -> None:
    network, (images, _) = Network(other(), "backbone"), pictures(2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            network.embed(images)
            assert torch.is_grad_enabled() is enabled
            with network.differentiable(images):
                pass
            assert torch.is_grad_enabled() is enabled


# --- finding the layer


def test_no_layer_takes_the_last_spatial_one_by_its_outermost_name() -> None:
    network = Network(common())
    assert network.layer_name is None
    captured = network.embed(pictures(2)[0])
    assert network.layer_name == "backbone"
    assert captured.activations.shape == (2, CHANNELS, 4, 4)
    assert_no_hooks(network.model)


def test_no_layer_passes_over_outputs_of_one_pixel() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, DIM, 1), nn.Flatten())
    network = Network(Net(head))
    network.embed(pictures(2)[0])
    assert network.layer_name == "backbone"


def test_no_layer_in_a_flat_sequential() -> None:
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Pool()))
    network.embed(pictures(2)[0])
    assert network.layer_name == "1"


def test_no_layer_and_nothing_spatial_says_so() -> None:
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(192, DIM)))
    with pytest.raises(ValueError, match=r"`layer` must be given: no layer of the model has"):
        network.embed(pictures(2)[0])
    assert_no_hooks(network.model)


def test_a_layer_may_be_the_module_itself() -> None:
    model = common()
    assert Network(model, model.backbone.last).layer_name == "backbone.last"


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (
            "backbone.lsat",
            ValueError,
            "must name a module .* got 'backbone.lsat'; .*'backbone.last'",
        ),
        (Backbone(), ValueError, "must be a module of `model`, got a Backbone"),
        (3, TypeError, "must be a dotted name or a module, got int"),
        ("head.1", ValueError, r"must have a spatial output .* with \[1, 6\]"),
        ("head.0", ValueError, r"must have a spatial output .* with \[1, 12\]"),
        ("backbone", ValueError, r".*H\*W > 1, got 'backbone' with \[1, 12, 1, 1\]"),
    ],
    ids=["unknown", "of another model", "of another kind", "linear", "pooled", "one pixel"],
)
def test_a_layer_that_is_refused(layer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"`layer` {words}"):
        Network(common(), layer).embed(torch.randn(1, 3, 2, 2))


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.act(self.conv(self.act(self.conv(images)))).mean((2, 3))

    with pytest.raises(gcfast.UnsupportedModelError, match="got 'act', which ran 2 times"):
        Network(Twice(), "act").embed(pictures(2)[0])


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = common()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(gcfast.UnsupportedModelError, match="got 'spare', which ran not at all"):
        Network(model, "spare").embed(pictures(2)[0])


def test_a_layer_beside_the_way_to_the_embedding_is_refused_for_gradients() -> None:
    class Aside(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.backbone.last(self.backbone.stem(images))
            return images.mean((2, 3))

    network = Network(Aside(nn.Identity()), "backbone.last")
    with (
        pytest.raises(ValueError, match="`layer` must be on the way to the embedding"),
        network.differentiable(pictures(2)[0]) as _,
    ):
        pass


MAKERS = {
    "tuple": lambda maps, extra: (maps, extra),
    "list": lambda maps, extra: [maps, extra],
    "named tuple": Pair,
    "dict": lambda maps, extra: {0: maps, 1: extra},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_layer_that_returns_several_things(make: Callable[[Tensor, Tensor], Any]) -> None:

    class Several(Net):
        def forward(self, images: Tensor) -> Tensor:
            out = self.layer(images)
            assert type(out) is type(make(images, images))
            return self.head(out[0] + out[1])

    model = Several(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM)))
    model.layer = Lambda(lambda images: make(model.backbone(images), torch.ones(1)))
    images, _ = pictures(2)
    network = Network(model, "layer")
    torch.testing.assert_close(network.embed(images).activations, backbone_maps(model, images))
    with network.differentiable(images) as captured:
        (gradient,) = torch.autograd.grad(captured.output.sum(), captured.leaf)
    assert gradient.shape == (2, CHANNELS, 4, 4)


def test_a_layer_that_returns_no_tensor_is_refused() -> None:
    model = Net(Lambda(lambda out: out[0]["maps"].mean((2, 3))))
    model.backbone = Lambda(lambda images: [{"maps": images}])
    with pytest.raises(ValueError, match="got 'backbone' with no tensor"):
        Network(model, "backbone").embed(pictures(2)[0])


# --- the embedding in the output


class Output(dict):  # type: ignore[type-arg]
    """As transformers' outputs: a dict with attributes and numbered items."""

    def __getitem__(self, key: str | int) -> object:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


OUTPUTS = {
    "dict": (lambda x: {"logits": x[:, :2], "embedding": x}, "embedding"),
    "tuple": (lambda x: (x[:, :2], x), 1),
    "tuple from the end": (lambda x: (x[:, :2], x), -1),
    "list": (lambda x: [x, x[:, :2]], 0),
    "named tuple": (lambda x: Pair(x[:, :2], x), "extra"),
    "object": (lambda x: SimpleNamespace(pooled=x), "pooled"),
    "dict with numbers": (lambda x: Output(a=x[:, :2], b=x), 1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_key(name: str) -> None:
    wrap, key = OUTPUTS[name]
    model = nn.Sequential(common().eval(), Lambda(wrap))
    images, _ = pictures(2)
    captured = Network(model, "0.backbone", output_key=key).embed(images)
    torch.testing.assert_close(captured.output, model[0](images).detach())


@pytest.mark.parametrize(
    ("wrap", "key", "words"),
    [
        (OUTPUTS["dict"][0], "embeding", "must be one of 'logits', 'embedding', got 'embeding'"),
        (OUTPUTS["tuple"][0], 2, "must be one of 0 to 1, got 2"),
        (OUTPUTS["tuple"][0], "embedding", "must be one of 0 to 1, got 'embedding'"),
        (OUTPUTS["object"][0], "embedding", "must be one of 'pooled', got 'embedding'"),
    ],
    ids=["dict", "tuple", "name in a tuple", "object"],
)
def test_an_output_key_that_is_not_there_lists_those_that_are(
    wrap: object, key: str | int, words: str
) -> None:
    model = nn.Sequential(common(), Lambda(wrap))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"`output_key` {words}"):
        Network(model, "0.backbone", output_key=key).embed(pictures(2)[0])


@pytest.mark.parametrize(
    ("wrap", "error", "words"),
    [
        (OUTPUTS["dict"][0], TypeError, r"a tensor .* got dict; .*'logits', 'embedding'"),
        (lambda x: x.view(2, 3, 2), ValueError, r"\[B, D\] with B = 2, got \[2, 3, 2\]"),
        (lambda x: x[:1], ValueError, r"\[B, D\] with B = 2, got \[1, 6\]"),
        (lambda x: x.long(), TypeError, "must return floating point, got torch.int64"),
    ],
    ids=["no key", "rank", "count", "dtype"],
)
def test_an_output_that_is_no_embedding_is_refused(
    wrap: object, error: type[Exception], words: str
) -> None:
    model = nn.Sequential(common(), Lambda(wrap))  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        Network(model, "0.backbone").embed(pictures(2)[0])


# --- memory format


class Views(Net):
    """Works in NCHW alone: a view over channels-last memory is refused by PyTorch."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        return self.head(maps.view(len(maps), -1))


def test_convolutional_models_run_in_channels_last() -> None:
    network = Network(common(), "backbone")
    images = pictures(2)[0]
    maps = network.embed(images).activations
    assert network.channels_last
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert network.model.backbone.last.weight.is_contiguous()
    assert images.is_contiguous()


def test_a_model_that_cannot_take_channels_last_is_retried_once_and_remembered() -> None:
    model = Views(nn.Linear(16 * CHANNELS, DIM)).eval()
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    network = Network(model, "backbone")
    images, _ = pictures(2)
    with torch.no_grad():
        wanted = model(images)
    calls.clear()
    torch.testing.assert_close(network.embed(images).output, wanted)
    assert not network.channels_last
    assert len(calls) == 2
    network.embed(images)
    assert len(calls) == 3


def test_channels_last_images_are_no_trouble_for_a_model_in_nchw() -> None:
    model = Views(nn.Linear(16 * CHANNELS, DIM)).eval()
    images, _ = pictures(2)
    with torch.no_grad():
        wanted = model(images)
    network = Network(model, "backbone")
    for _ in range(2):
        given = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(network.embed(given).output, wanted)


def test_an_error_that_is_not_about_layout_is_not_retried() -> None:
    calls = []

    def head(_: Tensor) -> Tensor:
        calls.append(1)
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        Network(Net(Lambda(head)), "backbone").embed(pictures(2)[0])
    assert len(calls) == 1


# --- wrappers and compiled models


def test_wrappers_are_taken_off() -> None:
    model = common()
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(nn.DataParallel(torch.compile(model, backend="eager"))) is model
    assert (
        Network(
            torch.compile(model, backend="eager"), torch.compile(model.backbone, backend="eager")
        ).layer_name
        == "backbone"
    )


def test_a_model_compiled_in_place_is_refused() -> None:
    model = common()
    model.backbone.compile(backend="eager")
    with pytest.raises(gcfast.UnsupportedModelError, match=r"got Module.compile\(\) at 'backbone'"):
        Network(model)


def test_a_model_with_a_compiled_part_is_refused() -> None:
    model = common()
    model.backbone = torch.compile(model.backbone, backend="eager")
    with pytest.raises(gcfast.UnsupportedModelError, match=r"got torch.compile\(\) at 'backbone'"):
        Network(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")
def test_a_scripted_model_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3)), Pool())
    with pytest.raises(gcfast.UnsupportedModelError, match="got a ScriptModule at '0'"):
        Network(model)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got function"):
        Network(lambda images: images)  # type: ignore[arg-type]


# --- models that switch gradients themselves


class GradBlock(Net):
    """The usual way to freeze a backbone."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.backbone(images)
        return self.head(maps)


class GradDecorator(Net):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class InferenceDecorator(Net):
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@pytest.mark.parametrize("kind", [GradBlock, GradDecorator])
def test_models_that_turn_gradients_off_can_be_differentiated(kind: type[Net]) -> None:
    model = kind(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM))).eval()
    network, (images, _) = Network(model, "backbone"), pictures(2)
    for _ in range(2):
        with network.differentiable(images) as captured:
            (gradient,) = torch.autograd.grad(captured.output[:, 0].sum(), captured.leaf)
        wanted = model.head[1].weight[0] / 16
        torch.testing.assert_close(gradient, wanted[None, :, None, None].expand_as(gradient))
    assert torch.is_grad_enabled()


def test_a_model_under_inference_mode_embeds_but_cannot_be_differentiated() -> None:
    model = InferenceDecorator(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM)))
    network, (images, _) = Network(model, "backbone"), pictures(2)
    torch.testing.assert_close(
        network.embed(images).activations.clone(), backbone_maps(model, images)
    )
    with (
        pytest.raises(
            ValueError, match=r"the model's forward pass runs under torch.inference_mode"
        ),
        network.differentiable(images) as _,
    ):
        pass


# --- tokens


def test_token_grid_drops_the_prefix_and_keeps_the_order() -> None:
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    grid = TokenGrid(2, 3)(tokens)
    assert grid.shape == (2, 3, 2, 3)
    assert grid[1, 2, 1, 0] == tokens[1, 1 + 3, 2]


@pytest.mark.parametrize(
    ("grid", "pixels", "shape"),
    [
        (TokenGrid(), 17, (4, 4)),
        (TokenGrid(prefix=0), 16, (4, 4)),
        (TokenGrid(height=2), 17, (2, 8)),
        (TokenGrid(width=2), 17, (8, 2)),
        (TokenGrid(prefix=5), 21, (4, 4)),
    ],
    ids=["square", "no prefix", "height", "width", "registers"],
)
def test_token_grid_sizes(grid: TokenGrid, pixels: int, shape: tuple[int, int]) -> None:
    assert grid(torch.zeros(1, pixels, 3)).shape == (1, 3, *shape)


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(), TokenGrid(height=3), TokenGrid(width=3)],
    ids=["square", "height", "width"],
)
def test_token_grid_that_does_not_fill_is_refused(grid: TokenGrid) -> None:
    with pytest.raises(ValueError, match="17 tokens after the first 1 must fill a grid"):
        grid(torch.zeros(1, 18, 3))


def test_token_grid_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, P, C\], got \[1, 2\]"):
        TokenGrid()(torch.zeros(1, 2))


def test_tokens_are_laid_out_by_the_patches_of_the_image() -> None:
    images, _ = pictures(2, size=(8, 12))
    network = Network(TokenNet().eval(), "first")
    captured = network.embed(images)
    wanted = TokenGrid(4, 6)(_tokens(network, images))
    torch.testing.assert_close(captured.activations, wanted)


def test_tokens_that_no_patches_make_are_refused() -> None:
    class Few(TokenNet):
        def forward(self, images: Tensor) -> Tensor:
            return self.first(images.flatten(2)[:, :, :12])[:, 0]

    with pytest.raises(ValueError, match=r"with \[2, 3, 12\]; tokens need `reshape`"):
        Network(Few(), "first").embed(pictures(2)[0])


def _tokens(network: Network, images: Tensor) -> Tensor:
    model = network.model
    tokens = model.patch(images).flatten(2).transpose(1, 2)
    return model.first(torch.cat([model.token.expand(len(images), -1, -1), tokens], 1))


def test_reshape_is_checked() -> None:
    with pytest.raises(TypeError, match="`reshape` must be callable, got int"):
        Network(TokenNet(), "first", reshape=3)  # type: ignore[arg-type]
    network = Network(TokenNet(), "first", reshape=lambda tokens: (tokens,))  # type: ignore
    with pytest.raises(TypeError, match=r"`reshape` must return a tensor .* got tuple"):
        network.embed(pictures(2)[0])
    network = Network(TokenNet(), "first", reshape=lambda tokens: tokens)
    with pytest.raises(ValueError, match=r"with \[2, 17, 12\] after `reshape`"):
        network.embed(pictures(2)[0])


def test_a_batch_asks_a_few_modules_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    part = network_module._parameter
    monkeypatch.setattr(network_module, "_parameter", lambda m: asked.append(m) or part(m))
    model = Net(other())
    network = Network(model)
    assert network.device(torch.device("meta")) == torch.device("cpu")
    # Not all: those of a ResNet-50 take longer than a kernel's launch, many times.
    assert asked == [*model.modules()][: len(asked)]
    assert asked[-1] is next(m for m in model.modules() if m._parameters)
    assert network.dtype_for(torch.zeros(1, dtype=torch.float64)) == torch.float32


def test_the_device_and_the_dtype_of_a_model_in_a_loop_without_weights() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))
    model[1]._modules["parent"] = model
    model[1]._modules["none"] = None
    network = Network(model)
    assert network.device(torch.device("meta")) == torch.device("meta")
    assert network.dtype_for(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_training_flags_of_shared_modules_and_of_loops_come_back() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    model.append(model[0])
    model[1]._modules["none"] = None
    model[1].eval()
    model[1]._modules["parent"] = model  # a model may know where it is
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]
