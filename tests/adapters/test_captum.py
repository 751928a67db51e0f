"""captum's front end next to captum, on the kinds of networks that its own tests have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from networks import CHANNELS, OTHER_HEADS, Net, common
from torch import Tensor, nn

import gcfast

library("captum")
from captum.attr import LayerAttribution  # noqa: E402
from captum.attr import LayerGradCam as PeerLayerGradCam  # noqa: E402
from captum.attr import visualization as viz  # noqa: E402

from gcfast.adapters.captum import EmbeddingLayerGradCam, LayerGradCam  # noqa: E402


class Convolutions(nn.Module):
    """Two convolutions with a shared ReLU that can run in place, and two linear layers."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3)
        self.relu1, self.relu2 = nn.ReLU(inplace), nn.ReLU(inplace)
        self.pool = nn.AvgPool2d(2)
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x if more is None else x + more
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.relu2(self.conv2(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x))).softmax(1)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)
        nn.init.constant_(self.first.bias, 3.0)  # so that no ReLU is dead

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return self.last(self.relu(self.first(x if more is None else x + more)))


def maps(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 10, 10)


CONV1, RELU1 = (Convolutions, "conv1"), (Convolutions, "relu1")
ROWS = torch.randn(2, 3)
CASES: dict[str, tuple[tuple[type[nn.Module], str], Any, dict[str, Any]]] = {
    "a convolution": (CONV1, maps(1), {"target": 0}),
    "a batch": ((Convolutions, "conv2"), maps(3), {"target": 1}),
    "pooled": ((Convolutions, "pool"), maps(), {"target": [3, 7]}),
    "targets in a tensor": (RELU1, maps(), {"target": torch.tensor([3, 7])}),
    "one target in a tensor": (RELU1, maps(), {"target": torch.tensor([4])}),
    "a tuple": (CONV1, maps(), {"target": (4,)}),
    "tuples": (CONV1, maps(), {"target": [(4,), (2,)]}),
    "after a relu": (CONV1, maps(), {"target": 2, "relu_attributions": True}),
    "channels apart": (CONV1, maps(), {"target": 2, "attr_dim_summation": False}),
    "a layer's input": (
        (Convolutions, "conv2"),
        maps(),
        {"target": 2, "attribute_to_layer_input": True},
    ),
    "an argument": (CONV1, maps(), {"target": 0, "additional_forward_args": torch.ones(1)}),
    "several inputs": (CONV1, (maps(), maps()), {"target": 0}),
    "linear": ((Linears, "first"), ROWS, {"target": 0}),
    "linear, several inputs": ((Linears, "relu"), (ROWS, ROWS + 1), {"target": 1}),
    "a linear layer on maps": ((Convolutions, "fc1"), maps(), {"target": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_captum(name: str) -> None:
    (network, layer), inputs, options = CASES[name]
    model = network().eval()
    wanted = PeerLayerGradCam(model, getattr(model, layer)).attribute(inputs, **options)
    got = LayerGradCam(model, getattr(model, layer)).attribute(inputs, **options)
    assert got.shape == wanted.shape
    assert not torch.all(got == 0)
    torch.testing.assert_close(got, wanted.detach(), atol=5e-6, rtol=1e-5)


def test_a_score_for_an_image() -> None:
    """Without a target where the model gives one number."""
    model = nn.Sequential(common(), nn.Linear(6, 1)).eval()
    x = torch.randn(3, 3, 8, 8)
    wanted = PeerLayerGradCam(model, model[0].backbone).attribute(x)
    torch.testing.assert_close(LayerGradCam(model, model[0].backbone).attribute(x), wanted)


def test_scores_of_pixels() -> None:
    model: Any = Net(nn.Conv2d(CHANNELS, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    for target in ((1, 2, 3), [(1, 2, 3), (0, 0, 0)]):
        wanted = PeerLayerGradCam(model, model.backbone).attribute(x, target)
        torch.testing.assert_close(LayerGradCam(model, model.backbone).attribute(x, target), wanted)


def test_the_backbone_has_no_graph() -> None:
    model: Any = Net(OTHER_HEADS["mlp"](CHANNELS)).eval()
    seen: list[bool] = []
    model.backbone.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    LayerGradCam(model, model.backbone).attribute(torch.randn(2, 3, 8, 8), 1)
    assert seen == [False]


def test_an_inplace_layer_behind_it() -> None:
    model, x = Convolutions(inplace=True).eval(), maps()
    honest = Convolutions().eval()
    honest.load_state_dict(model.state_dict())
    wanted = PeerLayerGradCam(honest, honest.conv1).attribute(x, 1)
    torch.testing.assert_close(LayerGradCam(model, model.conv1).attribute(x, 1), wanted)


def test_what_is_wrong_is_said_by_captum() -> None:
    model, x = Convolutions().eval(), maps()
    for target, error in ((10, IndexError), ([1, 2, 3], AssertionError), (None, RuntimeError)):
        with pytest.raises((error, AssertionError)):
            LayerGradCam(model, model.conv1).attribute(x, target)
        with pytest.raises((error, AssertionError)):
            PeerLayerGradCam(model, model.conv1).attribute(x, target)


def test_embeddings(built: Any) -> None:
    model, path, x, explainer = built
    center = 0.0 if explainer.settings.is_proxy else 1.0
    extractor = EmbeddingLayerGradCam(model, model.backbone, database=path, center=center)
    got = extractor.attribute(x)
    assert got.shape == (3, 1, 4, 4)
    assert got.amin() < 0 < got.amax()
    signed = explainer.explain_batch(x, size=4, relu=False, center=center)
    torch.testing.assert_close(got[:, 0] / got.abs().amax((1, 2, 3))[:, None, None], signed)
    positive = extractor.attribute(x, relu_attributions=True)
    torch.testing.assert_close(positive, got.clamp(min=0))
    assert extractor.explanation is not None
    assert extractor.explanation.neighbors.shape == (3, 1)
    assert not extractor.multiplies_by_inputs
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_in_training_mode_is_explained_in_it() -> None:
    model: Any = Net(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(CHANNELS)))
    model.train()
    x = torch.randn(4, 3, 8, 8)
    wanted = PeerLayerGradCam(model, model.backbone).attribute(x, 1)
    torch.testing.assert_close(LayerGradCam(model, model.backbone).attribute(x, 1), wanted)
    assert model.training


def test_its_functions(
    built: Any, small: gcfast.Database, recwarn: pytest.WarningsRecorder
) -> None:
    """Its visualization warns of attributions near zero, which raw grad-weights would give."""
    plt = pytest.importorskip("matplotlib.pyplot")
    got = EmbeddingLayerGradCam(built.model, database=small).attribute(built.images)
    large = LayerAttribution.interpolate(got, (8, 8), "bilinear")
    assert large.shape == (3, 1, 8, 8)
    picture = np.zeros((8, 8, 3), np.uint8)
    figure, _ = viz.visualize_image_attr(
        large[0].permute(1, 2, 0).numpy(), picture, "blended_heat_map", "all", use_pyplot=False
    )
    plt.close(figure)
    assert not [w for w in recwarn if "approximately 0" in str(w.message)]


def test_wrong_calls(built: Any) -> None:
    model, path, x, _ = built
    extractor = EmbeddingLayerGradCam(model, database=path)
    for name, value in (
        ("target", 0),
        ("additional_forward_args", (1,)),
        ("attribute_to_layer_input", True),
        ("attr_dim_summation", False),
        ("grad_kwargs", {}),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            extractor.attribute(x, **{name: value})
    with pytest.raises(TypeError, match="`inputs` must be a torch"):
        extractor.attribute((x,))
    with pytest.raises(gcfast.ModelMismatchError, match="not with 'head'"):
        EmbeddingLayerGradCam(model, model.head, database=path)
    with pytest.raises(TypeError, match="`model` must be a"):
        EmbeddingLayerGradCam(lambda batch: batch, database=path)
