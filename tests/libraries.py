"""Optional libraries for tests, skipped where they are missing."""

from types import ModuleType

import pytest
from torchvision_on_cpu import make_torchvision_importable


def library(name: str) -> ModuleType:
    """Import a library of models, or skip the test.

    A torchvision whose compiled part does not fit this PyTorch (a CPU-only one) is made importable.
    """
    make_torchvision_importable()
    return pytest.importorskip(name)
