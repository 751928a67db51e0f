"""A folder to run commands in."""

import sys

import pytest
from cli_case import prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def here(made, monkeypatch):
    """The working directory of the commands; what they import from it is forgotten afterwards."""
    monkeypatch.chdir(made)
    yield made
    sys.modules.pop("cli_net", None)
