"""A FAISS index kept with the database: the same neighbours, never a stale one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import was_killed
from kill_builds import Countdown
from networks import common, loader, pictures

import gcfast
from gcfast.database import index as stored_index
from gcfast.database import shards
from gcfast.database.database import Database

faiss = pytest.importorskip("faiss")


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gcfast.Explainer:
    """An explainer with a database of 40 rows in four shards at tmp_path / "db"."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 12)
    explainer = gcfast.Explainer(common(), "backbone", channels=5)
    explainer.build(loader(*pictures(40)), out=tmp_path / "db")
    return explainer


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat", "PCA4,Flat"])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_it_is_the_index_of_the_rows(
    tmp_path: Path, one: gcfast.Explainer, factory: str, storage: str
) -> None:
    one.database.save(tmp_path / "other", storage=storage)
    database = Database.open(tmp_path / "other")
    database.build_index(factory)
    opened = Database.open(tmp_path / "other")
    assert opened.manifest == database.manifest
    assert opened.manifest["index"]["factory"] == factory
    assert opened.index_path == tmp_path / "other" / opened.manifest["index"]["file"]
    index = opened.read_index()
    rows = opened.embeddings.float().numpy()
    wanted = faiss.index_factory(6, factory)
    wanted.train(rows)
    wanted.add(rows)
    assert index.ntotal == 40
    assert (index.search(rows, 3)[1] == wanted.search(rows, 3)[1]).all()


def test_an_explainer_searches_through_it(tmp_path: Path, one: gcfast.Explainer) -> None:
    model, images = one.network.model, pictures(5)[0]
    with pytest.raises(
        gcfast.NoDatabaseError, match=r"there is no index with the database .*db: gc"
    ):
        gcfast.load(tmp_path / "db", model, index="stored").explain_batch(images)
    one.database.build_index("HNSW16")
    stored = gcfast.load(tmp_path / "db", model, index="stored")
    assert torch.equal(stored.explain_batch(images), one.explain_batch(images))


def test_it_is_replaced_and_not_copied(tmp_path: Path, one: gcfast.Explainer) -> None:
    database = one.database
    database.build_index("Flat")
    before = database.index_path
    database.build_index("HNSW8")
    assert database.index_path != before
    assert not before.exists()
    after = {p.name: p.read_bytes() for p in (tmp_path / "db").iterdir()}
    database.build_index("HNSW8")
    assert {p.name: p.read_bytes() for p in (tmp_path / "db").iterdir()} == after
    database.save(tmp_path / "copy")
    copy = Database.open(tmp_path / "copy")
    assert copy.index_path is None
    one.build(loader(*pictures(12)), out=tmp_path / "db", overwrite=True)
    assert not list((tmp_path / "db").glob("index*"))


def test_a_stale_one_is_refused(tmp_path: Path, one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    one.append(loader(*pictures(6)))
    words = "was made of 40 rows and the database has 46: gcfast index, or .* makes it again"
    with pytest.raises(gcfast.GcfastError, match=words):
        one.database.read_index()
    with pytest.raises(gcfast.GcfastError, match=words):
        gcfast.load(tmp_path / "db", one.network.model, index="stored").explain_batch(
            pictures(1)[0]
        )
    one.database.build_index("Flat")
    assert one.database.read_index().ntotal == 46


def test_an_unsaved_calibration_outlasts_indexing(tmp_path: Path, one: gcfast.Explainer) -> None:
    images, labels = pictures(52)
    one.calibrate(loader(images[40:], labels[40:]))
    kept = one.database.manifest["calibration"]
    one.database.build_index("Flat")
    assert one.database.manifest["calibration"] == kept
    assert one.explain_batch(images[:2], details=True).confidence is not None
    # Not the index's business to store.
    assert "calibration" not in Database.open(tmp_path / "db").manifest


def test_damage(one: gcfast.Explainer) -> None:
    database = one.database
    database.build_index("Flat")
    file = database.index_path
    content = bytearray(file.read_bytes())

    def refused(words: str, *, verify: bool = True) -> None:
        with pytest.raises(gcfast.DamagedDatabaseError, match=words + ".* makes it again"):
            Database.open(database.path, verify=verify).read_index()

    file.write_bytes(content[:-1])
    refused(rf"is truncated or changed: {len(content)} bytes were written, it has")
    changed = content.copy()
    changed[-1] ^= 1
    file.write_bytes(changed)
    refused("checksum differs")
    assert Database.open(database.path, verify=False).read_index().ntotal == 40
    changed[:4] = b"none"
    file.write_bytes(changed)
    refused("cannot be read", verify=False)
    file.unlink()
    refused("is missing")
    file.write_bytes(content)
    assert database.read_index().ntotal == 40


def test_what_is_refused(tmp_path: Path, one: gcfast.Explainer, monkeypatch: Any) -> None:
    database = one.database
    with pytest.raises(ValueError, match="`factory` must be a FAISS factory string, got 'IFV4'"):
        database.build_index("IFV4")
    with pytest.raises(TypeError, match="`factory` must be a FAISS factory string, got 4"):
        database.build_index(4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be trainable on the database's 40 rows, got 'IVF5"):
        database.build_index("IVF50,Flat")
    memory = gcfast.Explainer(one.network.model, "backbone", channels=5).build(loader(*pictures(9)))
    with pytest.raises(gcfast.NoDatabaseError, match="no folder to store an index in: save"):
        memory.build_index("Flat")
    with pytest.raises(gcfast.NoDatabaseError, match="no index with the database in memory"):
        memory.read_index()
    stale = Database.open(tmp_path / "db")
    one.append(loader(*pictures(6)))
    with pytest.raises(gcfast.GcfastError, match="has changed since it was opened"):
        stale.build_index("Flat")
    assert "index" not in json.loads((tmp_path / "db" / "manifest.json").read_text())
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(gcfast.MissingExtraError, match="`factory` needs FAISS"):
        one.database.build_index("Flat")


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_disk_that_fails(
    tmp_path: Path, one: gcfast.Explainer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    database = one.database
    before = {p.name: p.read_bytes() for p in (tmp_path / "db").iterdir()}

    def failing(*_: Any) -> None:
        if call == "write":
            raise RuntimeError("write error: No space left on device")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(faiss, "write_index", failing)
        else:
            patch.setattr(os, call, failing)
        with pytest.raises(OSError, match=r"cannot write the index of .*db: .*No space left"):
            database.build_index("Flat")
    assert {p.name: p.read_bytes() for p in (tmp_path / "db").iterdir()} == before


def test_it_is_trained_on_a_sample(one: gcfast.Explainer, monkeypatch: Any) -> None:
    monkeypatch.setattr(stored_index, "TRAINING_ROWS", 15)
    seen: list[int] = []
    real = faiss.IndexIVFFlat.train
    monkeypatch.setattr(
        faiss.IndexIVFFlat, "train", lambda self, x: (seen.append(len(x)), real(self, x))[1]
    )
    one.database.build_index("IVF4,Flat")
    assert seen == [15]


# --- made anew under its readers


def test_an_index_of_its_former_name_opens_and_gives_way(
    tmp_path: Path, one: gcfast.Explainer
) -> None:
    one.database.build_index("Flat")
    folder = tmp_path / "db"
    manifest = json.loads((folder / "manifest.json").read_text())
    one.database.index_path.rename(folder / "index.faiss")
    manifest["index"]["file"] = "index.faiss"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    former = Database.open(folder)
    assert former.index_path == folder / "index.faiss"
    assert former.read_index().ntotal == 40
    former.build_index("HNSW8")
    assert not (folder / "index.faiss").exists()
    assert Database.open(folder).read_index().hnsw.efSearch
    former.save(folder, overwrite=True)  # all of it is a database's
    assert Database.open(folder).index_path is None


def test_an_index_that_was_made_anew_is_taken(one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    reader, writer = Database.open(one.database.path), Database.open(one.database.path)
    held = reader.read_index()
    writer.build_index("HNSW8")
    assert isinstance(reader.read_index(), faiss.IndexHNSWFlat)
    assert reader.index_path == writer.index_path
    assert reader.manifest == writer.manifest
    assert (held.search(reader.embeddings.numpy(), 1)[1][:, 0] == range(40)).all()


def test_an_index_that_is_made_anew_while_it_is_read(
    one: gcfast.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.database.build_index("Flat")
    reader, writer = Database.open(one.database.path), Database.open(one.database.path)
    real = faiss.read_index

    def late(source: Any) -> Any:
        monkeypatch.setattr(faiss, "read_index", real)
        writer.build_index("HNSW8")
        return real(source)

    monkeypatch.setattr(faiss, "read_index", late)
    assert isinstance(reader.read_index(), faiss.IndexFlatL2)  # it had the file
    assert isinstance(reader.read_index(), faiss.IndexHNSWFlat)


FULL = """
import resource, sys
from gcfast.database.database import Database
database = Database.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    database.build_index("HNSW64")
except OSError as error:
    print("OSError:", error)
"""


def test_an_index_that_the_system_cuts_off(tmp_path: Path, one: gcfast.Explainer) -> None:
    """FAISS itself would not tell: what it has buffered is written when it closes the file."""
    one.database.build_index("HNSW64")
    size = one.database.manifest["index"]["bytes"]
    folder = tmp_path / "other"
    one.database.save(folder)
    manifest = (folder / "manifest.json").stat().st_size
    assert manifest + 500 < size
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for limit in (size - 1, manifest):
        run = [sys.executable, "-c", FULL, str(folder), str(limit)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert f"cannot write the index of {folder}: File too large" in done.stdout
        assert done.stderr == ""
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_index_of_further_rows_is_not_taken(one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    reader = Database.open(one.database.path)
    one.append(loader(*pictures(6)))
    assert reader.read_index().ntotal == 40  # the old one stays until there is a new one
    one.database.build_index("Flat")
    with pytest.raises(gcfast.GcfastError, match="has changed since it was opened: open it again"):
        reader.read_index()
    assert one.database.read_index().ntotal == 46


def test_an_index_that_was_left_behind_is_no_damage(one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    reader = Database.open(one.database.path)
    Database.open(one.database.path).save(one.database.path, overwrite=True)
    with pytest.raises(gcfast.NoDatabaseError, match="there is no index with the database"):
        reader.read_index()


def test_readers_find_an_index_at_any_moment(
    one: gcfast.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash between any two steps would leave, and what a reader finds."""
    one.database.build_index("Flat")
    folder, found, held = one.database.path, [], []
    opened = Database.open(folder)

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            out = function(*arguments, **options)
            found.append(type(Database.open(folder).read_index()).__name__)
            held.append(type(opened.read_index()).__name__)
            return out

        return call

    for name in ("rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(faiss, "write_index", watched(faiss.write_index))
    one.database.build_index("HNSW8")
    assert len(found) > 6
    for kinds in (found, held):
        changes = kinds.index("IndexHNSWFlat")
        assert set(kinds[:changes]) == {"IndexFlatL2"}
        assert set(kinds[changes:]) == {"IndexHNSWFlat"}
    assert held.index("IndexHNSWFlat") > found.index("IndexHNSWFlat")  # while it could be read


def test_killed_at_any_step_it_leaves_one_of_the_two(
    one: gcfast.Explainer,
) -> None:
    one.database.build_index("Flat")
    folder, manifest = one.database.path, one.database.manifest
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    index = stored_index.made("HNSW8", one.database.shards)
    kinds, leftovers, point = [], 0, 0

    def store() -> None:
        countdown = Countdown(point)
        for name in ("fsync", "rename", "unlink"):
            setattr(os, name, countdown.around(getattr(os, name)))
        faiss.write_index = countdown.around(faiss.write_index)
        stored_index.store(index, "HNSW8", folder, manifest)

    killed = True
    while killed:
        point += 1
        killed = was_killed(store)
        opened = Database.open(folder, verify=True)
        kinds.append(type(opened.read_index()).__name__)
        leftovers += len(list(folder.iterdir())) > len(before)
        # The next one to write removes what is left, whatever it writes.
        if point % 2:
            opened.build_index("Flat")
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        else:
            opened.build_index("HNSW4")
            assert len(list(folder.iterdir())) == len(before)
    assert point > 12
    assert leftovers > 5
    assert kinds[0] == "IndexFlatL2"
    assert kinds[-1] == "IndexHNSWFlat"


def test_appending_removes_what_a_killed_run_left(tmp_path: Path, one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    left = ["index.faiss.new", f"index-{'0' * 16}.faiss", "rows-00009.safetensors",
            "manifest.json.new"]  # fmt: skip
    for name in left:
        (tmp_path / "db" / name).write_bytes(b"part")
    (tmp_path / "db" / "notes.txt").write_text("mine")
    one.append(loader(*pictures(6)))
    names = {p.name for p in (tmp_path / "db").iterdir()}
    assert not names & set(left)
    assert "notes.txt" in names
    assert one.database.manifest["index"]["file"] in names
    assert len(Database.open(tmp_path / "db", verify=True)) == 46
