"""Optional libraries for tests, skipped where they are missing."""

from types import ModuleType

import pytest
import torch

_torchvision: list[torch.library.Library] = []


def library(name: str) -> ModuleType:
    """Import a library of models, or skip the test.

    A torchvision whose compiled part does not fit this PyTorch (a CPU-only one) fails to import for
    want of two operators that no test runs.
    """
    try:
        import torchvision
    except ImportError:
        pass
    except RuntimeError:
        if not _torchvision:
            _torchvision.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                _torchvision[0].define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        import torchvision  # noqa: F401
    return pytest.importorskip(name)
