"""Where and how the tests run: the device, seeds, and memory that shows what was not written."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# On a GPU cuBLAS warns of `poisoned` below without it; read when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton reads this when a kernel is decorated, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A child started in the root would import the source tree, which has no compiled module: it finds
# what the tests and the programs of bench/ share here instead.
os.environ["PYTHONSAFEPATH"] = "1"
ROOT = Path(__file__).resolve().parents[1]
SHARED = [str(ROOT / folder) for folder in ("tests", "bench", "bench/paper")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*SHARED, os.environ.get("PYTHONPATH")]))

# On a GPU convolutions are in TF32 by default, and here they are compared with the CPU's. For the
# whole run, since fixtures of sessions build databases.
torch.backends.cudnn.allow_tf32 = False

# On tensors this small a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ray", action="store_true", help="also run what starts a Ray cluster")
    parser.addoption("--slow", action="store_true", help="also run what is marked slow, as CI does")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: takes --slow")
    if item.get_closest_marker("ray") and not item.config.getoption("--ray"):
        pytest.skip("starts a Ray cluster, which takes the extra ray: takes --ray")


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
def gpu() -> torch.device:
    return torch.device("cuda", 0)
