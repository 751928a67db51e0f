"""An adapter whose library is not installed says which extra brings it."""

from __future__ import annotations

import importlib
import sys

import pytest

import gcfast

ADAPTERS = {
    "pytorch_grad_cam": ("pytorch_grad_cam", "pytorch-grad-cam"),
    "torchcam": ("torchcam", "torchcam"),
    "captum": ("captum", "captum"),
    "xaitk": ("smqtk_descriptors", "xaitk"),
    "hf": ("transformers", "hf"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = ADAPTERS[name]
    adapter = f"gcfast.adapters.{name}"
    for module in [m for m in sys.modules if m.split(".")[0] == package or m == adapter]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"`{adapter}` needs {package}.*, which is not installed: .*gcfast\[{extra}\]"
    with pytest.raises(gcfast.MissingExtraError, match=words):
        importlib.import_module(adapter)
