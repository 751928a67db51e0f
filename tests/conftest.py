"""Where and how the tests run: the device, seeds, and memory that shows what was not written."""

import os

import torch

# On a GPU cuBLAS warns of `poisoned` below without it; read when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton reads this when a kernel is decorated, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import warnings
from collections.abc import Iterator

import pytest

# On tensors this small a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN (or the largest integer), so an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*does not have a deterministic implementation.*"
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A GPU that is pretended, and whose memory must not be freed while it is in use."""
    from pretend_cuda import PretendCuda  # which needs Triton

    with PretendCuda(monkeypatch) as mode:
        yield mode
    assert not mode.freed
