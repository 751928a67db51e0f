"""torch-cam's front end, held to what its extractors promise, and its functions on the maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from networks import AFFINE_HEADS, CHANNELS, Net, TokenNet, loader, pictures
from PIL import Image
from torch import Tensor, nn

import gcfast

library("torchcam")
from torchcam.methods import GradCAM as PeerGradCAM  # noqa: E402
from torchcam.utils import overlay_mask  # noqa: E402

from gcfast.adapters.torchcam import EmbeddingGradCAM  # noqa: E402


def low(explainer: gcfast.Explainer, x: Tensor, **options: Any) -> Tensor:
    """Maps at the layer's resolution, 4 x 4."""
    return explainer.explain_batch(x, size=4, **options)


def test_equals_the_explainer(built: Any) -> None:
    model, path, x, explainer = built
    with EmbeddingGradCAM(model, "backbone", database=path) as cam:
        scores = model(x)
        maps = cam(scores=scores)
        assert [m.shape for m in maps] == [(3, 4, 4)]
        assert not maps[0].requires_grad
        torch.testing.assert_close(maps[0], low(explainer, x, normalize="minmax"))
        (raw,) = cam(None, scores, normalized=False)
        torch.testing.assert_close(
            raw / raw.amax((1, 2), keepdim=True).clamp(min=1e-30), low(explainer, x)
        )
        why = explainer.explain_batch(x, details=True)
        assert cam.explanation is not None
        assert torch.equal(cam.explanation.neighbors, why.neighbors)
        assert cam.explanation.label_names == why.label_names
    assert not any(m._forward_hooks for m in model.modules())


def test_small_weights_do_not_dim_a_map(built: Any, small: gcfast.Database) -> None:
    with EmbeddingGradCAM(built.model, database=small) as cam:
        (got,) = cam(scores=built.model(built.images))
        (raw,) = cam(scores=built.model(built.images), normalized=False)
    torch.testing.assert_close(got, low(built.explainer, built.images, normalize="minmax"))
    if built.explainer.settings.is_proxy:
        return
    largest = built.explainer.database.weights[cam.explanation.neighbors[:, 0]].abs().amax(1)
    wanted = low(built.explainer, built.images, normalize=None) / largest[:, None, None]
    torch.testing.assert_close(raw, wanted)


def test_center_and_settings(built: Any) -> None:
    model, path, x, explainer = built
    if explainer.settings.is_proxy:
        with pytest.raises(ValueError, match="`center` must be left out"):
            EmbeddingGradCAM(model, database=path, center=1)(scores=model(x))
        return
    with EmbeddingGradCAM(model, database=path, center=1.0, k=3) as cam, torch.inference_mode():
        (got,) = cam(scores=model(x))
    mixed = gcfast.load(path, model, k=3)
    torch.testing.assert_close(got, low(mixed, x, normalize="minmax", center=1.0))


def test_hooks_as_the_peer_has_them(built: Any) -> None:
    model, path, x, _ = built
    cam = EmbeddingGradCAM(model, model.backbone, enable_hooks=False, database=path)
    scores = model(x)
    with pytest.raises(AssertionError, match="run the model on images first"):
        cam(scores=scores)
    cam.enable_hooks()
    scores = model(x)
    first = cam(scores=scores)[0]
    with cam._hooks_off():
        model(torch.zeros_like(x))
    torch.testing.assert_close(cam(scores=scores)[0], first)
    cam.reset_hooks()
    with pytest.raises(AssertionError, match="run the model"):
        cam(scores=scores)
    cam.remove_hooks()
    assert "target_layer=['backbone']" in repr(cam)


def test_its_functions(built: Any) -> None:
    model, path, x, _ = built
    with EmbeddingGradCAM(model, database=path) as cam:
        maps = cam(scores=model(x))
        fused = cam.fuse_cams([maps[0], F.interpolate(maps[0][:, None], size=8)[:, 0]])
    assert fused.shape == (3, 8, 8)
    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    shown = overlay_mask(picture, Image.fromarray(maps[0][0].numpy()), "gray", alpha=0.5)
    wanted = maps[0][0].square() * 255 / 2
    np.testing.assert_allclose(np.asarray(shown)[..., 0], wanted.numpy(), atol=1.5)


def test_an_inplace_layer_behind_it() -> None:
    """The peer keeps the tensor that the next layer writes over, also with gradients."""
    model: Any = Net(nn.Sequential(nn.ReLU(inplace=True), *AFFINE_HEADS["linear"](CHANNELS))).eval()
    model.backbone = nn.Conv2d(3, CHANNELS, 3, padding=1, stride=2)
    images, labels = pictures(24)
    explainer = gcfast.Explainer(model, "backbone", channels=5)
    database = explainer.build(loader(images, labels))
    with EmbeddingGradCAM(model, "backbone", database=database) as cam:
        (maps,) = cam(scores=model(images))
    torch.testing.assert_close(maps, low(explainer, images, normalize="minmax"))
    with PeerGradCAM(model, "backbone") as peer, torch.no_grad():
        model(images)
        assert peer.hook_a[0].amin() == 0  # what is left of it


def test_tokens() -> None:
    model = TokenNet().eval()
    images, labels = pictures(24)
    grid = gcfast.TokenGrid(prefix=1)
    explainer = gcfast.Explainer(model, "first", channels=5, reshape=grid)
    database = explainer.build(loader(images, labels))
    with EmbeddingGradCAM(model, "first", reshape_transform=grid, database=database) as cam:
        (maps,) = cam(scores=model(images))
    torch.testing.assert_close(maps, low(explainer, images, normalize="minmax"))
    with (
        EmbeddingGradCAM(model, "first", database=database) as cam,
        pytest.raises(ValueError, match=r"`reshape_transform` must make \[B, C, H, W\]"),
    ):
        cam(scores=model(images))


def test_wrong_calls(built: Any) -> None:
    model, path, x, _ = built
    with EmbeddingGradCAM(model, database=path) as cam:
        scores = model(x)
        with pytest.raises(ValueError, match="`class_idx` must be None, got 0"):
            cam(0, scores)
        with pytest.raises(ValueError, match="`targets` must be None"):
            cam(scores=scores, targets=lambda row: row[0])
        with pytest.raises(TypeError, match=r"`scores` must be .* got NoneType"):
            cam()
        with pytest.raises(TypeError, match=r"`scores` must be .* got \[3\]"):
            cam(scores=scores[:, 0])
        with pytest.raises(ValueError, match="last batch, B = 3, got 2"):
            cam(scores=scores[:2])
        with pytest.raises(ValueError, match="`output` must be finite, got NaN"):
            cam(scores=scores * torch.nan)
    with pytest.raises(ValueError, match="`target_layer` must be one layer"):
        EmbeddingGradCAM(model, ["backbone", "head"], database=path)
    with pytest.raises(gcfast.ModelMismatchError, match="not with 'head'"):
        EmbeddingGradCAM(model, ["head"], database=path)
