"""Folders that one process holds, also with children, and that are replaced meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import common, loader, pictures

import gcfast
from gcfast.builder import append as append_module
from gcfast.database import files, read, shards
from gcfast.database.database import Database

pytest.importorskip("fcntl")

KILLED = """
import multiprocessing, os, pathlib, signal, sys, time
from gcfast.database import files
from gcfast.database import read
from gcfast.database import shards

with files.locked(pathlib.Path(sys.argv[1]), "writing to"):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_outlives_the_work_does_not_hold_the_folder(tmp_path: Path) -> None:
    with files.locked(tmp_path, "writing to"):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        with (
            pytest.raises(gcfast.GcfastError, match="another process is writing to"),
            files.locked(tmp_path, "writing to"),
        ):
            raise AssertionError
    try:
        with files.locked(tmp_path, "writing to"):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_a_killed_process_lets_the_folder_go_though_its_workers_live(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        try:
            assert run.wait(60) == -signal.SIGKILL
            with files.locked(tmp_path, "writing to"):
                os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_was_replaced_while_it_was_being_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "db"
    folder.mkdir()
    flock = files.fcntl.flock

    def late(descriptor: int, how: int) -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        monkeypatch.undo()
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with (
        pytest.raises(gcfast.GcfastError, match=r"was writing to .*db and has replaced it"),
        files.locked(folder, "writing to"),
    ):
        raise AssertionError


@pytest.mark.parametrize("how", ["save", "rebuild"])
def test_a_database_is_not_replaced_under_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The writer's manifest would name the new folder's shards, which are not its own."""
    images, labels = pictures(16)
    one = gcfast.Explainer(common(), "backbone", channels=5, triplets=3)
    one.build(loader(images[:10], labels[:10]), out=tmp_path / "db")
    two = gcfast.load(tmp_path / "db", one.network.model)
    write_shard = append_module.write_shard

    def replace() -> None:
        if how == "save":
            two.database.save(tmp_path / "db", overwrite=True)
        else:
            two.rebuild(loader(images[:8], labels[:8]))

    def interrupted(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(gcfast.GcfastError, match="another process is writing to"):
            replace()
        return write_shard(*arguments)

    monkeypatch.setattr(append_module, "write_shard", interrupted)
    one.append(loader(images[10:], labels[10:]))
    assert len(Database.open(tmp_path / "db", verify=True)) == 16
    monkeypatch.undo()
    if how == "save":
        assert not list(tmp_path.glob(".db.*"))
        two.database.save(tmp_path / "db", overwrite=True)
        assert len(Database.open(tmp_path / "db", verify=True)) == 10
    else:
        resumed = two.build(
            loader(images[:8], labels[:8]), out=tmp_path / "db", overwrite=True, resume=True
        )
        assert len(resumed) == 8
        assert torch.isfinite(resumed.weights).all()


# --- what is left beside a place


def test_what_killed_saves_left_goes_with_the_next_one(tmp_path: Path) -> None:
    place = tmp_path / "d[b]"  # as in a pattern of names
    kept = [tmp_path / name for name in (".d[b].mine", ".db.gcfast-12345678", "d[b].partial")]
    left = [tmp_path / f".d[b].gcfast-{'x' * 8}", tmp_path / f".d[b].gcfast-{'y' * 8}"]
    for folder in (*kept, *left):
        folder.mkdir()
        (folder / "file").write_text("content")
    with files.locked(left[1], "writing to"), files.beside(place) as folder:
        assert not left[0].exists()
        assert left[1].exists()  # another process is at it
        with files.beside(place) as another:
            assert folder.exists()
        assert not another.exists()
        files.move_into_place(folder, place)
    assert place.is_dir()
    assert place.stat().st_mode & 0o777 == kept[0].stat().st_mode & 0o777
    assert all((folder / "file").exists() for folder in kept)


def test_a_folder_that_is_taken_for_one_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another save to the same place, between its making and its locking."""
    place, make, made = tmp_path / "db", files.tempfile.mkdtemp, []

    def late(**options: Any) -> str:
        one = make(**options)
        made.append(one)
        if len(made) == 1:
            with files.beside(place):
                assert not Path(one).exists()
        return one

    monkeypatch.setattr(files.tempfile, "mkdtemp", late)
    with files.beside(place) as folder:
        (folder / "file").write_text("content")
        files.move_into_place(folder, place)
    assert len(made) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["db"]


def test_a_link_in_the_place(saved: Path) -> None:
    """It is replaced, not what it leads to."""
    link = saved.with_name("link")
    link.symlink_to(saved.name)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    Database.open(saved).save(link, overwrite=True)
    assert not link.is_symlink()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name, "link"]


# --- readers of a database that is replaced


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of 9 rows in three shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    images, labels = pictures(9)
    database = gcfast.Explainer(common(), "backbone", channels=5).build(loader(images, labels))
    database.save(tmp_path / "db")
    return tmp_path / "db"


def test_there_is_no_moment_without_a_database(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash between any two steps would leave, and what a reader finds."""
    database, found = Database.open(saved), []

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            out = function(*arguments, **options)
            found.append(len(Database.open(saved, verify=True)))
            return out

        return call

    for name in ("rename", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    database.save(saved, overwrite=True)
    assert len(found) > 4
    assert set(found) == {len(database)}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_system_that_cannot_exchange_two_names(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    database = Database.open(saved)
    database.save(saved, overwrite=True)
    assert len(Database.open(saved, verify=True)) == len(database)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("at", [0, 1])
def test_a_database_that_is_replaced_while_it_is_opened(
    saved: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Never one's manifest with the other's rows."""
    larger = gcfast.Explainer(common(), "backbone", channels=4).build(loader(*pictures(31)))
    small, opened = len(Database.open(saved)), []

    class Interrupted(read.ShardFile):
        def __init__(self, *arguments: Any) -> None:
            if at == 1:
                super().__init__(*arguments)
            if not opened:
                opened.append(arguments)
                larger.save(saved, overwrite=True)
            if at == 0:
                super().__init__(*arguments)

    monkeypatch.setattr(read, "ShardFile", Interrupted)
    got = Database.open(saved, verify=True)
    assert len(got) == 31 != small
    assert got.manifest == larger.manifest
    assert torch.equal(got.weights, larger.weights)
