"""pytorch-grad-cam's front end next to the library, whose helpers and metrics take the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from networks import CHANNELS, OTHER_HEADS, Net, TokenNet, common
from torch import Tensor, nn

import gcfast

library("pytorch_grad_cam")
models = library("torchvision").models
from pytorch_grad_cam import GradCAM as PeerGradCAM  # noqa: E402
from pytorch_grad_cam.metrics.cam_mult_image import (  # noqa: E402
    CamMultImageConfidenceChange,
    DropInConfidence,
    IncreaseInConfidence,
)
from pytorch_grad_cam.metrics.road import ROADCombined  # noqa: E402
from pytorch_grad_cam.utils.image import show_cam_on_image  # noqa: E402
from pytorch_grad_cam.utils.model_targets import (  # noqa: E402
    BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    SemanticSegmentationTarget,
)

from gcfast.adapters.pytorch_grad_cam import EmbeddingGradCAM, GradCAM  # noqa: E402

Layers = Callable[[Any], list[nn.Module]]
ATOL = 5e-6


def both(
    model: nn.Module, layers: Layers, x: Tensor, targets: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Our maps and the peer's, which works on a copy: it leaves gradients and hooks."""
    reshape = options.pop("reshape_transform", None)
    twin = copy.deepcopy(model)
    with PeerGradCAM(twin, layers(twin), reshape_transform=reshape) as peer:
        wanted = peer(x, targets, **options)
    with GradCAM(model, layers(model), reshape_transform=reshape) as cam:
        got = cam(x, targets, **options)
    assert type(got) is np.ndarray
    assert got.dtype == wanted.dtype == np.float32
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    return got, wanted


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=ATOL, rtol=0)
    assert got.max() > 0.3  # not black


def tokens_of(tensor: Tensor, height: int = 4, width: int = 4) -> Tensor:
    """As the peer's examples have it, with the grid as further arguments."""
    grid = tensor[:, 1:].reshape(len(tensor), height, width, -1)
    return grid.transpose(2, 3).transpose(1, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Layers, dict[str, Any]]] = {
    "resnet18": (models.resnet18, lambda m: [m.layer4[-1]], {}),
    "resnet50": (models.resnet50, lambda m: [m.layer4[-1]], {}),
    "efficientnet": (models.efficientnet_b0, lambda m: [m.features[-1]], {}),
    "mobilenet": (models.mobilenet_v2, lambda m: [m.features[-1]], {}),
    "vit": (
        lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
        lambda m: [m.encoder.layers[-1].ln_1],
        {"reshape_transform": tokens_of},
    ),
}


SLOW = ("efficientnet", "mobilenet", "resnet50")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS]
)
def test_equal_on_networks(name: str) -> None:
    make, layers, options = NETWORKS[name]
    model = make().eval()
    if name == "vit":  # its head is zero
        nn.init.normal_(model.heads.head.weight)
    x = torch.randn(2, 3, 32, 32) if name == "vit" else torch.randn(2, 3, 64, 72)
    same(*both(model, layers, x, [ClassifierOutputTarget(3), ClassifierOutputTarget(5)], **options))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "target",
    [
        None,
        ClassifierOutputTarget(2),
        ClassifierOutputSoftmaxTarget(1),
        lambda row: row[:3].sum() - row[4] ** 2,
    ],
)
def test_targets(target: Any, count: int) -> None:
    model = Net(OTHER_HEADS["mlp"](CHANNELS)).eval()
    targets = None if target is None else [target] * count
    got, wanted = both(model, lambda m: [m.backbone], torch.randn(count, 3, 20, 28), targets)
    np.testing.assert_allclose(got, wanted, atol=ATOL, rtol=0)


def test_one_score_and_scores_of_pixels() -> None:
    x = torch.randn(2, 3, 16, 16)
    one = nn.Sequential(common(), nn.Linear(6, 1)).eval()
    for category in (0, 1):
        targets = [BinaryClassifierOutputTarget(category)] * 2
        np.testing.assert_allclose(
            *both(one, lambda m: [m[0].backbone], x, targets), atol=ATOL, rtol=0
        )
    segmenter = Net(nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.Upsample(scale_factor=2))).eval()
    mask = np.zeros((16, 16), np.float32)
    mask[3:9, 5:11] = 1
    targets = [SemanticSegmentationTarget(1, mask), SemanticSegmentationTarget(2, 1 - mask)]
    same(*both(segmenter, lambda m: [m.backbone], x, targets))


LAYERS: dict[str, Layers] = {
    "two": lambda m: [m.layer3, m.layer4],
    "from last to first": lambda m: [m.layer4[-1], m.layer2, m.conv1],
    "one twice": lambda m: [m.layer4, m.layer4],
    "one of them one pixel": lambda m: [m.layer4, m.avgpool],
    "one pixel": lambda m: [m.avgpool],
}


@pytest.mark.parametrize("name", LAYERS)
def test_several_layers(name: str) -> None:
    """In any order, from one pass; where H W = 1 the map is zero, as the peer's."""
    model = models.resnet18(num_classes=7).eval()
    passes: list[int] = []
    model.conv1.register_forward_pre_hook(lambda *_: passes.append(1))
    got, wanted = both(model, LAYERS[name], torch.randn(2, 3, 64, 64))
    np.testing.assert_allclose(got, wanted, atol=ATOL, rtol=0)
    assert (got.max() == 0) == (name == "one pixel")
    assert len(passes) == 2  # the peer's, whose copy of the model has the hook, and ours


@pytest.mark.parametrize("side", [33, 96])
def test_one_channel_and_odd_sizes(side: int) -> None:
    model = models.resnet18(num_classes=7).eval()
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    same(*both(model, lambda m: [m.layer4[-1]], torch.randn(2, 1, side, side + 20)))


def test_aug_smooth() -> None:
    model: Any = common().eval()
    x = torch.randn(2, 3, 20, 28)
    for targets in (None, [ClassifierOutputTarget(1)] * 2):
        same(*both(model, lambda m: [m.backbone], x, targets, aug_smooth=True))


class Dense(nn.Module):
    """As DenseNet ends: a norm, whose output the ReLU behind it writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 7)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.features(images), inplace=True)
        return self.classifier(maps.mean((2, 3)))


@pytest.mark.parametrize("make", [Dense, pytest.param(models.densenet121, marks=pytest.mark.slow)])
def test_an_inplace_layer_behind_it(make: Callable[[], Any]) -> None:
    """The peer's activations on a CPU share memory with what the next layer overwrites."""
    model = make().eval()
    nn.init.constant_(model.features[-1].bias, 0.2)
    nn.init.uniform_(model.classifier.weight)  # so that no map is flat
    x = torch.randn(2, 3, 64, 64)
    got, wrong = both(model, lambda m: [m.features], x, [ClassifierOutputTarget(1)] * 2)
    A = model.features(x).detach().requires_grad_()
    scores = model.classifier(F.relu(A).mean((2, 3)))
    (g,) = torch.autograd.grad(scores[:, 1].sum(), A)
    maps = torch.einsum("bc,bchw->bhw", g.mean((2, 3)), A.detach()).clamp(min=0)
    right = F.interpolate(to_unit(maps)[:, None], size=(64, 64), mode="bilinear")[:, 0]
    right = to_unit(right)
    np.testing.assert_allclose(got, right.numpy(), atol=2e-5, rtol=0)
    assert np.abs(wrong - right.numpy()).max() > 0.05


def to_unit(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


def test_attributes_and_the_context() -> None:
    model: Any = common().train()
    x = torch.randn(2, 3, 8, 8)
    with GradCAM(model=model, target_layers=[model.backbone]) as cam:
        cam.batch_size = 7
        maps = cam(input_tensor=x, targets=None)
    assert not model.training  # as the peer leaves it
    assert cam.device == torch.device("cpu")
    assert cam.target_layers == [model.backbone]
    torch.testing.assert_close(cam.outputs, model(x))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    np.testing.assert_array_equal(cam(x), maps)  # there are no hooks to miss
    with cam:
        raise IndexError("which the peer prints")


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of ROAD
def test_its_helpers_and_metrics() -> None:
    model = models.resnet18(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    targets = [ClassifierOutputSoftmaxTarget(1)] * 2
    maps = GradCAM(model, [model.layer4[-1]])(x, targets)
    shown = show_cam_on_image(np.full((64, 64, 3), 0.5, np.float32), maps[0], use_rgb=True)
    assert shown.shape == (64, 64, 3)
    assert shown.dtype == np.uint8
    for metric in (
        CamMultImageConfidenceChange(),
        DropInConfidence(),
        IncreaseInConfidence(),
        ROADCombined(percentiles=[50, 80]),
    ):
        scores = metric(x, maps, targets, model)
        assert scores.shape == (2,)
        assert np.isfinite(scores).all()


def test_embeddings(built: Any) -> None:
    model, path, x, explainer = built
    with EmbeddingGradCAM(model, [model.backbone], database=path) as cam:
        maps = cam(input_tensor=x, targets=None)
    assert cam.explainer.settings.describe() == explainer.settings.describe()
    plain = explainer.explain_batch(x, normalize="minmax").double()
    plain = plain - plain.amin((1, 2), keepdim=True)
    plain = plain / (plain.amax((1, 2), keepdim=True) + 1e-7)
    np.testing.assert_allclose(maps, plain.numpy(), atol=1e-6, rtol=0)
    assert maps.dtype == np.float32
    assert maps.max() > 0.9
    assert cam.explanation is not None
    assert torch.equal(cam.outputs, cam.explanation.embeddings)
    assert cam.explanation.neighbors.shape == (3, 1)
    again = EmbeddingGradCAM(model, database=gcfast.Database.open(path))(x, [None] * 3)
    np.testing.assert_array_equal(again, maps)
    smooth = EmbeddingGradCAM(model, database=path)(x, aug_smooth=True)
    assert smooth.shape == maps.shape


def test_small_weights_do_not_dim_a_map(built: Any, small: gcfast.Database) -> None:
    """Grad-weights have the scale of the loss: the peer's epsilon is not to see it."""
    maps = EmbeddingGradCAM(built.model, database=built.path)(built.images)
    got = EmbeddingGradCAM(built.model, database=small)(built.images)
    np.testing.assert_allclose(got, maps, atol=1e-6)


def test_wrong_calls(built: Any) -> None:
    model, path, x, _ = built
    cam = EmbeddingGradCAM(model, database=path)
    with pytest.raises(ValueError, match="`eigen_smooth` must be False"):
        cam(x, eigen_smooth=True)
    with pytest.raises(ValueError, match="`eigen_smooth` must be False"):
        GradCAM(model, [model.backbone])(x, eigen_smooth=True, aug_smooth=True)
    with pytest.raises(ValueError, match="`targets` must be None, got some"):
        cam(x, [ClassifierOutputTarget(0)] * 3)
    with pytest.raises(ValueError, match="`target_layers` must be one layer"):
        EmbeddingGradCAM(model, [model.backbone, model.head], database=path)
    with pytest.raises(gcfast.ModelMismatchError, match=r"not with 'backbone\.stem'"):
        EmbeddingGradCAM(model, [model.backbone.stem], database=path)
    with pytest.raises(TypeError, match=r"`database` must be a gcfast\.Database or a path"):
        EmbeddingGradCAM(model, database=7)
    with pytest.raises(ValueError, match="at least one layer"):
        GradCAM(model, [])
    with pytest.raises(ValueError, match=r"B, 3, h, w"):
        GradCAM(model, [model.backbone])(torch.zeros(1, 3, 4, 4, 4))


def test_tokens_without_a_reshape() -> None:
    """The peer fails there; the layout is recognized here."""
    model: Any = TokenNet().eval()
    x = torch.randn(2, 3, 8, 8)
    bare = GradCAM(model, [model.first])(x)
    given = GradCAM(model, [model.first], reshape_transform=tokens_of)(x)
    np.testing.assert_allclose(bare, given, atol=1e-6)
