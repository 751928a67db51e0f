"""Further rows: as a build of all images would make them, and the stored rows as they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import no_gpu, was_killed
from kill_builds import Countdown
from networks import common, loader, other, pictures

import gcfast
from gcfast.builder import append as append_module
from gcfast.builder import resumable, spool
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.shards import FIELDS

HEADS = {"closed form": common, "autograd": other}
BOTH = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
STORED, ALL = 10, 17


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


def explainer(make: Any = common, **settings: Any) -> gcfast.Explainer:
    settings.setdefault("channels", 5)
    settings.setdefault("triplets", 3)
    return gcfast.Explainer(make(), "backbone", **settings)


def halves(names: tuple[str, ...] = ("robin", "wren", "tit")) -> tuple[list[Any], list[Any]]:
    images, labels = pictures(ALL)
    given = [names[i] for i in labels]
    return (
        loader(images[:STORED], given[:STORED], 5),
        loader(images[STORED:], given[STORED:], 5),
    )


def same_rows(one: Database, start: int, stop: int, two: Database, *but: str) -> None:
    for field in FIELDS:
        if field not in but:
            a, b = getattr(one, field)[start:stop], getattr(two, field)[start:stop]
            assert torch.equal(a, b), field


@pytest.mark.parametrize("triplets", [3, "all"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@BOTH
def test_new_rows_draw_from_all_embeddings(make: Any, method: str, triplets: Any) -> None:
    first, second = halves()
    one = explainer(make, method=method, triplets=triplets)
    stored = one.build(first)
    together = one.append(second)
    assert one.database is together
    assert (len(stored), len(together)) == (STORED, ALL)
    same_rows(together, 0, STORED, stored)
    whole = gcfast.Explainer(
        one.network.model, "backbone", channels=5, method=method, triplets=triplets
    ).build(first + second)
    # Rows are numbered through, so that the new ones draw what they would draw in one build. Their
    # weights are computed in other batches, and the offsets with the stored mean activation.
    same_rows(together, STORED, ALL, whole, "weights", "offsets", "embeddings")
    new = slice(STORED, ALL)
    torch.testing.assert_close(together.weights[new], whole.weights[new], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(together.embeddings[new], whole.embeddings[new])
    torch.testing.assert_close(
        together.offsets,
        (together.weights * stored.mean_activation[together.channels]).sum(1),
    )
    assert torch.equal(together.mean_activation, stored.mean_activation)
    assert together.manifest["older_rows"] == STORED
    assert together.ids == whole.ids
    assert together.report == whole.report


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_in_a_folder(tmp_path: Path, storage: str) -> None:
    first, second = halves()
    one = explainer()
    stored = one.build(first, out=tmp_path / "db", storage=storage)
    before = {p.name: p.read_bytes() for p in (tmp_path / "db").glob("rows-*")}
    reader = Database.open(tmp_path / "db")
    together = one.append(iter(second))
    assert together.path == tmp_path / "db"
    assert len(list((tmp_path / "db").iterdir())) == 6  # three shards, two, and the manifest
    for name, content in before.items():
        assert (tmp_path / "db" / name).read_bytes() == content
    assert together.weight_scale == stored.weight_scale
    assert together.storage == storage
    assert len(reader) == STORED
    same_rows(reader, 0, STORED, together)
    # And once more, from a database opened anew.
    loaded = gcfast.load(tmp_path / "db", one.network.model)
    images, _ = pictures(4)
    thrice = loaded.append([(images, ["robin", "robin", "crow", "crow"])])
    assert len(thrice) == ALL + 4
    assert thrice.class_names == ["robin", "wren", "tit", "crow"]
    assert thrice.labels[ALL:].tolist() == [0, 0, 3, 3]
    assert thrice.ids[-1] == str(ALL + 3)
    assert thrice.manifest["older_rows"] == ALL
    assert loaded.explain_batch(images, details=True).neighbors[:, 0].tolist() == [17, 18, 19, 20]


def test_labels_seen_once_are_counted_among_all() -> None:
    images, _ = pictures(9)
    one = explainer()
    one.build([(images[:5], [1, 1, 2, 2, 7])])
    together = one.append([(images[5:], [1, 7, 8, 9])])
    # Label 7 had no row to be a positive; label 1 has two.
    assert together.labels.tolist() == [1, 1, 2, 2, 1]
    assert together.report["images"] == 9
    assert together.report["skipped_single"] == 4
    with pytest.raises(ValueError, match="got none: 1 of 1 labels were seen once"):
        one.append([(images[:1], [50])])
    with pytest.raises(TypeError, match="got both: 'robin' after int labels"):
        one.append([(images[:1], ["robin"])])
    assert one.database is together


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("kept", ["in a folder", "in memory"])
@pytest.mark.parametrize("spooled", [False, True])
def test_all_embeddings_are_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spooled: bool, kept: str, storage: str
) -> None:
    first, second = halves()
    one = explainer()
    stored = one.build(
        first, storage=storage, out=tmp_path / "db" if kept == "in a folder" else None
    )
    tables, real = [], append_module.one_table

    def watched(parts: Any) -> Any:
        tables.append((parts, real(parts)))
        return tables[-1][1]

    monkeypatch.setattr(append_module, "one_table", watched)
    if spooled:
        monkeypatch.setattr(spool, "SPOOL_MEMORY_BYTES", 0)
        monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path))
    together = one.append(second)
    assert not stored._columns
    ((parts, table),) = tables
    assert torch.equal(table[:STORED], stored.embeddings.float())
    torch.testing.assert_close(table, together.embeddings.float(), rtol=1e-3, atol=1e-6)
    # Nothing else than this table was made of the stored ones, and nothing kept of it.
    pairs = zip(parts[:-1], stored.shards, strict=True)
    assert all(part.data_ptr() == shard.embeddings.data_ptr() for part, shard in pairs)
    size = (ALL - STORED) * 6 * (4 if storage == "float32" else 2)
    if kept == "in memory":
        assert together.shards[-1].embeddings.untyped_storage().nbytes() == size
    assert [p.name for p in tmp_path.iterdir()] == (["db"] if kept == "in a folder" else [])


def test_rebuild_renews_all(tmp_path: Path) -> None:
    first, second = halves()
    one = explainer()
    one.build(first, out=tmp_path / "db", preprocessing={"size": 8}, storage="float16")
    one.append(second)
    renewed = one.rebuild(first + second)
    assert one.database is renewed
    assert renewed.path == tmp_path / "db"
    assert renewed.storage == "float16"
    assert renewed.manifest["preprocessing"] == {"size": 8}
    assert "older_rows" not in renewed.manifest
    whole = gcfast.Explainer(one.network.model, "backbone", channels=5, triplets=3).build(
        first + second, storage="float16"
    )
    same_rows(renewed, 0, ALL, whole)
    memory = explainer()
    memory.build(first)
    assert memory.rebuild(first + second).path is None


def test_a_rebuild_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "COMMIT_ROWS", 4)
    first, second = halves()
    one = explainer()
    one.build(first, out=tmp_path / "db")

    def broken() -> Iterator[Any]:
        yield from first
        raise KeyboardInterrupt

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return broken()

    with pytest.raises(KeyboardInterrupt):
        one.rebuild(Loader())
    with pytest.raises(FileExistsError, match="resume=True continues it"):
        one.rebuild(first + second)
    assert len(Database.open(tmp_path / "db")) == STORED
    passed: list[int] = []
    one.network.model.register_forward_hook(lambda _, x, __: passed.append(len(x[0])))
    assert len(one.rebuild(first + second, resume=True)) == ALL
    assert sum(passed) < ALL


@no_gpu
def test_a_rebuild_killed_at_any_step_of_its_end_leaves_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment one of the two, and the next rebuild finds nothing in its way."""
    monkeypatch.setattr(shards, "SHARD_ROWS", ALL)
    first, second = halves()
    one = explainer()
    one.build(first, out=tmp_path / "whole")
    point, found, killed = 0, [], True
    while killed:
        point += 1
        root = tmp_path / str(point)
        shutil.copytree(tmp_path / "whole", root / "db")

        def rebuild(point: int = point, root: Path = root) -> None:
            _kill_at(point)
            gcfast.load(root / "db", one.network.model).rebuild(first + second)

        killed = was_killed(rebuild)
        found.append(len(Database.open(root / "db", verify=True)))
        # As it stands where nothing of the new one is left to go on with.
        resumed = (root / "db" / "build.json").exists()
        again = gcfast.load(root / "db", one.network.model)
        assert len(again.rebuild(first + second, resume=resumed)) == ALL
        assert [p.name for p in root.iterdir()] == ["db"]
        manifest, rows = sorted(p.name for p in (root / "db").iterdir())
        assert manifest == "manifest.json"
        assert rows in ("rows-00001.safetensors", "rows-00002.safetensors")
    assert point > 12
    assert set(found) == {STORED, ALL}
    assert found == sorted(found)


def _kill_at(point: int) -> None:
    """Have this process end at a counted step of the end of a build."""
    countdown, commit = Countdown(point), resumable.commit

    def counting(folder: Path, manifest: dict[str, Any], *, build: bool) -> None:
        for name in ("fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, countdown.around(getattr(os, name)))
        commit(folder, manifest, build=build)

    resumable.commit = counting


# --- refused


def test_what_cannot_be_appended_to(tmp_path: Path) -> None:
    first, second = halves()
    with pytest.raises(gcfast.NoDatabaseError, match="no database to append to: call build"):
        explainer().append(second)
    with pytest.raises(gcfast.NoDatabaseError, match="no database to rebuild: call build"):
        explainer().rebuild(second)
    one = explainer()
    database = one.build(first, out=tmp_path / "db")
    other_settings = gcfast.Explainer(
        one.network.model, database=database, channels=5, triplets=3, evidence="against"
    )
    for call in (other_settings.append, other_settings.rebuild):
        with pytest.raises(ValueError, match="built with: evidence was 'for', is 'against'"):
            call(second)
    with torch.no_grad():
        one.network.model.head[1].weight += 1
    with pytest.raises(gcfast.ModelMismatchError, match=r"another model .*: other parameters"):
        one.append(second)


@pytest.mark.parametrize("triplets", [3, "all"])
def test_rows_of_older_draws_are_rebuilt_and_not_appended_to(triplets: Any) -> None:
    first, second = halves()
    one = explainer(triplets=triplets)
    database = one.build(first)
    assert database.manifest["draws"] == 2
    del database.manifest["draws"]
    if triplets == "all":
        assert len(one.append(second)) == ALL
        return
    with pytest.raises(ValueError, match=r"by the rules of version 1, .* version 2: call rebuild"):
        one.append(second)
    assert one.rebuild(first).manifest["draws"] == 2
    assert len(one.append(second)) == ALL


def test_two_writers(tmp_path: Path) -> None:
    first, second = halves()
    one = explainer()
    one.build(first, out=tmp_path / "db")
    two = gcfast.load(tmp_path / "db", one.network.model)
    one.append(second)
    with pytest.raises(gcfast.GcfastError, match="has changed since it was opened: open it again"):
        two.append(second)
    assert len(Database.open(tmp_path / "db")) == ALL


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_leaves_the_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    first, second = halves()
    one = explainer()
    stored = one.build(first, out=tmp_path / "db")
    count = 3 if call == "fsync" else 1  # the second shard is there, the manifest is not

    def failing(*args: Any) -> Any:
        nonlocal count
        count -= 1
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    real = getattr(os, call)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=r"cannot write the database .*db: No space left"):
        one.append(second)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    assert one.database is stored
    same_rows(Database.open(tmp_path / "db"), 0, STORED, stored)
    assert len(one.append(second)) == ALL
    manifest = json.loads((tmp_path / "db" / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2, 4, 3]
