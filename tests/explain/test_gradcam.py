"""gcfast.GradCAM: equal to Grad-CAM by a whole backward pass, for any target, head and layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import AFFINE_HEADS, DIM, OTHER_HEADS, Lambda, Net, TokenNet, common, other
from torch import Tensor, nn

import gcfast

HEADS = {**AFFINE_HEADS, **OTHER_HEADS}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def by_hand(
    model: nn.Module, layer: nn.Module, x: Tensor, score: Callable[[Tensor], Tensor], plus: bool
) -> Tensor:
    """Maps [B, H, W] in float64, neither normalized nor resized."""
    model = model.double().eval()
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: kept.append(call[-1]))
    output = model(x.double())
    handle.remove()
    A = kept[0]
    (g,) = torch.autograd.grad(score(output), A)
    if plus:
        S = A.sum((2, 3), keepdim=True).clamp(min=0)
        w = (g.clamp(min=0) / (2 + S * g.clamp(min=0))).sum((2, 3))
    else:
        w = g.mean((2, 3))
    model.float()
    return torch.einsum("bc,bchw->bhw", w, A).clamp(min=0).detach()


def finished(maps: Tensor, size: tuple[int, int] = (8, 8)) -> Tensor:
    peak = maps.amax((1, 2), keepdim=True)
    maps = torch.where(peak > 0, maps / peak.clamp(min=1e-300), 0)
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def close(got: Tensor, wanted: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("head", HEADS)
def test_equals_a_whole_backward_pass(head: str, method: str) -> None:
    model, x = Net(HEADS[head](12)), images()
    got = gcfast.GradCAM(model, "backbone", method=method)(x, 2)
    plus = method == "gradcam++"
    close(got, finished(by_hand(model, model.backbone, x, lambda o: o[:, 2].sum(), plus)))


TARGETS = {
    "highest": (None, lambda o: o.amax(1).sum()),
    "one class": (3, lambda o: o[:, 3].sum()),
    "a list": ([0, 1, 2, 3], lambda o: o.diagonal().sum()),
    "a tensor": (torch.arange(4, dtype=torch.int32), lambda o: o.diagonal().sum()),
    "a number of NumPy's": (np.int64(3), lambda o: o[:, 3].sum()),
    "a number in a tensor": (torch.tensor(3), lambda o: o[:, 3].sum()),
    "an array": (np.arange(4), lambda o: o.diagonal().sum()),
    "a function": (
        lambda row: row.softmax(0)[1] - row[2] ** 2,
        lambda o: (o.softmax(1)[:, 1] - o[:, 2] ** 2).sum(),
    ),
    "functions": (
        [lambda row, i=i: row[i] ** 3 for i in range(4)],
        lambda o: (o.diagonal() ** 3).sum(),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    targets, score = TARGETS[name]
    model, x = other(), images()
    got = gcfast.GradCAM(model, "backbone")(x, targets)
    assert got.amax() > 0
    close(got, finished(by_hand(model, model.backbone, x, score, False)))


def test_an_earlier_layer_and_tokens() -> None:
    model, x = other(), images()
    got = gcfast.GradCAM(model, "backbone.stem")(x, 1)
    close(got, finished(by_hand(model, model.backbone.stem, x, lambda o: o[:, 1].sum(), False)))
    tokens = TokenNet()
    got = gcfast.GradCAM(tokens, "first")(x, 1)

    class Arranged(nn.Module):
        """The tokens as a map, so that the same formula serves."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.map = tokens, nn.Identity()

        def forward(self, batch: Tensor) -> Tensor:
            n = self.net
            t = torch.cat(
                [n.token.expand(len(batch), -1, -1), n.patch(batch).flatten(2).transpose(1, 2)], 1
            )
            t = n.first(t)
            grid = self.map(t[:, 1:].transpose(1, 2).reshape(len(batch), -1, 4, 4))
            t = torch.cat([t[:, :1], grid.flatten(2).transpose(1, 2)], 1)
            mixed, _ = n.attention(t, t, t, need_weights=False)
            return n.last((t + mixed)[:, 0])

    whole = Arranged()
    close(got, finished(by_hand(whole, whole.map, x, lambda o: o[:, 1].sum(), False)))


def test_scores_of_pixels() -> None:
    """A segmentation network: a function of [D, h', w']."""
    model, x = Net(nn.Conv2d(12, DIM, 1)), images()
    got = gcfast.GradCAM(model, "backbone")(x, lambda row: row[2, 1:3].sum())
    score = lambda o: o[:, 2, 1:3].sum()  # noqa: E731
    close(got, finished(by_hand(model, model.backbone, x, score, False)))
    with pytest.raises(ValueError, match="functions of an image's output"):
        gcfast.GradCAM(model, "backbone")(x)
    with pytest.raises(ValueError, match="functions of an image's output"):
        gcfast.GradCAM(model, "backbone")(x, 1)


def test_options_and_details() -> None:
    model, x = common(), images()
    cam = gcfast.GradCAM(model, "backbone")
    raw = by_hand(model, model.backbone, x, lambda o: o[:, 0].sum(), False)
    close(cam(x, 0, size=(4, 4), normalize=None), raw)
    signed = cam(x, 0, size=4, normalize=None, relu=False)
    assert signed.amin() < 0
    close(signed.clamp(min=0), raw)
    why = cam(x, 0, details=True)
    torch.testing.assert_close(why.maps, cam(x, 0))
    torch.testing.assert_close(why.outputs, model(x))
    torch.testing.assert_close(why.weights, (model.head[1].weight[0] / 16).expand(4, -1))
    assert "GradCAM(Net, layer='backbone', method='gradcam')" in repr(cam)


def test_the_default_layer() -> None:
    model, x = other(), images()
    cam = gcfast.GradCAM(model)
    assert cam.layer_name is None
    torch.testing.assert_close(cam(x, 1), gcfast.GradCAM(model, "backbone")(x, 1))
    assert cam.layer_name == "backbone"


def test_an_inplace_layer_behind_it() -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), *AFFINE_HEADS["linear"](12))
    model, x = Net(head), images()
    model.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, stride=2))
    honest = Net(nn.Sequential(nn.ReLU(), *head[1:]))
    honest.backbone = model.backbone
    cam = gcfast.GradCAM(model, "backbone")
    close(
        cam(x, 1),
        finished(by_hand(honest, honest.backbone, x, lambda o: o[:, 1].sum(), False)),
    )


def test_the_model_is_left_as_it_was() -> None:
    model, x = common(norm=True).train(), images()
    model.head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gcfast.GradCAM(model, "backbone")(x)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.head[1].weight.requires_grad
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_in_inference_mode_and_frozen() -> None:
    model, x = common().requires_grad_(False), images()
    wanted = gcfast.GradCAM(model, "backbone")(x, 1)
    with torch.inference_mode():
        torch.testing.assert_close(gcfast.GradCAM(model, "backbone")(x, 1), wanted)
        function = gcfast.GradCAM(model, "backbone")(x, lambda row: row[1])
    torch.testing.assert_close(function, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = common(), images()
    wanted = gcfast.GradCAM(model, "backbone")(x, lambda row: 1e-4 * row[1])
    got = gcfast.GradCAM(model.to(dtype), "backbone")(x.to(dtype), lambda row: 1e-4 * row[1])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=5e-2, rtol=0)


def test_no_images() -> None:
    for targets in (None, 1, [], torch.zeros(0, dtype=torch.int64)):
        assert gcfast.GradCAM(common(), "backbone")(images(0), targets).shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ("cat", TypeError, "got str"),
        (1.5, TypeError, "class numbers, or functions"),
        ([1.5] * 4, TypeError, "whole numbers of classes"),
        ([1, lambda row: row[0], 1, 1], TypeError, "got function and int"),
        ([1, 2], ValueError, "B = 4 of them, got 2"),
        (6, ValueError, r"must lie in \[0, 6\)"),
        (-1, ValueError, r"must lie in \[0, 6\)"),
        (True, TypeError, "whole numbers of classes"),
        (lambda row: row, ValueError, r"one number each, got \[6\]"),
        (lambda _: 1.0, ValueError, "one number each, got float"),
        (lambda _: torch.ones(()), ValueError, "depend on the output"),
    ],
)
def test_wrong_targets(targets: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gcfast.GradCAM(common(), "backbone")(images(), targets)


def test_wrong_calls() -> None:
    nan = torch.where(torch.arange(4)[:, None, None, None] == 2, torch.nan, images())
    with pytest.raises(ValueError, match="`images` must be finite, got NaN or infinity in row 2"):
        gcfast.GradCAM(common(), "backbone")(nan)
    model = common()
    with pytest.raises(ValueError, match="`method` must be one of"):
        gcfast.GradCAM(model, method="proxy")
    with pytest.raises(TypeError, match="`model` must be a"):
        gcfast.GradCAM("resnet18")
    with pytest.raises(ValueError, match="`layer` must name a module"):
        gcfast.GradCAM(model, "nowhere")
    with pytest.raises(ValueError, match="must be one of 'max', 'minmax'"):
        gcfast.GradCAM(model, "backbone")(images(), normalize="z")
    with pytest.raises(ValueError, match=r"H\*W > 1"):
        gcfast.GradCAM(Net(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), "head.0")(
            images()
        )
    flat = nn.Sequential(model, Lambda(lambda o: o[:, 0]))
    with pytest.raises(ValueError, match="must return scores"):
        gcfast.GradCAM(flat, "0.backbone")(images())
