"""The adapters of `bench/faithfulness.py`, on a network whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

BENCH = Path(__file__).parent.parent / "bench"


class Corner(nn.Module):
    """Sees the upper left quarter alone: a bright one turns the embedding from (0, 1) to (1, 0)."""

    def forward(self, images: Tensor) -> Tensor:
        seen = images[:, 0, :4, :4].mean((1, 2))
        return torch.stack([seen, 0.1 + 0 * seen], 1)


@pytest.fixture
def scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, the right maps, the wrong ones, and the images' own embeddings."""
    images = torch.rand(2, 3, 8, 8) * 0.1 + 0.9
    right = torch.rand(2, 8, 8) * 0.01
    wrong = right.clone()
    right[:, :4, :4] += 0.9
    wrong[:, 4:, 4:] += 0.9
    return images, right, wrong, Corner()(images)


def module(monkeypatch: pytest.MonkeyPatch, *needed: str):  # type: ignore[no-untyped-def]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (gcfast's extra [bench])")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("faithfulness", "peers"):
        sys.modules.pop(name, None)
    return importlib.import_module("faithfulness")


def test_deletion_and_insertion(
    monkeypatch: pytest.MonkeyPatch, scene: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    faithfulness = module(monkeypatch, "torchcam", "torchvision")
    images, right, wrong, own = scene
    good = faithfulness.deletion_insertion(Corner(), images, right, own, steps=8)
    bad = faithfulness.deletion_insertion(Corner(), images, wrong, own, steps=8)
    assert good[0] < 0.5 < bad[0]
    assert good[1] > 0.8 > bad[1]
    # All gone is (0, 0.1): its cosine to the image's own embedding is where deletion ends.
    end = float(torch.nn.functional.cosine_similarity(torch.tensor([[0.0, 1.0]]), own).mean())
    assert good[0] > end


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of grad-cam's own code
def test_road(
    monkeypatch: pytest.MonkeyPatch, scene: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    faithfulness = module(monkeypatch, "pytorch_grad_cam", "torchvision", "cv2", "ttach")
    images, right, wrong, own = scene
    # Blurring a bright picture leaves it bright: dark surroundings are what ROAD fills in from.
    images[:, :, 4:] = images[:, :, :, 4:] = 0
    good = faithfulness.road(Corner(), images, right, own, percentiles=[75])
    bad = faithfulness.road(Corner(), images, wrong, own, percentiles=[75])
    assert good.shape == (2,)
    assert (good > bad).all()
    assert (good > 0).all()
