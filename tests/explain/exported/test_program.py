"""Graphs that hold for one size of images alone are refused, or told of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import Net, common, loader, pictures
from torch import nn

from gcfast import Explainer
from gcfast.errors import UnsupportedModelError
from gcfast.explain.exported.program import check_sizes, decomposed, require_free

ANY = ("batch", "height")


class Padded(nn.Module):
    """Fills images up where patches of 4 do not cover them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2] % 4:
            images = F.pad(images, (0, 0, 0, 4 - images.shape[2] % 4), value=1.0)
        return self.head(self.patches(images).mean((2, 3)))


@pytest.fixture
def module():
    return made(common(), None)


def made(model, layer):
    explainer = Explainer(model.eval(), layer, channels=4, triplets=5)
    explainer.build(loader(*pictures(30)))
    explainer.explain_batch(pictures(2)[0])
    return explainer.export()


def test_a_side_that_is_fixed_without_a_word():
    module = made(Padded(), "patches")
    words = r"dynamic=\('batch', 'height'\), .*: its height is then always 8"
    with pytest.raises(UnsupportedModelError, match=words):
        decomposed(module, torch.zeros(1, 3, 8, 8), ANY)
    with pytest.raises(UnsupportedModelError, match="its batch is then always 3"):
        require_free((3, 3, 8, 8), ("batch",))


def test_other_sizes_are_compared(module):
    images, tried = pictures(2)[0], []

    def wrong_for(*heights):
        def run(noise):
            tried.append(tuple(noise.shape[2:]))
            return 1 - module(noise) if noise.shape[2] in heights else module(noise)

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sizes(wrong_for(), module, images, ANY)
        assert tried == [(8, 8), (9, 8), (12, 8), (16, 8)]
        check_sizes(wrong_for(8, 9, 12, 16), module, images, ("batch",))
    with pytest.warns(UserWarning, match="images of 9 x 8, 16 x 8, and others for 12 x 8: what"):
        check_sizes(wrong_for(12), module, images, ANY)
    with pytest.raises(UnsupportedModelError, match="other maps for images of 9 x 8, 12 x 8, 16 x"):
        check_sizes(wrong_for(9, 12, 16), module, images, ANY)


def test_what_cannot_be_run_cannot_be_compared(module):
    images = pictures(2)[0]

    def nowhere(_):
        raise RuntimeError("not for this processor")

    def its_own(noise):
        if noise.shape[2] != 8:
            raise RuntimeError("invalid dimensions")
        return module(noise)

    check_sizes(nowhere, module, images, ANY)
    with pytest.raises(UnsupportedModelError, match="other maps for images of 9 x 8"):
        check_sizes(its_own, module, images, ANY)


def test_a_size_that_the_model_refuses_is_passed_over():
    class Strict(Net):
        def forward(self, images):
            if images.shape[2] % 8:
                raise ValueError("multiples of 8")
            return super().forward(images)

    module, tried = made(Strict(common().head), None), []

    def run(noise):
        tried.append(noise.shape[2])
        return module(noise)

    check_sizes(run, module, pictures(2)[0], ANY)
    assert tried == [8, 16]
