"""What lies in the place of an unfinished build, and what a build that was killed leaves there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from networks import common, loader, pictures

import gcfast
from gcfast.database import files, partial
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
def killed(tmp_path: Path, given: Given) -> Given:
    """The same, rebuilt by a process that was killed when the two had exchanged their places."""
    one, batches = given
    (tmp_path / "db").rename(tmp_path / "db.partial")
    one.build(batches, out=tmp_path / "db.new")
    (tmp_path / "db.new").rename(tmp_path / "db")
    (tmp_path / "db" / "build.json").write_text("{}")
    one.database = Database.open(tmp_path / "db")
    return one, batches


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_database_in_the_place_is_somebodys(tmp_path: Path, given: Given) -> None:
    """It is not removed, and does not become the one that is built."""
    one, batches = given
    Database.open(tmp_path / "db").save(tmp_path / "db.partial")
    before = content(tmp_path / "db.partial")
    words = r"`out` must leave .*db\.partial to the build, got a database there"
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=words):
            one.build(batches, out=tmp_path / "db", overwrite=True, resume=resume)
        with pytest.raises(FileExistsError, match=words):
            one.rebuild(batches, resume=resume)
    with pytest.raises(FileExistsError, match="`out` must not exist, got the database"):
        one.build(batches, out=tmp_path / "db")
    assert content(tmp_path / "db.partial") == before
    assert len(Database.open(tmp_path / "db", verify=True)) == OLD


@pytest.mark.parametrize("between", ["nothing", "appended", "saved"])
def test_what_a_killed_rebuild_replaced_goes(tmp_path: Path, killed: Given, between: str) -> None:
    one, batches = killed
    if between == "appended":
        one.append(batches[:1])
    elif between == "saved":
        one.database.save(tmp_path / "db", overwrite=True)
        assert names(tmp_path) == ["db"]
    one.rebuild(batches)
    assert names(tmp_path) == ["db"]
    assert names(tmp_path / "db") == ["manifest.json", "rows-00000.safetensors"]
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW


def test_a_link_that_was_replaced_goes_and_not_what_it_leads_to(
    tmp_path: Path, killed: Given
) -> None:
    one, batches = killed
    (tmp_path / "db.partial").rename(tmp_path / "mine")
    (tmp_path / "db.partial").symlink_to("mine")
    before = content(tmp_path / "mine")
    one.rebuild(batches)
    assert names(tmp_path) == ["db", "mine"]
    assert content(tmp_path / "mine") == before


@pytest.mark.usefixtures("killed")
def test_what_another_process_builds_there_by_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cleared away what was left first, and was done when this one came to do so."""
    locked, spool = files.locked, tmp_path / "db.partial" / "spool-labels"

    @contextmanager
    def late(folder: Path, doing: str) -> Iterator[None]:
        monkeypatch.undo()
        partial.tidy(tmp_path / "db")
        assert names(tmp_path) == ["db"]
        spool.parent.mkdir()
        spool.write_bytes(b"its")
        with locked(folder, doing):
            yield

    monkeypatch.setattr(files, "locked", late)
    partial.tidy(tmp_path / "db")
    assert spool.read_bytes() == b"its"
    assert not (tmp_path / "db" / "build.json").exists()


def test_what_was_replaced_is_gone_for_good_before_its_sign_is(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could leave the old database without what tells that it is one."""
    one, batches = given
    steps: list[str] = []
    fsync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            steps.append("synced without" if not (tmp_path / "db.partial").exists() else "synced")

    def unlinked(path: Path, **options: bool) -> None:
        if path == tmp_path / "db" / "build.json":
            steps.append("unlinked")
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    one.rebuild(batches)
    assert steps[-2:] == ["synced without", "unlinked"]


def test_what_was_replaced_and_could_not_be_removed_goes_with_the_next(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's disk, where files that a reader has mapped stay until it lets them go."""
    one, batches = given
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda _: None)
        one.rebuild(batches)
    assert names(tmp_path) == ["db", "db.partial"]
    assert len(Database.open(tmp_path / "db.partial", verify=True)) == OLD
    one.rebuild(batches)
    assert names(tmp_path) == ["db"]
    assert names(tmp_path / "db") == ["manifest.json", "rows-00000.safetensors"]
    assert len(Database.open(tmp_path / "db", verify=True)) == NEW


def test_a_build_that_cannot_begin_leaves_nothing(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, batches = given

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write the database .*db: No space left"):
            one.rebuild(batches)
    assert names(tmp_path) == ["db"]
    assert len(one.rebuild(batches)) == NEW
