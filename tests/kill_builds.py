"""Streaming builds that are killed with SIGKILL and resumed, each compared with an undisturbed one.

    python tests/kill_builds.py FOLDER "closed form"|autograd

A process of its own, which imports everything once and forks a child for every build: autograd does
not survive a fork once it has run, and importing PyTorch for each would take most of the time.
Prints a line of JSON for each kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forks import forked
from networks import common, loader, other, pictures

import gcfast
from gcfast.builder import resumable
from gcfast.database import shards
from gcfast.database.manifest import MANIFEST, STATE

POINTS = 8  # kills at a counted operation
MOMENTS = 2  # kills at a moment
IMAGES, BATCH = 44, 4
HEADS = {"closed form": common, "autograd": other}


class Countdown:
    """Counts operations that change files, and the model's passes; kills the process at one."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self.kill_at = kill_at

    def step(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.step()  # before: as if it had not happened
            result = function(*args, **kwargs)
            self.step()  # after: done, and nothing that follows
            return result

        return counted


def build(folder: Path, head: str, *, resume: bool, kill_at: int | None = None) -> int:
    """One build in this process; returns how many operations it took."""
    torch.manual_seed(0)
    images, labels = pictures(IMAGES)
    names = [("robin", "wren", "tit")[i] for i in labels]
    names[7] = "alone"  # left out, so that rows and images are not the same
    countdown = Countdown(kill_at)
    for name in ("fsync", "rename", "truncate", "unlink"):
        setattr(os, name, countdown.around(getattr(os, name)))
    model = HEADS[head]()
    model.register_forward_hook(lambda *_: countdown.step())
    explainer = gcfast.Explainer(model, "backbone", channels=5, triplets=7, method="gradcam++")
    shards.SHARD_ROWS = 9
    resumable.COMMIT_ROWS = 12
    explainer.build(loader(images, names, BATCH), out=folder, resume=resume)
    return countdown.count


def built(
    folder: Path,
    head: str,
    *,
    resume: bool = False,
    kill_at: int | None = None,
    until: float | None = None,
) -> tuple[int, int]:
    """(exit status, operations) of a build in a child, killed when it has run that long."""
    read, write = os.pipe()

    def run() -> None:
        operations = build(folder, head, resume=resume, kill_at=kill_at)
        os.write(write, str(operations).encode())

    child = forked(run)
    os.close(write)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], int(said or 0)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def done(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def stage(folder: Path) -> str:
    """How far the killed build had come."""
    if done(folder):
        return "done"
    try:
        state = json.loads((folder / STATE).read_bytes())
    except OSError:
        return "begun"
    if state["format"] != resumable.STATE_FORMAT:
        return "finishing"
    if state["totals"] is None:
        return "begun"
    if state["stage"] == "embedding":
        return "embedding"
    return "rows, some" if state["shards"] else "rows"


def main(root: Path, head: str) -> None:
    dice = random.Random(20)
    undisturbed = root / f"{head}.undisturbed"
    began = time.monotonic()
    status, operations = built(undisturbed, head)
    took = time.monotonic() - began
    assert status == 0
    wanted = content(undisturbed)
    points: list[int | float] = sorted(dice.sample(range(1, operations + 1), POINTS))
    points += [took * dice.uniform(0.1, 0.95) for _ in range(MOMENTS)]
    for number, point in enumerate(points):
        folder = root / f"{head}.{number}"
        counted = isinstance(point, int)
        status, _ = built(
            folder, head, kill_at=point if counted else None, until=None if counted else point
        )
        facts = {"head": head, "point": point, "of": operations, "stage": stage(folder)}
        # Every other one is killed again while it resumes.
        again = status
        if number % 2 and facts["stage"] != "done":
            again, _ = built(folder, head, resume=True, kill_at=dice.randrange(2, 12))
        if not done(folder):
            resumed, left = built(folder, head, resume=True)
            assert resumed == 0
            facts["operations_left"] = left
        rest = [p.name for p in folder.iterdir() if not p.name.startswith(("manifest", "rows-"))]
        rest += [p.name for p in root.iterdir() if p.name.startswith(f".{folder.name}")]
        print(
            json.dumps(
                facts
                | {
                    "killed": [os.WIFSIGNALED(s) for s in (status, again)],
                    "same": content(folder) == wanted,
                    "clean": not rest,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
