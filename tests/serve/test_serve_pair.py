"""POST /pair: what it answers, and that it is what explain_pair gives."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from gcfast.errors import UnsupportedModelError
from gcfast.images.overlay import overlay
from gcfast.serve.served import Served


def npy(content):
    return np.load(io.BytesIO(content))


def png(content):
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture)


@pytest.fixture
def paths(here):
    return here / "pictures" / "red" / "0.png", here / "pictures" / "blue" / "2.png"


@pytest.fixture
def expected(source, paths):
    """(views, what the library gives)."""
    served = source()
    views = [np.array(served.preprocessing.load(path).values) for path in paths]
    images = [served.preprocessing.normalize(torch.from_numpy(view)[None]) for view in views]
    return views, served.explainer.explain_pair(*images)


def files(paths):
    return dict(zip(("image", "other"), (path.read_bytes() for path in paths), strict=False))


def test_two_pictures(serving, paths, expected):
    views, why = expected
    heats = [why.query[0].numpy(), why.match[0].numpy()]
    with serving() as client:
        query = "?include=overlay&include=map&include=picture"
        said = client.post(f"/pair{query}", files=files(paths)).json()
        drawn = client.post("/pair?format=png", files=files(paths))
        maps = client.post("/pair", files=files(paths), headers={"Accept": "application/x-npy"})
        version = client.service.served.version
    wanted = [overlay(*one, alpha=0.8, dim=0.5) for one in zip(views, heats, strict=True)]
    assert npy(maps.content).shape == (2, 32, 32)
    np.testing.assert_array_equal(npy(maps.content), np.stack(heats))
    np.testing.assert_array_equal(png(drawn.content), np.hstack(wanted))
    images = {
        name: base64.b64decode(said.pop(name))
        for name in ("overlay", "other_overlay", "picture", "other_picture", "map")
    }
    assert said == {
        "similarity": pytest.approx(float(why.similarity[0])),
        "rest": pytest.approx(float(why.query_rest[0])),
        "other_rest": pytest.approx(float(why.match_rest[0])),
        "nearest": None,
        "map_size": [32, 32],
        "database": version,
    }
    np.testing.assert_array_equal(npy(images["map"]), np.stack(heats))
    for name, view, drawing in zip(("", "other_"), views, wanted, strict=True):
        np.testing.assert_array_equal(png(images[f"{name}picture"]), view)
        np.testing.assert_array_equal(png(images[f"{name}overlay"]), drawing)


def test_a_picture_and_its_nearest_row(serving, paths):
    given = files(paths[:1])
    with serving() as client:
        said = client.post("/pair?include=picture", files=given).json()
        nearest = client.post("/explain?include=neighbor", files=given).json()
        assert said["nearest"] == nearest["neighbors"][0]
        assert said["other_picture"] == nearest["neighbor"]
        assert said["overlay"] is said["map"] is None
        object.__setattr__(client.service.served, "images", None)
        answer = client.post("/pair", files=given)
    assert answer.status_code == 404
    assert answer.json()["detail"] == "no picture of the nearest row is shown here"


def test_refusals(serving, paths, monkeypatch):
    def refuses(*_):
        raise UnsupportedModelError("in /srv/some/file")

    with serving() as client:
        other = {**files(paths), "other": b"no picture"}
        assert client.post("/pair", files=other).status_code == 415
        assert client.post("/pair", files={"other": other["image"]}).status_code == 400
        monkeypatch.setattr(Served, "explain_pairs", refuses)
        answer = client.post("/pair", files=files(paths))
    assert answer.status_code == 501
    assert answer.json()["detail"] == "pairs of this network cannot be explained"
