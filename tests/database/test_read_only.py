"""A folder that cannot be written to: it is read as any other, and every writer says so."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from failing_disk import MODEL, OPERATIONS, batches, made, opened
from forks import forked, no_gpu
from networks import pictures

import gcfast
from gcfast.database.database import Database

if sys.platform != "linux":
    pytest.skip("needs Linux's capabilities", allow_module_level=True)

RAISES = {name: run for name, (run, _) in OPERATIONS.items()} | {
    "save": lambda f: Database.open(f / "db").save(f / "copy"),
    "build anew": lambda f: gcfast.Explainer(MODEL, "backbone", channels=5, triplets=3).build(
        batches(12, "new"), out=f / "another"
    ),
}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A database with an index, and all that an operation needs, without leave to write."""
    here = tmp_path / "here"
    made(here, getattr(request, "param", "index"))
    if (here / "db").exists():
        Database.open(here / "db").build_index("Flat")
    paths = [here, *here.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield here
    for path in paths:
        path.chmod(0o755)


def without_privileges(run: Callable[[], object]) -> None:
    """Call as a user whom permissions bind, root too: without CAP_DAC_OVERRIDE and its kin."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # none is effective
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    run()


def as_anyone(run: Callable[[], object]) -> int:
    """The status of a child that calls a function without privileges."""
    return os.waitpid(forked(partial(without_privileges, run)), 0)[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_it_is_read(folder: Path) -> None:
    images, _ = pictures(4)
    wanted = opened(folder).explain_batch(images, details=True)

    def read() -> None:
        explainer = opened(folder)
        found = explainer.explain_batch(images, details=True)
        assert found.maps.equal(wanted.maps)
        assert found.neighbors.equal(wanted.neighbors)
        database = Database.open(folder / "db", verify=True)
        database.read_index()
        assert len(database) == 12

    assert as_anyone(read) == 0


@pytest.mark.parametrize(
    ("folder", "operation"),
    [pytest.param(o, o, marks=[no_gpu][: o == "append"]) for o in RAISES],
    indirect=["folder"],
)
def test_every_writer_says_so(folder: Path, operation: str) -> None:
    before = contents(folder)

    def write() -> None:
        with pytest.raises(PermissionError) as raised:
            RAISES[operation](folder)
        assert "cannot" in str(raised.value)
        assert str(folder) in str(raised.value)

    assert as_anyone(write) == 0
    assert contents(folder) == before
