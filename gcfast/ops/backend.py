"""Which code runs an operation: Triton's kernels or the PyTorch reference."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from gcfast._checks import require_choice
from gcfast.errors import MissingExtraError

BACKENDS = ("auto", "triton", "reference")


def uses_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels run on these tensors.

    "auto" takes them for tensors on a GPU where Triton is installed, unless one is float64, which
    the kernels do not compute in. Nothing here waits for the device.

    Args:
        backend: "auto", "triton" or "reference".
        tensors: the operation's tensors, the first of which is given and decides the device.

    Raises:
        MissingExtraError: "triton", which is not installed.
        ValueError: an unknown backend; "triton" for float64, or for tensors that are not on a GPU
            while Triton's interpreter is off.
    """
    if backend == "reference":
        return False
    first = tensors[0]
    assert first is not None
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    if backend == "auto":
        return first.is_cuda and not double and triton_installed()
    require_choice("backend", backend, BACKENDS)
    if not triton_installed():
        raise MissingExtraError(
            "`backend` 'triton' needs Triton, which is not installed: pip install 'gcfast[gpu]'"
        )
    if double:
        raise ValueError(
            "`backend` must be 'auto' or 'reference' for float64 tensors, got 'triton'"
        )
    if not first.is_cuda and not _interpreting():
        raise ValueError(
            f"`backend` must be 'auto' or 'reference' for tensors on {first.device}, got 'triton': "
            "its kernels run on a GPU, or interpreted where TRITON_INTERPRET=1 was set"
        )
    return True


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
