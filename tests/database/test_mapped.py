"""Files under an open database: one rule, in Python and in the transfer engine."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import common, loader, pictures

import gcfast
from gcfast import _core
from gcfast.database import files as durable
from gcfast.database import mapped, shards
from gcfast.database.database import Database
from gcfast.database.mapped import SourceFile, check_files

faiss = pytest.importorskip("faiss")

ROWS, SHARD = 18, 6


def by_python(files: list[SourceFile]) -> Callable[[], object]:
    return lambda: check_files(files)


def by_the_engine(files: list[SourceFile]) -> Callable[[], object]:
    """A search that finds the rows of all the files."""
    index = faiss.IndexFlatL2(2)
    rows = torch.eye(len(files), 2)
    index.add(rows.numpy())
    parts = []
    for number, f in enumerate(files):
        one = rows[number : number + 1]
        numbers = torch.zeros(1, 3, dtype=torch.int64)
        tensors = (one, numbers, torch.zeros(1, 3), torch.zeros(1), numbers[0, :1])
        described = [(f.path, f.device, f.inode, f.bytes)]
        parts.append((*(tensor.numpy() for tensor in tensors), described))
    engine = _core.TransferEngine(index, parts, dim=2, width=3, threads=1, memory_bytes=1 << 20)
    return lambda: engine.transfer(rows[:1].numpy(), k=len(files))


WAYS = {"python": by_python, "engine": by_the_engine}


def source(path: Path) -> SourceFile:
    now = path.stat()
    return SourceFile(str(path), now.st_dev, now.st_ino, now.st_size)


def _delete(folder: Path) -> None:
    (folder / "rows-00001.safetensors").unlink()


def _delete_all(folder: Path) -> None:
    shutil.rmtree(folder)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "rows-00001.safetensors", 99)


def _grow(folder: Path) -> None:
    os.truncate(folder / "rows-00001.safetensors", 101)


def _replace_file(folder: Path) -> None:
    file = folder / "rows-00001.safetensors"
    file.rename(folder / "old")
    file.write_bytes(b"short")


def _move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def _put_a_file(folder: Path) -> None:
    _move(folder)
    folder.write_text("no folder")


def _replace_with_fewer(folder: Path) -> None:
    _move(folder)
    folder.mkdir()
    (folder / "rows-00000.safetensors").write_bytes(bytes(3))
    (folder / "manifest.json").write_text('{"file": "rows-00000.safetensors"}')


def _rewrite_with_fewer(folder: Path) -> None:
    """As a synchronisation does: in the same folder."""
    _delete(folder)
    durable.replace(folder / "manifest.json", b'{"file": "rows-00000.safetensors"}')


def _delete_after_appending(folder: Path) -> None:
    _delete(folder)
    content = (folder / "manifest.json").read_bytes()
    durable.replace(folder / "manifest.json", content + b'{"file": "rows-00002.safetensors"}')


def _loop(folder: Path) -> None:
    file = folder / "rows-00001.safetensors"
    file.unlink()
    file.symlink_to(file.name)


DELETED = "the shard {} was deleted or moved away while the database was open"
TRUNCATED = (
    "the shard {} was truncated while the database was open: 100 bytes of it are in use, it has 99"
)
HARM: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "deleted": (_delete, DELETED),
    "the folder deleted": (_delete_all, DELETED),
    "deleted, rows appended": (_delete_after_appending, DELETED),
    "truncated": (_truncate, TRUNCATED),
    "a longer file": (_grow, None),
    "another file of its name": (_replace_file, None),
    "the folder renamed away": (_move, DELETED),
    "a file in the folder's place": (_put_a_file, DELETED),
    "a database of fewer shards": (_replace_with_fewer, None),
    "fewer shards in the same folder": (_rewrite_with_fewer, None),
    "not to be looked at": (
        _loop,
        "the shard {} cannot be looked at any more: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("way", WAYS)
def test_one_rule(tmp_path: Path, way: str, harm: str) -> None:
    folder = tmp_path / "a database"
    folder.mkdir()
    files = [folder / f"rows-0000{i}.safetensors" for i in range(2)]
    for file in files:
        file.write_bytes(bytes(100))
    (folder / "manifest.json").write_text(
        '[{"file": "rows-00000.safetensors"}, {"file": "rows-00001.safetensors"}]'
    )
    check = WAYS[way]([source(file) for file in files])
    check()
    change, said = HARM[harm]
    change(folder)
    if said is None:
        check()
        return
    with pytest.raises(gcfast.DamagedDatabaseError) as caught:
        check()
    harmed = 1 if files[0].exists() else 0
    assert str(caught.value) == said.format(files[harmed])


@pytest.mark.parametrize("way", WAYS)
def test_the_moment_in_which_a_rebuild_has_moved_the_old_one_away(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "db"
    folder.mkdir()
    file = folder / "rows-00000.safetensors"
    file.write_bytes(bytes(100))
    check = WAYS[way]([source(file)])
    _move(folder)
    new = tmp_path / "new"
    new.mkdir()
    (new / "manifest.json").write_text("{}")
    late = threading.Timer(mapped.MOVING_SECONDS, lambda: new.rename(folder))
    late.start()
    check()
    late.join()


def test_the_cost_does_not_grow_with_the_shards_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"rows-{i:05d}.safetensors" for i in range(50)]
    for file in files:
        file.write_bytes(bytes(10))
    sources = [source(file) for file in files]
    for file in files:
        file.unlink()
    (tmp_path / "manifest.json").write_text("{}")
    read, count = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: (count.append(path), read(path))[1])
    check_files(sources)
    assert len(count) == 1


# --- whole databases


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
    """When its files have, for a moment, the name of the place where they are removed."""
    images, _ = pictures(ROWS)
    monkeypatch.setattr(shards, "SHARD_ROWS", shard)
    Database.open(tmp_path / "db").save(tmp_path / "db", overwrite=True)
    reader, writer = (gcfast.load(tmp_path / "db", model, index=index) for _ in range(2))
    found, remove = [], durable.remove

    def late(folder: Path) -> None:
        if (folder / "rows-00000.safetensors").exists():
            found.append(reader.explain_batch(images))
        remove(folder)

    monkeypatch.setattr(durable, "remove", late)
    replace_by_four_rows(writer, tmp_path / "db", how)
    assert len(found) == 1
    assert torch.equal(reader.explain_batch(images), found[0])


@pytest.mark.parametrize("index", ["stored", "Flat"])
def test_a_shard_that_is_deleted(tmp_path: Path, model: torch.nn.Module, index: str) -> None:
    Database.open(tmp_path / "db").build_index("Flat")
    reader = gcfast.load(tmp_path / "db", model, index=index)
    images = pictures(ROWS)[0]
    reader.explain_batch(images)
    (tmp_path / "db" / "rows-00002.safetensors").unlink()
    words = "rows-00002.safetensors was deleted or moved away while the database was open"
    with pytest.raises(gcfast.DamagedDatabaseError, match=words):
        reader.explain_batch(images)
    with pytest.raises(gcfast.DamagedDatabaseError, match=words):
        _ = reader.database.shards
