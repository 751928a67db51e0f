"""xaitk-saliency's front end: the contract of its interface, and Grad-CAM of the cosine by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from networks import CHANNELS, OTHER_HEADS, Net
from torch import nn

library("xaitk_saliency")
from smqtk_descriptors.interfaces.image_descriptor_generator import (  # noqa: E402
    ImageDescriptorGenerator,
)
from xaitk_saliency import GenerateImageSimilarityBlackboxSaliency  # noqa: E402
from xaitk_saliency.impls.gen_image_similarity_blackbox_sal.sbsm import SBSMStack  # noqa: E402

from gcfast.adapters.xaitk import GradCAMSimilarity, TorchDescriptor  # noqa: E402


def image(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def model() -> Any:
    return Net(OTHER_HEADS["mlp"](CHANNELS)).eval()


def tensor(matrix: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(matrix).permute(2, 0, 1)[None].double() / 255


def test_grad_cam_of_the_cosine(model: Any) -> None:
    """Queries of several sizes; the maps have the reference's."""
    reference = image(12, 16, 0)
    queries = [image(12, 16, 1), image(8, 8, 2), image(8, 8, 3), reference]
    blackbox = TorchDescriptor(model, "backbone", batch=1)
    got = GradCAMSimilarity()(reference, queries, blackbox)
    model.double()
    A = model.backbone(tensor(reference)).detach().requires_grad_()
    own = F.normalize(model.head(A), dim=1)
    for query, one in zip(queries, got, strict=True):
        cosine = (own * F.normalize(model(tensor(query)), dim=1).detach()).sum()
        (g,) = torch.autograd.grad(cosine, A, retain_graph=True)
        cam = torch.einsum("bc,bchw->bhw", g.mean((2, 3)), A.detach())
        cam = cam / cam.abs().max()
        large = F.interpolate(cam[None], size=(12, 16), mode="bilinear")[0, 0]
        if query is not reference:  # whose own cosine has no gradient: what is left is rounding
            np.testing.assert_allclose(one, large.numpy(), atol=1e-5)
    assert got.shape == (4, 12, 16)
    assert got.dtype == np.float32
    assert got.min() >= -1
    assert got.max() <= 1


def test_the_interfaces(model: Any) -> None:
    blackbox = TorchDescriptor(model, "backbone")
    assert isinstance(blackbox, ImageDescriptorGenerator)
    assert isinstance(GradCAMSimilarity(), GenerateImageSimilarityBlackboxSaliency)
    assert GradCAMSimilarity.from_config(GradCAMSimilarity().get_config()) is not None
    vectors = list(blackbox.generate_arrays_from_images(image(8, 8, i) for i in range(3)))
    wanted = F.normalize(
        model(torch.cat([tensor(image(8, 8, i)).float() for i in range(3)])), dim=1
    )
    np.testing.assert_allclose(np.stack(vectors), wanted.detach().numpy(), atol=1e-6)
    with pytest.raises(NotImplementedError, match="cannot be written as JSON"):
        blackbox.get_config()


def test_its_own_method_takes_the_descriptor(model: Any) -> None:
    blackbox = TorchDescriptor(model, "backbone")
    maps = SBSMStack(window_size=(4, 4), stride=(4, 4))(image(8, 8, 0), [image(8, 8, 1)], blackbox)
    assert maps.shape == (1, 8, 8)


def test_gray_images_and_a_transform(model: Any) -> None:
    gray = image(8, 8, 0)[:, :, 0]
    blackbox = TorchDescriptor(model, "backbone")
    assert GradCAMSimilarity()(gray, [gray[::-1]], blackbox).shape == (1, 8, 8)

    def scaled(matrix: np.ndarray) -> torch.Tensor:
        return F.interpolate(tensor(matrix).float(), size=(8, 8))[0]

    blackbox = TorchDescriptor(model, "backbone", scaled)
    assert GradCAMSimilarity()(image(30, 20, 0), [image(7, 9, 1)], blackbox).shape == (1, 30, 20)
    assert GradCAMSimilarity()(image(30, 20, 0), [], blackbox).shape == (0, 30, 20)


def test_wrong_calls(model: Any) -> None:
    class Other(ImageDescriptorGenerator):
        def generate_arrays_from_images(self, img_mat_iter: Any) -> Any:
            return [np.ones(3) for _ in img_mat_iter]

        def get_config(self) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match="since Grad-CAM looks inside the model, got Other"):
        GradCAMSimilarity()(image(8, 8, 0), [image(8, 8, 1)], Other())
    with pytest.raises(ValueError, match="`batch` must be at least 1"):
        TorchDescriptor(nn.Identity(), batch=0)
    with pytest.raises(TypeError, match="`transform` must"):
        list(
            TorchDescriptor(model, transform=lambda m: torch.from_numpy(m)).images([image(8, 8, 0)])
        )
