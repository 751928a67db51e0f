"""Folders that are damaged at random: an error in words, never a crash, a hang or another map."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_database import failures


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_every_fault_is_an_error_in_words(tmp_path: Path, count: int) -> None:
    """Longer, and other cases: tests/fuzz_database.py."""
    assert failures(count, 0, tmp_path, batch=100) == []
