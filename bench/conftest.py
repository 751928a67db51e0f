"""Conditions beside every benchmark's figures."""

from typing import Any

import pytest
from paired import conditions


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    del config
    machine_info.update(conditions())
