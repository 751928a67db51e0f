"""POST /explain: what it answers, and that it is what explain_batch gives."""

import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from gcfast.images.overlay import overlay
from gcfast.serve.served import Served, shown_id


def post(client, path, query="", **headers):
    files = {"image": path.read_bytes()}
    return client.post(f"/explain{query}", files=files, headers=headers)


def npy(content):
    return np.load(io.BytesIO(content))


def png(content):
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


@pytest.fixture
def expected(source):
    """What the library gives for a picture: (view, explanation)."""
    served = source()

    def explain(path):
        view = np.array(served.preprocessing.load(path).values)
        images = served.preprocessing.normalize(torch.from_numpy(view)[None])
        return view, served.explainer.explain_batch(images, details=True)

    return explain


def test_json(here, serving, expected):
    path = here / "pictures" / "blue" / "3.png"
    view, why = expected(path)
    heat = why.maps[0].numpy()
    query = "?" + "&".join(f"include={name}" for name in ("overlay", "map", "picture", "neighbor"))
    with serving() as client:
        answer = post(client, path, query)
        version = client.service.served.version
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    images = {name: said.pop(name) for name in ("overlay", "map", "picture", "neighbor")}
    row = int(why.neighbors[0, 0])
    assert said == {
        "neighbors": [
            {
                "row": row,
                "id": "blue/3.png",
                "label": "blue",
                "distance": pytest.approx(float(why.distances[0, 0])),
            }
        ],
        "flat": False,
        "confidence": None,
        "fidelity": None,
        "map_size": [32, 32],
        # 48 x 40, of which the middle 40 x 40 are seen at 32 x 32.
        "place": {"size": [40, 48], "x0": 4, "y0": 0, "scale_x": 1.25, "scale_y": 1.25},
        "database": version,
    }
    images = {name: base64.b64decode(content) for name, content in images.items()}
    np.testing.assert_array_equal(npy(images["map"]), heat)
    np.testing.assert_array_equal(png(images["picture"]), view)
    np.testing.assert_array_equal(png(images["neighbor"]), view)  # it is a row itself
    np.testing.assert_array_equal(png(images["overlay"]), overlay(view, heat, alpha=0.8, dim=0.5))


def test_json_is_small_unless_it_is_asked_for_more(here, serving):
    with serving() as client:
        said = post(client, here / "pictures" / "red" / "0.png").json()
    assert [said[name] for name in ("overlay", "map", "picture", "neighbor")] == [None] * 4


@pytest.mark.parametrize(
    ("query", "accept", "gives"),
    [
        ("", "*/*", "application/json"),
        ("", "image/png", "image/png"),
        ("", "image/*", "image/png"),
        ("", "application/x-npy", "application/x-npy"),
        ("", "text/html, application/x-npy;q=0.4, image/png;q=0.8", "image/png"),
        ("", "image/png;q=0, application/json;v=1", "application/json"),
        ("?format=npy", "image/png", "application/x-npy"),
        ("?format=png", "text/html", "image/png"),
    ],
)
def test_formats(here, serving, expected, query, accept, gives):
    path = here / "pictures" / "green" / "1.png"
    with serving() as client:
        answer = post(client, path, query, Accept=accept)
    assert (answer.status_code, answer.headers["content-type"]) == (200, gives)
    view, why = expected(path)
    heat = why.maps[0].numpy()
    if gives == "image/png":
        np.testing.assert_array_equal(png(answer.content), overlay(view, heat, alpha=0.8, dim=0.5))
    elif gives == "application/x-npy":
        found = npy(answer.content)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, heat)


def test_base64_in_json(here, serving, expected):
    path = here / "pictures" / "red" / "5.jpg"
    text = base64.b64encode(path.read_bytes()).decode()
    with serving() as client:
        answer = client.post("/explain?format=npy", json={"image": text})
    np.testing.assert_array_equal(npy(answer.content), expected(path)[1].maps[0].numpy())


def test_many_at_once_are_batched_and_not_mixed_up(here, serving, expected):
    paths = [p for p in sorted((here / "pictures").glob("*/*")) if p.name != "broken.png"] * 2
    with serving(wait=0.05, batch_size=8) as client, ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(lambda path: post(client, path, "?format=npy"), paths))
        metrics = client.get("/metrics").text
    for path, answer in zip(paths, answers, strict=True):
        # Of another batch size a convolution may round otherwise: worst seen 3e-7.
        wanted = expected(path)[1].maps[0].numpy()
        np.testing.assert_allclose(npy(answer.content), wanted, atol=1e-5)
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert float(counts["gcfast_batch_size_sum"]) == len(paths)
    assert float(counts["gcfast_batch_size_count"]) <= len(paths) / 2
    assert counts['gcfast_batch_size_bucket{le="8.0"}'] == counts["gcfast_batch_size_count"]
    assert counts['gcfast_requests_total{path="/explain",status="200"}'] == f"{len(paths)}.0"


def test_pictures_of_rows_can_be_kept_back(here, serving):
    path = here / "pictures" / "red" / "0.png"
    with serving() as client:
        served = client.service.served
        row = served.explain([served.preprocessing.load(path).values])[0].neighbors[0].row
        assert served.picture_of(row) is not None
        object.__setattr__(served, "images", None)
        assert post(client, path, "?include=neighbor").json()["neighbor"] is None


@pytest.mark.parametrize("name", ["../cli_net.py", "red/broken.png", "red/gone.png"])
def test_a_row_whose_picture_is_not_there_has_none(here, source, name):
    served = source()
    (here / "outside.png").write_bytes((here / "pictures" / "red" / "0.png").read_bytes())
    served.database.ids = [name]
    assert served.picture_of(0) is None
    served.database.ids = ["../outside.png"]
    assert served.picture_of(0) is None
    os.mkfifo(here / "pictures" / "pipe.png")  # to open it would never end
    served.database.ids = ["pipe.png"]
    assert served.picture_of(0) is None
    served.database.ids = ["red/0.png"]
    assert served.picture_of(0) is not None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("red/0.png", "red/0.png"),
        ("/home/someone/red/0.png", "0.png"),
        ("C:\\Users\\someone\\0.png", "0.png"),
        ("0", "0"),
    ],
)
def test_an_id_that_is_an_absolute_path_shows_its_name_alone(name, shown):
    assert shown_id(name) == shown


def test_a_padded_batch(here, source, monkeypatch):
    served = source()
    paths = [here / "pictures" / "red" / f"{i}.png" for i in range(3)]
    views = [served.preprocessing.load(path).values for path in paths]
    assert [served.padding(count) for count in (1, 3)] == [0, 0]
    plain = served.explain(views)
    with monkeypatch.context() as patch:
        patch.setattr(Served, "device", torch.device("cuda"))
        counts = (1, 2, 3, 4, 5, 32, 33)
        assert [served.padding(count) for count in counts] == [0, 0, 1, 0, 3, 0, 31]
    sizes, explain_batch = [], served.explainer.explain_batch
    monkeypatch.setattr(
        served.explainer,
        "explain_batch",
        lambda images, **settings: sizes.append(len(images)) or explain_batch(images, **settings),
    )
    monkeypatch.setattr(Served, "padding", lambda _, count: 4 - count)
    padded = served.explain(views)
    assert sizes == [4]
    for one, other in zip(plain, padded, strict=True):
        np.testing.assert_allclose(one.heat, other.heat, atol=1e-5)
        assert one.neighbors[0].id == other.neighbors[0].id
