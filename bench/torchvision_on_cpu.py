"""Import torchvision beside a CPU-only PyTorch, which its published wheels do not fit.

    python bench/torchvision_on_cpu.py PROGRAM [ARGUMENT ...]

runs a program where that is done first, for libraries that import torchvision (pytorch-grad-cam,
torch-cam). Where torchvision fits, or is not installed, nothing is changed.
"""

from __future__ import annotations

import runpy
import sys

import torch

LIBRARIES: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Declare the operators whose absence stops ``import torchvision``; nobody here calls them."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return  # whoever needs it will say so
    except (RuntimeError, AttributeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)  # the declaration lives as long as this


if __name__ == "__main__":
    make_torchvision_importable()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
