"""`gcfast append`, `calibrate`, `layers` and what the command line says of its arguments."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from cli_case import SETTINGS, VIEW, fails, picture, run

import gcfast
from gcfast.cli import main

# The pictures of `here` are 48 x 40; these are others of the same kinds.


def further(root, each=6, kinds=("red", "green", "blue"), first=0):
    for kind in kinds:
        (root / kind).mkdir(parents=True)
        for i in range(each):
            picture(kind, first + i).transpose(0).save(root / kind / f"more{i}.png")
    return root


@pytest.fixture
def database(here, capsys, tmp_path):
    built = tmp_path / "db"
    assert run(capsys, "build", "--images", "pictures", "--out", built, *SETTINGS, *VIEW)[0] == 0
    assert here
    return built


def test_append(here, database, capsys, tmp_path):
    more = further(tmp_path / "more", each=2)
    (more / "red" / "bad.png").write_bytes(b"no picture")
    (more / "owl").mkdir()
    base = ("append", "--database", database, "--images", more, *SETTINGS)
    status, out, err = run(capsys, *base)
    assert (status, out) == (0, f"{database}: 6 rows more, 24 in all\n")
    assert "unreadable pictures, skipped: 1\n" in err
    assert "class folders without pictures: 1 (owl)\n" in err
    opened = gcfast.Database.open(database)
    # Outside the database's folder of pictures: named in full, so that they are found.
    assert opened.ids[18] == (more / "blue" / "more0.png").as_posix()
    assert opened.label_name(opened.labels[18].item()) == "blue"
    assert "must hold pictures that are not in the database, 6 are: " in fails(capsys, *base)
    status, _, _ = run(
        capsys, "explain", "--database", database, *SETTINGS, "--out", tmp_path / "out",
        more / "blue" / "more0.png",
    )  # fmt: skip
    assert status == 0
    assert os.fspath(more / "blue" / "more0.png") in (tmp_path / "out" / "results.csv").read_text()
    # Within it, they are named as the others are.
    further(here / "pictures" / "red" / "deep", each=1)
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\nred/deep/red/more0.png,red\n")
    status, _, _ = run(capsys, "append", "--database", database, "--images", "pictures",
                       "--labels", labels, *SETTINGS)  # fmt: skip
    assert status == 0
    assert gcfast.Database.open(database).ids[24] == "red/deep/red/more0.png"
    shutil.rmtree(here / "pictures" / "red" / "deep")


def test_calibrate_is_kept(database, capsys, tmp_path):
    held_out = further(tmp_path / "held", each=5, first=1)
    further(tmp_path / "held" / "owl", each=1, kinds=("red",))
    status, out, err = run(
        capsys, "calibrate", "--database", database, "--images", held_out, *SETTINGS
    )
    assert status == 0
    assert "fidelity at distance" in out
    assert out.endswith(f"{database}: calibrated on 15 pictures\n")
    assert "pictures of classes that the database does not know: 1\n" in err
    assert gcfast.Database.open(database).manifest["calibration"]
    status, out, err = run(
        capsys, "append", "--database", database, "--images", further(tmp_path / "x", 1), *SETTINGS
    )
    assert status == 0
    assert "warning: the database's calibration was of the rows before these" in err
    assert "calibration" not in gcfast.Database.open(database).manifest


@pytest.mark.usefixtures("here")
def test_layers(capsys):
    import cli_net

    status, out, err = run(capsys, "layers", "cli_net:build", "--size", "32", "48")
    assert (status, err) == (0, "")
    image = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert out == f"{gcfast.layers(cli_net.build(), image)}\n"
    assert "* features" in out
    assert "`--size` must be at least 1" in fails(capsys, "layers", "cli_net:build", "--size", "0")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"gcfast {gcfast.__version__}\n"


@pytest.mark.usefixtures("here")
def test_classes_without_rows_are_not_counted(capsys, tmp_path):
    pictures = further(tmp_path / "in", each=3)
    further(pictures / "owl", each=1, kinds=("red",))
    status, out, err = run(
        capsys, "build", "--images", pictures, "--out", tmp_path / "db", *SETTINGS, *VIEW
    )
    assert (status, out) == (0, f"{tmp_path / 'db'}: 9 rows, 3 of 4 classes, layer features\n")
    assert "pictures left out, the only picture of their class: 1\n" in err


def test_sixteen_bit_pictures_are_told(here, capsys, tmp_path):
    from PIL import Image

    for kind in ("a", "b"):
        (tmp_path / "in" / kind).mkdir(parents=True)
        for i in range(3):
            values = np.random.default_rng(i).integers(0, 4000, (40, 40)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "in" / kind / f"{i}.png")
    base = ("build", "--images", tmp_path / "in", *SETTINGS, *VIEW, "--out")
    status, _, err = run(capsys, *base, tmp_path / "db")
    assert status == 0
    assert "read as 12-bit since no value is higher (build --depth says otherwise): 6 pic" in err
    status, _, err = run(capsys, *base, tmp_path / "db2", "--depth", "12")
    assert status == 0
    assert "12-bit" not in err
    _, out, _ = run(capsys, "info", tmp_path / "db2", "--json")
    assert json.loads(out)["manifest"]["preprocessing"]["depth"] == 12
    assert here


def test_faiss_warns_in_one_line(here, capfd, tmp_path):
    pytest.importorskip("faiss")
    shutil.copytree(here / "db", tmp_path / "db")
    assert main(["index", os.fspath(tmp_path / "db"), "--factory", "IVF4,Flat"]) == 0
    assert capfd.readouterr().err == (
        "warning: few rows for 4 centers: 18, FAISS advises 156 or more\n"
    )
