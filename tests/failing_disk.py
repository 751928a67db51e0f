"""Operations on a database whose disk fails from a certain call on, for every such call.

    python tests/failing_disk.py FOLDER OPERATION

Started with the library of tests/failing_disk.c in LD_PRELOAD. Each child's disk is full (ENOSPC)
or broken (EIO) from its n-th write, flush, renaming or new folder on, and stays so, and the clock
jumps by years whenever it is read. The operation has to end in an OSError with words, the folder
has to hold the old rows or the new ones, whole, and once the disk works again the operation has to
succeed. Prints a line of JSON for each failure, and tracebacks on stderr.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from forks import forked
from networks import common, pictures

import gcfast
from gcfast.database import shards
from gcfast.database.database import Database

ROWS, NEW = 12, 6  # of each label two at least, without which a row is left out
State = tuple[int, int, bool]  # rows, classes, whether there is an index

MODEL = common()


def explainer() -> gcfast.Explainer:
    return gcfast.Explainer(MODEL, "backbone", channels=5, triplets=3)


def opened(folder: Path) -> gcfast.Explainer:
    return gcfast.load(folder / "db", MODEL)


def batches(count: int, prefix: str) -> list[object]:
    images, labels = pictures(count)
    names = [("robin", "wren", "tit")[i] for i in labels]
    return [(images, names, [f"{prefix}{i}" for i in range(count)])]


def _build(folder: Path) -> None:
    explainer().build(batches(ROWS, "old"), out=folder / "db", resume=True, overwrite=True)


def _index(folder: Path) -> None:
    Database.open(folder / "db").build_index("Flat")


# Each with what it leaves.
OPERATIONS: dict[str, tuple[Callable[[Path], object], State]] = {
    "build": (_build, (ROWS, 3, False)),
    "append": (lambda f: opened(f).append(batches(NEW, "new")), (ROWS + NEW, 3, False)),
    "remove": (lambda f: Database.open(f / "db").remove(["old1", "old8"]), (ROWS - 2, 3, False)),
    "relabel": (lambda f: Database.open(f / "db").relabel({"old1": "owl"}), (ROWS, 4, False)),
    "merge": (
        lambda f: Database.merge(
            Database.open(f / "db"), Database.open(f / "more"), out=f / "db", overwrite=True
        ),
        (ROWS + NEW, 3, False),
    ),
    "compress": (
        lambda f: Database.open(f / "db").compress(3).save(f / "db", overwrite=True),
        (3, 3, False),
    ),
    "index": (_index, (ROWS, 3, True)),
}


def made(folder: Path, operation: str) -> None:
    """What the operation begins with."""
    folder.mkdir()
    if operation != "build":
        explainer().build(batches(ROWS, "old"), out=folder / "db")
    if operation == "merge":
        explainer().build(batches(NEW, "new"), out=folder / "more")


def state(folder: Path) -> State:
    """What the folder's database has, all of it whole; no rows where there is none."""
    try:
        database = Database.open(folder / "db", verify=True)
    except gcfast.NoDatabaseError:
        return 0, 0, False
    indexed = "index" in database.manifest
    if indexed:
        database.read_index()
    assert len(database.weights) == len(list(database.ids))
    return len(database), len(database.class_names), indexed


def on_a_failing_disk(
    disk: ctypes.CDLL, run: Callable[[Path], object], folder: Path, successes: int, said: Path
) -> None:
    """The operation, and what it raised as a line of JSON in a file."""
    code = (errno.ENOSPC, errno.EIO)[successes % 2]
    disk.disk_fails_after(successes, code, f"{folder}/".encode())
    assert abs(time.time() - time.time()) > 1e8
    error = None
    try:
        run(folder)
    except Exception as raised:
        traceback.print_exc()
        error = raised
    facts = {"calls": disk.disk_calls(), "error": type(error).__name__, "words": str(error)}
    disk.disk_fails_after(0, 0, b"")
    said.write_text(json.dumps(facts))


def main(root: Path, operation: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shards.SHARD_ROWS = 4
    disk = ctypes.CDLL(None)
    disk.disk_fails_after.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p)
    run, after = OPERATIONS[operation]
    made(root / "whole", operation)
    before = state(root / "whole")
    failed, point = True, 0
    while failed:
        folder, said = root / str(point), root / f"{point}.json"
        shutil.copytree(root / "whole", folder)
        work = partial(on_a_failing_disk, disk, run, folder, point, said)
        status = os.waitpid(forked(work), 0)[1]
        facts = json.loads(said.read_text())
        failed = facts["calls"] > point
        left = state(folder)
        assert left in (before, after)
        if left == before:
            run(folder)  # the disk works again
        assert state(folder) == after
        print(json.dumps({"point": point, "status": status, **facts, "new": left == after}))
        shutil.rmtree(folder)
        point += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
