"""A small network with a database in a folder, as the front ends for embeddings take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from networks import AFFINE_HEADS, CHANNELS, Net, loader, pictures
from torch import Tensor

import gcfast


class Built(NamedTuple):
    model: Any  # in evaluation mode; its layer is `backbone`
    path: Path
    images: Tensor  # [B, 3, h, w], unseen
    explainer: gcfast.Explainer


@pytest.fixture(params=["gradcam", "proxy"])
def built(tmp_path: Path, request: pytest.FixtureRequest) -> Built:
    model = Net(AFFINE_HEADS["linear"](CHANNELS)).eval()
    images, labels = pictures(24)
    settings = {"triplets": 4, "channels": 5} if request.param == "gradcam" else {}
    explainer = gcfast.Explainer(model, "backbone", method=request.param, **settings)
    explainer.build(loader(images, [f"class {n}" for n in labels.tolist()]))
    assert explainer.database is not None
    explainer.database.save(tmp_path / "db")
    return Built(model, tmp_path / "db", torch.randn(3, 3, 8, 8), explainer)


@pytest.fixture
def small(built: Built) -> gcfast.Database:
    """The database with other units of its loss, which no normalized map shows.

    Class proxies have no loss: theirs is as it was.
    """
    database = gcfast.Database.open(built.path)
    if built.explainer.settings.is_proxy:
        return database
    names = ("embeddings", "channels", "weights", "offsets", "labels", "triplet_counts")
    tensors = {name: getattr(database, name).clone() for name in names}
    tensors["weights"] *= 1e-9
    tensors["offsets"] *= 1e-9
    return gcfast.Database(tensors, list(database.ids), database.manifest)
