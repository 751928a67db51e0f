"""`gcfast explain`, end to end on small pictures and a small network."""

import base64
import csv
import io
import json
import os
import re
import sys

import numpy as np
import pytest
from cli_case import SETTINGS, VIEW, fails, run
from PIL import Image

from gcfast.cli.outputs import MapWriter

# Python 3.12 and later warn of any fork of a process with threads, which PyTorch always has.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def read_results(out):
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def images_by_caption(page, caption):
    """The page's images under a caption, [B, H, W, 3]."""
    pattern = rf'src="[^"]*base64,([^"]*)"[^>]*><figcaption>{caption}</figcaption>'
    files = [io.BytesIO(base64.b64decode(data)) for data in re.findall(pattern, page)]
    return np.stack([np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files])


def test_explain(here, capsys, tmp_path):
    out = tmp_path / "out"
    status, told, err = run(
        capsys, "explain", "--database", "db", *SETTINGS, "--out", out, "--batch-size", "4",
        "pictures/blue/3.png", "pictures/red",
    )  # fmt: skip
    assert status == 0
    assert told == f"{out / 'index.html'}: 7 pictures\n"
    assert "unreadable pictures, skipped: 1\n  pictures/red/broken.png: " in err

    rows = read_results(out)
    assert [r["path"] for r in rows] == [
        "pictures/blue/3.png",
        *(f"pictures/red/{i}.{'jpg' if i == 5 else 'png'}" for i in range(6)),
        "pictures/red/broken.png",
    ]
    assert rows[-1]["error"].startswith("UnidentifiedImageError")
    assert rows[-1]["map"] == ""
    # Pictures of the database find themselves.
    for row in rows[:-1]:
        assert row["path"] == f"pictures/{row['neighbor_id']}"
        assert row["neighbor_path"] == os.fspath(here / row["path"])
        assert row["label"] == row["path"].split("/")[1]
        assert float(row["distance"]) == pytest.approx(0, abs=1e-5)

    maps = np.load(out / "maps.npy", mmap_mode="r")
    assert (maps.shape, maps.dtype) == ((7, 32, 32), np.float32)
    assert maps.min() >= 0
    assert maps.max() <= 1
    for row in rows[:-1]:
        assert int(row["flat"]) == (maps[int(row["map"])].max() == 0)
        with Image.open(out / row["overlay"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (48, 40))

    page = (out / "index.html").read_text()
    # The input, its heat, the neighbor and what they have in common on either; on demand the map
    # that is not refined and the neighbor's own.
    assert page.count("<img ") == 7 * 7
    assert page.count("<details>") == page.count("heat, not refined</figcaption>") == 7
    assert "refined by features.1 of the same picture" in page
    assert "Pictures that could not be read" in page


def test_explain_equals_the_library(here, capsys, tmp_path):
    import gcfast
    from gcfast.images.folder import ImageLoader, Preprocessing

    sys.path.insert(0, os.fspath(here))
    try:
        import cli_net
    finally:
        sys.path.remove(os.fspath(here))
    run(capsys, "explain", "--database", "db", *SETTINGS, "--out", tmp_path, "pictures/green")
    explainer = gcfast.load("db", cli_net.build(), refine="auto")
    files = [f"pictures/green/{i}.{'jpg' if i == 5 else 'png'}" for i in range(6)]
    loader = ImageLoader(files, files, preprocessing=Preprocessing(size=32))
    want = np.concatenate([explainer.explain_batch(x).numpy() for x, _, _ in loader])
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), want, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_explain_with_several_neighbours_and_workers(capsys, tmp_path):
    status, _, _ = run(
        capsys, "explain", "--database", "db", "--model", "cli_net:build", "--workers", "2",
        "--out", tmp_path, "--k", "3", "--center", "1", "--page-rows", "2", "pictures/green",
    )  # fmt: skip
    assert status == 0
    rows = read_results(tmp_path)
    assert len(rows) == 6
    for row in rows:
        distances = [float(row[f"distance{s}"]) for s in ("", "_2", "_3")]
        assert distances == sorted(distances)
        assert len({row[f"neighbor_row{s}"] for s in ("", "_2", "_3")}) == 3
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article") == 2
    assert "Shown are the first 2 of 6" in page


@pytest.mark.usefixtures("here")
def test_explain_with_finer_maps(capsys, tmp_path):
    base = ("explain", "--database", "db", *SETTINGS, "pictures/green")
    maps, pages = {}, {}
    for name in ("none", "auto", "features.0", "features.1", "features.1,features.0"):
        status, _, err = run(capsys, *base, "--refine", name, "--out", tmp_path / name)
        assert status == 0, err
        maps[name] = np.load(tmp_path / name / "maps.npy")
        pages[name] = (tmp_path / name / "index.html").read_text()
    assert np.array_equal(maps["auto"], maps["features.1"])
    # The plain map of a refined page is the one that a page without has on top. Batches of one
    # image round otherwise than those of six, and JPEG rounds again.
    assert "not refined" not in pages["none"]
    plain = images_by_caption(pages["none"], "heat")
    assert np.abs(images_by_caption(pages["auto"], "heat, not refined") - plain).max() < 8
    assert np.abs(images_by_caption(pages["auto"], "heat") - plain).max() > 50
    # These pictures are the database's: each is its own neighbor.
    for page in pages.values():
        own = images_by_caption(page, "own heat of the nearest")
        assert np.abs(own - images_by_caption(page, "heat")).max() < 8
    assert np.abs(maps["none"] - maps["features.0"]).max() > 0.1
    assert np.abs(maps["features.1,features.0"] - maps["features.0"]).max() > 0.01
    assert "`--refine` must name a module of `--model`, got 'features.9'" in fails(
        capsys, *base, "--refine", "features.9", "--out", tmp_path / "wrong"
    )


def test_explain_finds_pictures_that_moved_or_does_without(here, capsys, tmp_path):
    pictures = tmp_path / "moved"
    os.rename(here / "pictures", pictures)
    try:
        one = pictures / "red" / "0.png"
        base = ("explain", "--database", "db", *SETTINGS, one, "--out")
        assert run(capsys, *base, tmp_path / "a")[0] == 0
        assert read_results(tmp_path / "a")[0]["neighbor_path"] == ""
        assert "picture not found" in (tmp_path / "a" / "index.html").read_text()
        assert run(capsys, *base, tmp_path / "b", "--images", pictures)[0] == 0
        assert read_results(tmp_path / "b")[0]["neighbor_path"] == os.fspath(one)
    finally:
        os.rename(pictures, here / "pictures")


@pytest.mark.usefixtures("here")
def test_explain_errors(capsys, tmp_path):
    def explain(*more, out="new", database="db"):
        return fails(
            capsys, "explain", "--database", database, *SETTINGS, "--out", tmp_path / out, *more
        )

    one = "pictures/red/0.png"
    (tmp_path / "empty").mkdir()
    assert "`PATH` must exist, got nowhere.png" in explain("nowhere.png")
    assert "`PATH` must be a picture or hold some" in explain(tmp_path / "empty")
    assert "none of the 1 pictures can be read" in explain("pictures/red/broken.png", out="b")
    assert "cannot read pictures/red/broken.png" in explain("pictures/red", "--strict", out="s")
    assert "there is no database at nowhere" in explain(one, database="nowhere")
    assert "`--alpha` must be in [0, 1], got 2.0" in explain(one, "--alpha", "2")
    assert "`--dim` must be in [0, 1], got 2.0" in explain(one, "--dim", "2")
    assert explain(one, "--model", "cli_net:other", out="m")
    assert not (tmp_path / "m").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert "holds notes.txt; --force writes" in explain(one, out="full")
    assert (
        run(capsys, "explain", "--database", "db", *SETTINGS, "--out", full, "--force", one)[0] == 0
    )
    assert (full / "notes.txt").read_text() == "mine"


def test_explain_takes_any_file_name(here, capsys, tmp_path):
    odd = tmp_path / "in" / os.fsdecode(b"\xff, <b>\n.png")
    odd.parent.mkdir()
    os.link(here / "pictures" / "red" / "0.png", odd)
    out = tmp_path / "out"
    status, _, _ = run(capsys, "explain", "--database", "db", *SETTINGS, "--out", out, odd.parent)
    assert status == 0
    with open(out / "results.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.DictReader(file))["path"] == os.fspath(odd)


@pytest.mark.usefixtures("here")
def test_explain_with_more_neighbours_than_rows(capsys, tmp_path):
    status, _, _ = run(
        capsys, "explain", "--database", "db", *SETTINGS, "--out", tmp_path, "--k", "20",
        "pictures/red/0.png",
    )  # fmt: skip
    assert status == 0
    row = read_results(tmp_path)[0]
    assert row["distance_18"] != ""
    assert row["distance_19"] == row["neighbor_id_20"] == ""


@pytest.mark.usefixtures("here")
def test_a_database_that_does_not_say_how_pictures_were_prepared(capsys, tmp_path):
    import gcfast

    database = gcfast.Database.open("db")
    database.manifest["preprocessing"] = None
    database.save(tmp_path / "bare")
    line = fails(
        capsys, "explain", "--database", tmp_path / "bare", *SETTINGS, "--out", tmp_path / "out",
        "pictures/red",
    )  # fmt: skip
    assert "must say how its pictures were prepared" in line


@pytest.mark.usefixtures("here")
def test_model_that_returns_a_dict(capsys, tmp_path):
    keyed = ("--model", "cli_net:keyed", "--workers", "0", "--output-key", "vector")
    status, _, _ = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *keyed, *VIEW
    )
    assert status == 0
    status, _, _ = run(
        capsys, "explain", "--database", tmp_path / "db", *keyed[:4], "--out", tmp_path / "out",
        "pictures/red/0.png",
    )  # fmt: skip
    assert status == 0


@pytest.mark.usefixtures("here")
def test_transformer_tokens(capsys, tmp_path):
    model = ("--model", "cli_net:tokens", "--workers", "0")
    status, out, _ = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *model, *VIEW,
        "--layer", "block", "--tokens", "1",
    )  # fmt: skip
    assert status == 0
    assert out.endswith("layer block\n")
    status, _, _ = run(
        capsys, "explain", "--database", tmp_path / "db", *model, "--out", tmp_path / "out",
        "pictures/red/0.png",
    )  # fmt: skip
    assert status == 0
    assert np.load(tmp_path / "out" / "maps.npy").shape == (1, 32, 32)


def test_maps_are_readable_after_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"`maps` must have shape \[B, 4, 5\], got \[1, 5, 5\]"):
        stream(tmp_path / "maps.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), np.ones((3, 4, 5), np.float32))


def stream(path):
    with MapWriter(path) as maps:
        maps.write(np.ones((2, 4, 5), np.float32))
        maps.write(np.ones((1, 4, 5), np.float32))
        maps.write(np.ones((1, 5, 5), np.float32))


@pytest.mark.usefixtures("here")
def test_the_way_back_from_a_map_to_its_picture(capsys, tmp_path):
    from gcfast.images.preprocessing import Preprocessing

    base = ("explain", "--database", "db", *SETTINGS, "pictures/red", "--out")
    assert run(capsys, *base, tmp_path / "a")[0] == 0
    rows = json.loads((tmp_path / "a" / "transforms.json").read_text())
    assert [row["map"] for row in rows] == list(range(6))
    assert rows[2] == {
        "map": 2,
        "path": "pictures/red/2.png",
        "map_size": [32, 32],
        "picture_size": [40, 48],
        "x0": 4.0,
        "y0": 0.0,
        "scale_x": 1.25,
        "scale_y": 1.25,
    }
    assert Preprocessing(32).window((48, 40)) == (4, 0, 44, 40)
    # What the network did not see has no color.
    with Image.open(tmp_path / "a" / read_results(tmp_path / "a")[0]["overlay"]) as picture:
        pixels = np.asarray(picture).astype(int)
    assert np.ptp(pixels[:, :4], axis=-1).max() == 0
    assert np.ptp(pixels[:, 4:44], axis=-1).max() > 50
    assert run(capsys, *base, tmp_path / "b", "--overlays", "view")[0] == 0
    with Image.open(tmp_path / "b" / read_results(tmp_path / "b")[0]["overlay"]) as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.usefixtures("here")
def test_inputs_that_are_not_square(capsys, tmp_path, fit):
    status, _, err = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *SETTINGS,
        "--size", "48", "24", "--fit", fit, "--channels", "5",
    )  # fmt: skip
    assert status == 0
    assert "assumed where" in err
    assert "(--mean, --std, --interpolation): 48 x 24, " in err
    status, _, _ = run(
        capsys, "explain", "--database", tmp_path / "db", *SETTINGS, "--out", tmp_path / "out",
        "pictures/red/0.png",
    )  # fmt: skip
    assert status == 0
    assert np.load(tmp_path / "out" / "maps.npy").shape == (1, 48, 24)
    with Image.open(tmp_path / "out" / read_results(tmp_path / "out")[0]["overlay"]) as picture:
        assert picture.size == (48, 40)


def test_a_transform_of_the_users(here, capsys, tmp_path):
    (here / "cli_views.py").write_text(
        "import numpy as np, torch\n"
        "def view(picture):\n"
        "    values = np.asarray(picture.resize((40, 32)), np.float32) / 255 - 0.5\n"
        "    return torch.from_numpy(values.transpose(2, 0, 1).copy())\n"
    )
    status, _, err = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *SETTINGS, *VIEW[2:],
        "--transform", "cli_views:view",
    )  # fmt: skip
    assert status == 0
    assert "preprocessing: cli_views:view\n" in err
    status, _, err = run(
        capsys, "explain", "--database", tmp_path / "db", *SETTINGS, "--out", tmp_path / "out",
        "pictures/red/0.png",
    )  # fmt: skip
    assert status == 0
    assert "overlays show what cli_views:view gives" in err
    assert np.load(tmp_path / "out" / "maps.npy").shape == (1, 32, 40)
    (row,) = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert row == {"map": 0, "path": "pictures/red/0.png", "map_size": [32, 40]}
    sys.modules.pop("cli_views", None)
