"""What a killed or failed writer leaves in a database folder, and what becomes of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import no_gpu, was_killed
from kill_builds import Countdown
from networks import common, loader, pictures

import gcfast
from gcfast.database import files, write
from gcfast.database.database import Database

OLD, NEW = 10, 16
Given = tuple[gcfast.Explainer, list[Any]]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """An explainer with a database at tmp_path / "db", and what to build a larger one from."""
    one = gcfast.Explainer(common(), "backbone", channels=5, triplets=3)
    images, labels = pictures(NEW)
    one.build(loader(images[:OLD], labels[:OLD]), out=tmp_path / "db")
    return one, loader(images, labels)


@pytest.fixture
def killed(tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch) -> Given:
    """The same, rebuilt by a process that was killed before it deleted what is not in use."""
    one, batches = given
    with monkeypatch.context() as patch:
        patch.setattr(write, "_clear", lambda *_: None)
        one.rebuild(batches)
    assert {"rows-00000.safetensors", "rows-00001.safetensors", "spool-labels"} <= {
        *names(tmp_path / "db")
    }
    return one, batches


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("between", ["nothing", "appended", "saved"])
def test_what_a_killed_rebuild_leaves_goes(tmp_path: Path, killed: Given, between: str) -> None:
    one, batches = killed
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW
    number = 2
    if between == "appended":
        one.append(batches[:1])
        assert names(tmp_path / "db") == [
            "manifest.json", "rows-00001.safetensors", "rows-00002.safetensors"
        ]  # fmt: skip
        number = 3
    elif between == "saved":
        one.database.save(tmp_path / "db", overwrite=True)
        assert names(tmp_path / "db") == ["manifest.json", "rows-00002.safetensors"]
        number = 3
    one.rebuild(batches)
    assert names(tmp_path) == ["db"]
    assert names(tmp_path / "db") == ["manifest.json", f"rows-{number:05d}.safetensors"]
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW


@pytest.mark.parametrize("between", ["appended", "saved", "indexed"])
def test_other_writers_leave_an_unfinished_rebuild_alone(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """It has its own shards, which are none of the database's."""
    one, batches = given
    with monkeypatch.context() as patch:
        patch.setattr(write.files, "rename", _failing_at("manifest.json"))
        with pytest.raises(ZeroDivisionError):
            one.rebuild(batches)
    left = {"build.json", "rows-00000.safetensors", "rows-00001.safetensors", "manifest.json"}
    assert {*names(tmp_path / "db")} == left
    if between == "appended":
        one.append(batches[:1])
    elif between == "saved":
        one.database.save(tmp_path / "db", overwrite=True)
    else:
        pytest.importorskip("faiss")
        one.database.build_index("Flat")
    assert len(Database.open(tmp_path / "db", verify=True)) >= OLD
    assert {"build.json", "rows-00001.safetensors"} <= {*names(tmp_path / "db")}
    one.rebuild([], resume=True)
    assert names(tmp_path / "db") == ["manifest.json", "rows-00001.safetensors"]
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW


def _failing_at(name: str) -> Callable[[Path, Path], None]:
    rename = files.rename

    def renaming(staged: Path, path: Path) -> None:
        if path.name == name:
            raise ZeroDivisionError
        rename(staged, path)

    return renaming


@pytest.mark.parametrize("how", ["save", "save over", pytest.param("append", marks=no_gpu)])
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, given: Given, how: str
) -> None:
    """And nothing that is in the way of the next one, or stays after it."""
    one, batches = given
    larger = gcfast.Explainer(one.network.model, "backbone", channels=5).build(batches)

    def work() -> None:
        countdown = Countdown(point)
        for name in ("fsync", "rename", "unlink"):
            setattr(os, name, countdown.around(getattr(os, name)))
        if how == "append":
            gcfast.load(folder, one.network.model).append(batches[:1])
        else:
            larger.save(folder, overwrite=how == "save over")

    point, found, killed = 0, [], True
    while killed:
        point += 1
        folder = tmp_path / str(point)
        if how != "save":
            shutil.copytree(tmp_path / "db", folder)
        killed = was_killed(work)
        try:
            found.append(len(Database.open(folder, verify=True)))
        except gcfast.NoDatabaseError:
            found.append(0)
        larger.save(folder, overwrite=found[-1] > 0)
        assert len(Database.open(folder, verify=True)) == NEW
        assert len(names(folder)) == 2
    before = 0 if how == "save" else OLD
    assert point > 8
    assert found == sorted(found)
    assert (
        {found[0], found[-1]}
        == {*found}
        == {before, OLD + len(batches[0][1]) if how == "append" else NEW}
    )


def test_files_are_flushed_before_the_manifest_and_old_ones_deleted_after_it(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could leave a manifest without its files."""
    one, _ = given
    steps: list[str] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        steps.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        os, "rename", lambda a, b: (rename(a, b), steps.append(f"rename {Path(b).name}"))
    )
    monkeypatch.setattr(
        os, "unlink", lambda path: (unlink(path), steps.append(f"delete {Path(path).name}"))
    )
    one.database.save(tmp_path / "db", overwrite=True)
    assert steps == [
        "flush rows-00001.safetensors.new",
        "rename rows-00001.safetensors",
        "flush db",
        "flush manifest.json.new",
        "rename manifest.json",
        "flush db",
        "delete rows-00000.safetensors",
    ]


def test_what_cannot_be_deleted_goes_with_the_next(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's disk, where files that a reader has mapped stay until it lets them go."""
    one, batches = given

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        one.database.save(tmp_path / "db", overwrite=True)
    (tmp_path / "db" / ".nfs0000000000abcdef00000001").write_bytes(b"a deleted shard")
    assert "rows-00000.safetensors" in names(tmp_path / "db")
    one.rebuild(batches)
    assert names(tmp_path / "db") == ["manifest.json", "rows-00002.safetensors"]
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW


@pytest.mark.parametrize("how", ["build", "save"])
def test_what_another_process_finishes_before_the_folder_is_locked_is_not_replaced(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    one, batches = given
    database, folder = one.database, tmp_path / "new"

    def late(path: Path, **options: bool) -> None:
        monkeypatch.undo()
        database.save(folder)
        path.mkdir(**options)

    monkeypatch.setattr(Path, "mkdir", late)
    with pytest.raises(FileExistsError, match=r"got the database .*; overwrite=True replaces it"):
        database.save(folder) if how == "save" else one.build(batches, out=folder)
    assert len(Database.open(folder, verify=True)) == OLD
    assert len(names(folder)) == 2


def test_a_build_that_cannot_begin_leaves_nothing(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, batches = given

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = names(tmp_path / "db")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write the database .*db: No space left"):
            one.rebuild(batches)
    assert names(tmp_path) == ["db"]
    assert names(tmp_path / "db") == before
    assert len(one.rebuild(batches)) == NEW


def test_an_empty_folder_is_what_a_build_leaves_that_was_killed_at_once(
    tmp_path: Path, given: Given
) -> None:
    one, batches = given
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="new, not a gcfast database"):
        one.build(batches, out=tmp_path / "new")
    assert len(one.build(batches, out=tmp_path / "new", resume=True)) == NEW
