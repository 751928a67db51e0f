"""A disk that fails from any write on, below Python: the old rows or the new ones stay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes calls fail."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux's LD_PRELOAD")
    made = tmp_path_factory.mktemp("library") / "failing_disk.so"
    source = str(TESTS / "failing_disk.c")
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-o", str(made), source, "-ldl"], check=True
    )
    return made


@pytest.mark.parametrize(
    ("operation", "fewest"),
    [
        pytest.param("build", 30, marks=SLOW),
        ("append", 8),
        pytest.param("remove", 5, marks=SLOW),
        pytest.param("relabel", 5, marks=SLOW),
        pytest.param("merge", 8, marks=SLOW),
        pytest.param("compress", 8, marks=SLOW),
        pytest.param("index", 5, marks=SLOW),
    ],
)
def test_whatever_fails_the_old_or_the_new_stays(
    library: Path, tmp_path: Path, operation: str, fewest: int
) -> None:
    program = [sys.executable, "-P", str(TESTS / "failing_disk.py"), str(tmp_path), operation]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(TESTS)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # whose threads do not survive a fork
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    cases = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(cases) > fewest
    *failed, last = cases
    assert (last["error"], last["new"]) == ("NoneType", True)
    for case in failed:
        assert (case["status"], case["error"]) == (0, "OSError"), case
        assert "cannot" in case["words"], case
        assert str(tmp_path) in case["words"], case
    # Old up to a point, and new from then on.
    new = [case["new"] for case in cases]
    assert new == sorted(new)
