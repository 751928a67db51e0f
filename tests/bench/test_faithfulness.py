"""The adapters of `bench/faithfulness.py`, on a network whose answer is known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"

# In a process of its own: making torchvision importable beside a CPU-only torch cannot be undone.
SCRIPT = """
import json
import torch
from torch import nn
from faithfulness import blank, deletion_insertion, road

class Corner(nn.Module):
    # Sees the upper left quarter alone: a bright one turns the embedding towards (1, 0).
    def forward(self, images):
        seen = images[:, 0, :4, :4].mean((1, 2))
        return torch.stack([seen, 0.5 + 0 * seen], 1)

torch.manual_seed(0)
images = torch.rand(2, 3, 8, 8) * 0.1
images[:, :, :4, :4] += 0.9  # the rest is dark, and so is the mean colour
right = torch.rand(2, 8, 8) * 0.01
wrong = right.clone()
right[:, :4, :4] += 0.9
wrong[:, 4:, 4:] += 0.9
own = Corner()(images)
answers = {
    "deletion, insertion": [
        deletion_insertion(Corner(), images, maps, own, steps=8) for maps in (right, wrong)
    ],
    "nothing left": torch.cosine_similarity(Corner()(blank(images)), own).mean().item(),
    "blank": (blank(images) - images.mean((2, 3))[:, :, None, None]).abs().max().item(),
}
both = torch.stack([own, torch.tensor([[0.0, 1.0]]).expand(2, 2)], 1)
answers["road"] = [
    road(Corner(), images, maps, both, percentiles=[75]).tolist() for maps in (right, wrong)
]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[float]]]:
    needed = ("torchcam", "pytorch_grad_cam", "torchvision", "cv2", "ttach")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (see bench/faithfulness.py)")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=BENCH, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_deletion_and_insertion(answers: dict[str, list[list[float]]]) -> None:
    right, wrong = answers["deletion, insertion"]
    assert right[0] < wrong[0] - 0.05
    assert right[1] > wrong[1] + 0.05
    assert answers["blank"] < 1e-6  # type: ignore[operator]
    # Where deletion ends: at the mean colour alone.
    assert right[0] > answers["nothing left"]  # type: ignore[operator]


def test_road(answers: dict[str, list[list[float]]]) -> None:
    right, wrong = answers["road"]
    assert len(right) == 2
    assert all(a[0] > max(b[0], 0) for a, b in zip(right, wrong, strict=True))
    # What takes the picture from itself brings it nearer to what an empty one is.
    assert all(a[1] < min(b[1], 0) for a, b in zip(right, wrong, strict=True))
