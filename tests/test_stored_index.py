"""A FAISS index kept with the database: the same neighbours, never a stale one."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import common, loader, pictures

import gcfast
from gcfast import shards, stored_index
from gcfast.database import Database

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
    assert opened.index_path == tmp_path / "other" / "index.faiss"
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
    before = database.index_path.read_bytes()
    database.build_index("HNSW8")
    assert database.index_path.read_bytes() != before
    database.save(tmp_path / "copy")
    copy = Database.open(tmp_path / "copy")
    assert copy.index_path is None
    one.build(loader(*pictures(12)), out=tmp_path / "db", overwrite=True)
    assert not (tmp_path / "db" / "index.faiss").exists()


def test_a_stale_one_is_refused(tmp_path: Path, one: gcfast.Explainer) -> None:
    one.database.build_index("Flat")
    one.append(loader(*pictures(6)))
    words = "was made of 40 rows and the database has 46: gcfast index, or .* makes it anew"
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
        with pytest.raises(gcfast.DamagedDatabaseError, match=words + ".* makes it anew"):
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
