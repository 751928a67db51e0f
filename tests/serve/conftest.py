"""A database, its network, and an application on them."""

import os
import shutil
import sys
from contextlib import contextmanager

import pytest
from cli_case import prepare
from starlette.testclient import TestClient

import gcfast
from gcfast.images.preprocessing import Preprocessing
from gcfast.serve.app import create_app
from gcfast.serve.served import Served
from gcfast.serve.settings import ServeSettings


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("serve"))


@pytest.fixture
def here(made, tmp_path):
    """A folder with a network's module, pictures and a database of its own, `db`."""
    shutil.copytree(made, tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def source(here):
    """What opens the database, each time on one network."""
    sys.path.insert(0, os.fspath(here))
    try:
        import cli_net

        model = cli_net.build()
    finally:
        sys.path.remove(os.fspath(here))
        sys.modules.pop("cli_net", None)

    def opened():
        explainer = gcfast.load(here / "db", model)
        kept = explainer.database.manifest["preprocessing"]
        return Served(explainer, Preprocessing.from_dict(kept), here / "pictures")

    return opened


@pytest.fixture
def serving(source):
    """Start an application with some settings: a client of it, as a context."""

    @contextmanager
    def start(**settings):
        app = create_app(source, ServeSettings(**{"watch": 0, "wait": 0.0, **settings}))
        with TestClient(app, raise_server_exceptions=False) as client:
            client.service = app.state.service
            yield client

    return start
