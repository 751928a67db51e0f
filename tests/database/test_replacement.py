"""A reader goes on with the database it opened, whatever takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import common, loader, pictures

import gcfast
from gcfast.database import shards
from gcfast.database.database import Database

pytest.importorskip("faiss")

ROWS, SHARD = 18, 6


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.nn.Module:
    """A network, and its database of three shards at tmp_path / "db"."""
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)
    one = gcfast.Explainer(common(), "backbone", channels=5, triplets=3)
    one.build(loader(*pictures(ROWS)), out=tmp_path / "db")
    return one.network.model


def replace_by_four_rows(writer: gcfast.Explainer, folder: Path, how: str) -> None:
    few = loader(pictures(ROWS)[0][:4], [0, 0, 1, 1])
    if how == "save":
        writer.build(few).save(folder, overwrite=True)
    else:
        writer.rebuild(few)
    assert len(Database.open(folder, verify=True)) == 4


@pytest.mark.parametrize("index", ["stored", "Flat", "exact"])
@pytest.mark.parametrize("how", ["save", "rebuild"])
def test_a_reader_of_a_database_that_was_replaced_by_a_smaller_one(
    tmp_path: Path, model: torch.nn.Module, index: str, how: str
) -> None:
    images, _ = pictures(ROWS)
    Database.open(tmp_path / "db").build_index("Flat")
    reader = gcfast.load(tmp_path / "db", model, index=index)
    wanted = reader.explain_batch(images, details=True)
    rows = Database.open(tmp_path / "db")
    writer = gcfast.load(tmp_path / "db", model)
    replace_by_four_rows(writer, tmp_path / "db", how)
    assert not (tmp_path / "db" / "rows-00001.safetensors").exists()
    got = reader.explain_batch(images, details=True)
    assert torch.equal(got.maps, wanted.maps)
    assert torch.equal(got.neighbors, wanted.neighbors)
    assert rows.embeddings.shape == (ROWS, 6)
    rows.save(tmp_path / "copy")
    assert len(Database.open(tmp_path / "copy", verify=True)) == ROWS


@pytest.mark.parametrize("shard", [SHARD, ROWS])
@pytest.mark.parametrize("index", ["Flat", "exact"])
@pytest.mark.parametrize("how", ["save", "rebuild"])
def test_a_reader_that_begins_while_what_it_opened_is_removed(
    tmp_path: Path,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    index: str,
    how: str,
    shard: int,
) -> None:
    """When its files still have their names, which the manifest no longer has."""
    images, _ = pictures(ROWS)
    monkeypatch.setattr(shards, "SHARD_ROWS", shard)
    Database.open(tmp_path / "db").save(tmp_path / "db", overwrite=True)
    reader, writer = (gcfast.load(tmp_path / "db", model, index=index) for _ in range(2))
    found, unlink = [], Path.unlink

    def late(path: Path, **options: bool) -> None:
        if path.name.startswith("rows-") and not found:
            found.append(reader.explain_batch(images))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", late)
    replace_by_four_rows(writer, tmp_path / "db", how)
    assert len(found) == 1
    assert torch.equal(reader.explain_batch(images), found[0])
