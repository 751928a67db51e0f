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
from gcfast.database import files, manifest, shards
from gcfast.database.database import Database

pytest.importorskip("fcntl")

KILLED = """
import multiprocessing, os, pathlib, signal, sys, time
from gcfast.database import files

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
        two.database.save(tmp_path / "db", overwrite=True)
        assert len(Database.open(tmp_path / "db", verify=True)) == 10
    else:
        resumed = two.build(
            loader(images[:8], labels[:8]), out=tmp_path / "db", overwrite=True, resume=True
        )
        assert len(resumed) == 8
        assert torch.isfinite(resumed.weights).all()


def test_a_link_in_the_place(saved: Path) -> None:
    """What it leads to is not replaced in its name, and it is not left without a database."""
    link = saved.with_name("link")
    link.symlink_to(saved.name)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    one = gcfast.Explainer(common(), "backbone", channels=5)
    database = one.build(loader(*pictures(9)))
    with pytest.raises(FileExistsError, match=rf"must not be a link, got {link}: give {saved}"):
        database.save(link, overwrite=True)
    with pytest.raises(FileExistsError, match=rf"must not be a link, got {link}: give {saved}"):
        one.build(loader(*pictures(9)), out=link, overwrite=True)
    assert link.is_symlink()
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

    for name in ("rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    database.save(saved, overwrite=True)
    assert len(found) > 4
    assert set(found) == {len(database)}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("at", [0, 1])
def test_a_database_that_is_replaced_while_it_is_opened(
    saved: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Never one's manifest with the other's rows."""
    larger = gcfast.Explainer(common(), "backbone", channels=4).build(loader(*pictures(31)))
    small, opened = len(Database.open(saved)), []

    class Interrupted(manifest.ShardFile):
        def __init__(self, *arguments: Any) -> None:
            if at == 1:
                super().__init__(*arguments)
            if not opened:
                opened.append(arguments)
                larger.save(saved, overwrite=True)
            if at == 0:
                super().__init__(*arguments)

    monkeypatch.setattr(manifest, "ShardFile", Interrupted)
    got = Database.open(saved, verify=True)
    assert len(got) == 31 != small
    assert got.manifest == larger.manifest
    assert torch.equal(got.weights, larger.weights)
