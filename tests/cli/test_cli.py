"""The command line, end to end on small pictures and a small network: build, info, demo."""

import json
import os
import subprocess
import sys

import pytest
from cli_case import SETTINGS, VIEW, fails, run

from gcfast.cli import main


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
        "--interpolation", "bicubic", "--crop-pct", "0.9", "--depth", "12",
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
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "depth": 12,
        "transform": None,
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
def test_class_proxies(capsys, tmp_path):
    status, out, err = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", "--method", "proxy",
        *SETTINGS, "--size", "32",
    )  # fmt: skip
    assert status == 0, err
    assert "3 classes, layer features" in out
    status, out, _ = run(capsys, "info", tmp_path / "db")
    assert "class proxies                3\n" in out
    assert "channels kept" not in out
    assert "settings.method              proxy\n" in out
    assert "settings.triplets" not in out
    status, out, err = run(capsys, "explain", "pictures/green", "--database", tmp_path / "db",
                           "--out", tmp_path / "page", *SETTINGS)  # fmt: skip
    assert status == 0, err
    page = (tmp_path / "page" / "index.html").read_text()
    assert "class in the database lent the weights of its channels" in page
    assert "class has and the other classes have not" in page
    assert "`--channels` must be left out with method='proxy'" in fails(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "new", "--method", "proxy",
        *SETTINGS, *VIEW,
    )  # fmt: skip
    assert "`--center` must be left out with method='proxy'" in fails(
        capsys, "explain", "pictures/green", "--database", tmp_path / "db", "--out",
        tmp_path / "centered", "--center", "1", *SETTINGS,
    )  # fmt: skip


@pytest.mark.usefixtures("here")
def test_elementwise(capsys, tmp_path):
    status, out, err = run(
        capsys, "build", "--images", "pictures", "--out", tmp_path / "db", "--method",
        "elementwise", *SETTINGS, "--size", "32",
    )  # fmt: skip
    assert status == 0, err
    assert "3 classes, layer features" in out
    _, out, _ = run(capsys, "info", tmp_path / "db")
    assert "settings.method              elementwise\n" in out
    assert "channels kept" not in out
    status, out, err = run(capsys, "explain", "pictures/green", "--database", tmp_path / "db",
                           "--out", tmp_path / "page", *SETTINGS)  # fmt: skip
    assert status == 0, err
    page = (tmp_path / "page" / "index.html").read_text()
    assert "lent the direction in which its embedding should move. Heat is on what brings" in page


@pytest.mark.usefixtures("here")
def test_build_errors(capsys, tmp_path):
    def build(*more, images="pictures", out="new"):
        return fails(
            capsys, "build", "--images", images, "--out", tmp_path / out, *SETTINGS, *VIEW, *more
        )

    (tmp_path / "empty").mkdir()
    assert "must hold pictures in a folder for each class" in build(images=tmp_path / "empty")
    assert "`--images` must be a folder of pictures" in build(images="nowhere")
    assert "`--model` must be package.module" in build("--model", "resnet50")
    assert "cannot read" in build("--strict")
    assert "red/broken.png" in build("--strict")
    assert "`--margin` must be left out with" in build("--margin", "1", "--objective", "positive")
    assert "features.3" in build("--layer", "features.9")
    assert "must be package.module:function" in build("--model", "resnet50")
    assert "has no bild (but build" in build("--model", "cli_net:bild")
    assert '`--device` must be "cpu"' in build("--device", "toaster")
    assert "`--size` must be at least 1" in build("--size", "0")
    assert "`--weights` must be a file" in build("--weights", "none.pth")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("here")
def test_databases_are_replaced_only_by_force_and_nothing_else_ever(capsys, tmp_path):
    def arguments(out, *more):
        return ("build", "--images", "pictures", "--out", out, *SETTINGS, *VIEW, *more)

    database = tmp_path / "db"
    assert run(capsys, *arguments(database))[0] == 0
    assert "; --force replaces it" in fails(capsys, *arguments(database))
    assert run(capsys, *arguments(database, "--force"))[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["db"]

    (database / "thesis.tex").write_text("years of work")
    assert "also holds thesis.tex" in fails(capsys, *arguments(database, "--force"))
    other = tmp_path / "website"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web page"}')
    assert "not a gcfast database" in fails(capsys, *arguments(other, "--force"))
    (tmp_path / "file").write_text("text")
    assert "not a gcfast database" in fails(capsys, *arguments(tmp_path / "file", "--force"))
    assert (database / "thesis.tex").exists()
    assert (other / "manifest.json").exists()


@pytest.mark.usefixtures("here")
def test_a_build_that_was_stopped_is_resumed(capsys, monkeypatch, tmp_path):
    from gcfast.builder import resumable
    from gcfast.database import shards

    monkeypatch.setattr(resumable, "COMMIT_ROWS", 6)
    monkeypatch.setattr(shards, "SHARD_ROWS", 8)

    def arguments(*more, out="db"):
        where = ("--images", "pictures", "--out", tmp_path / out, "--storage", "float16")
        return ("build", *where, *SETTINGS, *VIEW, "--batch-size", "4", *more)

    assert run(capsys, *arguments(out="wanted"))[0] == 0
    write = resumable.write_shard

    def stop(folder, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        return write(folder, number, *rest)

    monkeypatch.setattr(resumable, "write_shard", stop)
    status, _, err = run(capsys, *arguments())
    assert status == 130
    assert f"stopped; what was done is kept in {tmp_path / 'db'}: --resume" in err
    monkeypatch.setattr(resumable, "write_shard", write)
    assert "must not be an unfinished build, got" in fails(capsys, *arguments())
    assert "--resume continues it" in fails(capsys, *arguments())
    assert "seed was 0, is 1" in fails(capsys, *arguments("--resume", "--seed", "1"))
    status, out, _ = run(capsys, *arguments("--resume"))
    assert (status, out) == (0, f"{tmp_path / 'db'}: 18 rows, 3 classes, layer features\n")
    for file in (tmp_path / "wanted").iterdir():
        assert file.read_bytes() == (tmp_path / "db" / file.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["db", "wanted"]


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
    monkeypatch.setattr("gcfast.cli.demo.run_demo", lambda **settings: calls.append(settings))
    assert run(capsys, "demo", "--out", tmp_path)[0] == 0
    assert calls == [{"out_dir": tmp_path, "seed": 0, "progress": True}]


def test_control_c(capsys, monkeypatch):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gcfast.cli.demo.run_demo", stop)
    assert run(capsys, "demo") == (130, "", "gcfast: stopped\n")


def test_wrong_arguments_and_help(capsys):
    for arguments in (
        [],
        ["build"],
        ["explain", "--k"],
        ["index", "db"],
        ["build", "--triplets", "some"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    for command in ("build", "explain", "compress", "index", "info", "demo"):
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
