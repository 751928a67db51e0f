"""The command line, end to end on small pictures and a small network."""

import csv
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gcfast.cli import main
from gcfast.cli_explain import MapWriter

# Python 3.12 and later warn of any fork of a process with threads, which PyTorch always has.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def build(seed=0):
    torch.manual_seed(seed)
    return Net()

def other():
    return build(1)

def tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 12, 8, 8)
            self.block = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
            self.head = nn.Linear(12, 6)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([x.new_zeros(len(x), 1, 12), x], 1)
            return self.head(self.block(x).amax(1))

    torch.manual_seed(0)
    return Tokens()

def keyed():
    class Keyed(Net):
        def forward(self, x):
            return {"mean": x.mean(), "vector": super().forward(x)}
    torch.manual_seed(0)
    return Keyed()
"""

SETTINGS = ("--model", "cli_net:build", "--workers", "0")
VIEW = ("--size", "32", "--channels", "5")


def picture(kind, number):
    """Red discs, green squares, blue stripes, at places that differ."""
    image = Image.new("RGB", (48, 40), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    x = 4 + 3 * number
    if kind == "red":
        draw.ellipse((x, 6, x + 18, 24), (230, 20, 20))
    elif kind == "green":
        draw.rectangle((x, 10, x + 15, 25), (20, 220, 30))
    else:
        for y in range(2, 40, 6):
            draw.line((0, y, 48, y + number), (30, 40, 230), 2)
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network's module, pictures in every mode and a database of them."""
    root = tmp_path_factory.mktemp("cli")
    (root / "cli_net.py").write_text(NET)
    for kind in ("red", "green", "blue"):
        folder = root / "pictures" / kind
        folder.mkdir(parents=True)
        for i, mode in enumerate(("RGB", "RGBA", "P", "RGB", "L", "CMYK")):
            image = picture(kind, i).convert(mode)
            image.save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    (root / "pictures" / "red" / "broken.png").write_bytes(b"no picture")
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main(["build", "--images", "pictures", "--out", "db", *SETTINGS, *VIEW]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(made, monkeypatch):
    """The working directory of the commands, and everything imported from it forgotten."""
    monkeypatch.chdir(made)
    yield made
    sys.modules.pop("cli_net", None)


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([os.fspath(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that a failing command prints."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[-1].startswith("gcfast: ")
    assert "Traceback" not in err
    return lines[-1]


# build


@pytest.mark.usefixtures("here")
def test_build_counts_what_it_skips(capsys, tmp_path):
    status, out, err = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *SETTINGS, *VIEW
    )
    assert status == 0
    assert out == f"{tmp_path / 'db'}: 18 rows, 3 classes, layer features\n"
    assert "unreadable pictures, skipped: 1\n  red/broken.png: UnidentifiedImageError" in err


def test_build_takes_every_setting(here, capsys, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "path,label\n" + "".join(f"{k}/{i}.png,{k[0]}\n" for k in ("red", "blue") for i in range(4))
    )
    status, _, _ = run(
        capsys, "build", "--images", "pictures", "--labels", labels, "--out", tmp_path / "db",
        *SETTINGS, "--method", "gradcam++", "--objective", "triplet", "--margin", "0.4",
        "--triplets", "all", "--channels", "all", "--evidence", "against",
        "--seed", "3", "--no-l2-normalize",
        "--layer", "features.1", "--size", "24", "--resize", "stretch", "--strict",
        "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2", "--batch-size", "3",
    )  # fmt: skip
    assert status == 0
    _, out, _ = run(capsys, "info", tmp_path / "db", "--json")
    manifest = json.loads(out)["manifest"]
    assert manifest["layer"] == "features.1"
    settings = manifest["settings"]
    assert (settings["method"], settings["evidence"]) == ("gradcam++", "against")
    assert settings["l2_normalize"] is False
    assert (settings["triplets"], settings["channels"], settings["seed"]) == ("all", "all", 3)
    assert manifest["preprocessing"] == {
        "size": 24,
        "resize": "stretch",
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "images": os.fspath(here / "pictures"),
        "tokens": None,
    }
    assert json.loads(out)["rows"] == 8


@pytest.mark.parametrize("objective", ["distance-difference", "positive", "negative"])
@pytest.mark.usefixtures("here")
def test_build_objectives(capsys, tmp_path, objective):
    status, _, _ = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", *SETTINGS, *VIEW,
        "--objective", objective,
    )  # fmt: skip
    assert status == 0


@pytest.mark.usefixtures("here")
def test_build_errors(capsys, tmp_path):
    def build(*more, images="pictures", out="new"):
        return fails(
            capsys, "build", "--images", images, "--out", tmp_path / out, *SETTINGS, *VIEW, *more
        )

    (tmp_path / "empty").mkdir()
    assert "must hold pictures in a folder for each class" in build(images=tmp_path / "empty")
    assert "does not exist" in build(images="nowhere")
    assert "cannot read" in build("--strict")
    assert "red/broken.png" in build("--strict")
    assert "`--margin` must be left out with" in build("--margin", "1", "--objective", "positive")
    assert "features.3" in build("--layer", "features.9")
    assert "must be package.module:function" in build("--model", "resnet50")
    assert "has no bild (but build" in build("--model", "cli_net:bild")
    assert '`--device` must be "cpu"' in build("--device", "toaster")
    assert "`size` must be at least 1" in build("--size", "0")
    assert "`weights` must be a file" in build("--weights", "none.pth")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("here")
def test_databases_are_replaced_only_by_force_and_nothing_else_ever(capsys, tmp_path):
    def arguments(out, *more):
        return ("build", "--images", "pictures", "--out", out, *SETTINGS, *VIEW, *more)

    database = tmp_path / "db"
    assert run(capsys, *arguments(database))[0] == 0
    assert "is there; --force replaces it" in fails(capsys, *arguments(database))
    assert run(capsys, *arguments(database, "--force"))[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["db"]

    (database / "thesis.tex").write_text("years of work")
    assert "also holds thesis.tex" in fails(capsys, *arguments(database, "--force"))
    other = tmp_path / "website"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web page"}')
    assert "is no gcfast database" in fails(capsys, *arguments(other, "--force"))
    (tmp_path / "file").write_text("text")
    assert "is no gcfast database" in fails(capsys, *arguments(tmp_path / "file", "--force"))
    assert (database / "thesis.tex").exists()
    assert (other / "manifest.json").exists()


# explain


def read_results(out):
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
        assert row["path"] == f"pictures/{row['neighbour_id']}"
        assert row["neighbour_path"] == os.fspath(here / row["path"])
        assert row["label"] == row["path"].split("/")[1]
        assert float(row["distance"]) == pytest.approx(0, abs=1e-5)

    maps = np.load(out / "maps.npy", mmap_mode="r")
    assert (maps.shape, maps.dtype) == ((7, 32, 32), np.float32)
    assert maps.min() >= 0
    assert maps.max() <= 1
    for row in rows[:-1]:
        assert int(row["flat"]) == (maps[int(row["map"])].max() == 0)
        with Image.open(out / row["overlay"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (32, 32))

    page = (out / "index.html").read_text()
    assert page.count("<img ") == 7 * 3
    assert "Pictures that could not be read" in page


def test_explain_equals_the_library(here, capsys, tmp_path):
    import gcfast
    from gcfast.images import ImageLoader, Preprocessing

    sys.path.insert(0, os.fspath(here))
    try:
        import cli_net
    finally:
        sys.path.remove(os.fspath(here))
    run(capsys, "explain", "--database", "db", *SETTINGS, "--out", tmp_path, "pictures/green")
    explainer = gcfast.load("db", cli_net.build())
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
        assert len({row[f"neighbour_row{s}"] for s in ("", "_2", "_3")}) == 3
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article") == 2
    assert "Shown are the first 2 of 6" in page


def test_explain_finds_pictures_that_moved_or_does_without(here, capsys, tmp_path):
    pictures = tmp_path / "moved"
    os.rename(here / "pictures", pictures)
    try:
        one = pictures / "red" / "0.png"
        base = ("explain", "--database", "db", *SETTINGS, one, "--out")
        assert run(capsys, *base, tmp_path / "a")[0] == 0
        assert read_results(tmp_path / "a")[0]["neighbour_path"] == ""
        assert "picture not found" in (tmp_path / "a" / "index.html").read_text()
        assert run(capsys, *base, tmp_path / "b", "--images", pictures)[0] == 0
        assert read_results(tmp_path / "b")[0]["neighbour_path"] == os.fspath(one)
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
    assert row["distance_19"] == row["neighbour_id_20"] == ""


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


# info, demo, the process


@pytest.mark.usefixtures("here")
def test_info(capsys):
    status, out, err = run(capsys, "info", "db")
    assert (status, err) == (0, "")
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert facts["rows"] == "18"
    assert facts["layer"] == "features"
    assert facts["settings.evidence"] == "for"
    assert facts["preprocessing.size"] == "32"
    assert "there is no database at pictures" in fails(capsys, "info", "pictures")


def test_demo_is_called(capsys, monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("gcfast.demo.run")
    module.run_demo = lambda **settings: calls.append(settings) or 0
    monkeypatch.setitem(sys.modules, "gcfast.demo.run", module)
    assert run(capsys, "demo", "--out", tmp_path)[0] == 0
    assert calls == [{"out_dir": tmp_path, "seed": 0, "progress": False}]


def test_control_c(capsys, monkeypatch):
    def stop(**_):
        raise KeyboardInterrupt

    module = types.ModuleType("gcfast.demo.run")
    module.run_demo = stop
    monkeypatch.setitem(sys.modules, "gcfast.demo.run", module)
    assert run(capsys, "demo") == (130, "", "gcfast: stopped\n")


def test_wrong_arguments_and_help(capsys):
    for arguments in ([], ["build"], ["explain", "--k"], ["build", "--triplets", "some"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    for command in ("build", "explain", "info", "demo"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
    assert "default: None" not in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "gcfast", "info", "nowhere"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "gcfast: there is no database at nowhere: it is not a folder\n"
