"""Folders whose files fit their checksums, and not each other: refused in words when opened."""

import json
import os
import shutil

import pytest
import torch
from fuzz_database import resigned
from networks import common, loader, pictures
from safetensors.torch import load, save

import gcfast
from gcfast import Database, Explainer
from gcfast.cli import main
from gcfast.database import index
from gcfast.errors import DamagedDatabaseError

NAMES = ("robin", "wren", "tit")
METHODS = ("gradcam", "proxy", "elementwise")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A database by each method with named classes, and a compressed one."""
    folder, model = tmp_path_factory.mktemp("sound"), common()
    images, numbers = pictures(12)
    for method in METHODS:
        explainer = Explainer(
            model, "backbone", method=method, **({"channels": 5} if method == "gradcam" else {})
        )
        explainer.build(loader(images, [NAMES[i % 3] for i in numbers]), out=folder / method)
    gradients = Explainer(model, "backbone", channels=5, triplets=3)
    database = gradients.build(loader(images, numbers))
    for centers in (2, 3):
        database.compress(centers).save(folder / f"compressed {centers}")
    return folder, model, images


def copied(sound, tmp_path, name):
    return shutil.copytree(sound[0] / name, tmp_path / "db")


def file_of(folder, name):
    return next(folder.glob(f"{name}-*"))


def change(folder, **columns):
    """Exchange columns of the first shard for what functions make of them."""
    path = file_of(folder, "rows")
    held = load(path.read_bytes())
    held |= {name: make(held[name]).contiguous() for name, make in columns.items()}
    path.write_bytes(save(held))
    resigned(folder)


def change_manifest(folder, **entries):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refuses(folder, words, **options):
    with pytest.raises(DamagedDatabaseError, match=words):
        Database.open(folder, **options)


def at(place, value):
    def changed(column):
        column.view(-1)[place] = value
        return column

    return changed


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"channels": at(0, 99)}, "must have channels from 0 to 11, got 99"),
        ({"channels": at(3, -1)}, "must have channels from 0 to 11, got -1"),
        ({"labels": at(0, 3)}, "must have labels from 0 to 2, got 3"),
        (
            {"labels": lambda labels: labels.double() + 0.5},
            "have real numbers for labels, and classes",
        ),
        ({"id_ends": lambda ends: ends.flip(0)}, "must have ids that follow one another"),
        ({"id_ends": lambda ends: ends + 100}, "must have ids that follow one another"),
    ],
)
def test_numbers_that_cannot_be(sound, tmp_path, columns, words):
    folder = copied(sound, tmp_path, "gradcam")
    change(folder, **columns)
    refuses(folder, words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", METHODS)
def test_rows_of_another_method(sound, tmp_path, method, other):
    folder = copied(sound, tmp_path, method)
    stored = json.loads((sound[0] / other / "manifest.json").read_text())["settings"]
    change_manifest(folder, settings=stored)
    if method == other:
        images = sound[2][:2]
        assert gcfast.load(folder, sound[1]).explain_batch(images).shape == (2, 8, 8)
    elif other == "proxy":
        refuses(folder, "names no file of the classes")
    else:
        refuses(folder, f"not of method='{other}': their rows have")


def test_cotangents_of_another_width(sound, tmp_path):
    folder = copied(sound, tmp_path, "elementwise")
    change(folder, weights=lambda weights: weights[:, :3])
    refuses(folder, "their rows have 0 channels and 3 weights")


def test_members_of_other_rows(sound, tmp_path):
    folder, other = copied(sound, tmp_path, "compressed 3"), sound[0] / "compressed 2"
    shutil.copy(file_of(other, "members"), folder)
    members = json.loads((other / "manifest.json").read_text())["members"]
    change_manifest(folder, members=members)
    refuses(folder, "must be of its 3 rows, got members of 2")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, "lacks 'images'"),
        ({"images": 0}, "'images' must be positive"),
        ({"images": 12, "rows": "all"}, "'rows' must be a whole number, got 'all'"),
        ({"images": True}, "'images' must be a whole number, got True"),
    ],
)
def test_counts_that_cannot_be(sound, tmp_path, report, words):
    folder = copied(sound, tmp_path, "gradcam")
    change_manifest(folder, report=report)
    refuses(folder, words)


@pytest.mark.parametrize(("name", "kind"), [("gradcam", "index"), ("compressed 3", "members")])
def test_every_checksum_is_compared(sound, tmp_path, capsys, name, kind):
    folder = copied(sound, tmp_path, name)
    if kind == "index":
        pytest.importorskip("faiss")
        Database.open(folder).build_index("Flat")
    assert main(["info", os.fspath(folder), "--verify"]) == 0
    path = file_of(folder, kind)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Database.open(folder)
    refuses(folder, f"the {kind}.* is changed: its checksum differs", verify=True)
    capsys.readouterr()
    assert main(["info", os.fspath(folder), "--verify"]) == 2
    assert "its checksum differs" in capsys.readouterr().err


def test_an_index_that_is_exchanged_meanwhile(sound, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    folder = copied(sound, tmp_path, "gradcam")
    Database.open(folder).build_index("Flat")
    seen = index.verify_file

    def exchanged(*arguments):
        Database.open(folder).build_index("PCA4,Flat")  # whose file takes the place of the other
        seen(*arguments)

    monkeypatch.setattr(index, "verify_file", exchanged)
    assert len(Database.open(folder, verify=True)) == 12

    def dropped(*arguments):
        Database.open(folder).save(folder, overwrite=True)
        seen(*arguments)

    monkeypatch.setattr(index, "verify_file", dropped)
    assert len(Database.open(folder, verify=True)) == 12


def test_an_index_that_is_no_file(sound, tmp_path):
    pytest.importorskip("faiss")
    folder = copied(sound, tmp_path, "gradcam")
    database = Database.open(folder)
    database.build_index("Flat")
    path = file_of(folder, "index")
    path.unlink()
    for make in (os.mkfifo, os.mkdir):  # to open a pipe that nobody writes to never ends
        make(path)
        with pytest.raises(DamagedDatabaseError, match=r"index .* is not a regular file; gcfast"):
            database.read_index()
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(DamagedDatabaseError, match=r"index .* is missing; gcfast index"):
        database.read_index()
    assert torch.equal(database.labels, Database.open(folder).labels)
