"""The folder of an unfinished build, ``NAME.partial``, as others find it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gcfast.builder.spool import KeptSpool
from gcfast.database import files
from gcfast.database.manifest import MANIFEST, OWN_FILES, STATE, partial_folder

HEAD = "head.safetensors"


def check_unfinished(
    target: Path, resume: bool, *, name: str = "out", remedy: str = "resume=True"
) -> None:
    """Refuse an unfinished build at ``target`` that is not to be resumed.

    Raises:
        FileExistsError: there is one; or a folder in its place that is none, such as a database
            beside the one at ``target``: to go on with it would put it in that one's place.
    """
    folder = partial_folder(target)
    if not folder.exists():
        return
    if not folder.is_dir() or not all(_ours(p.name) for p in folder.iterdir()):
        raise FileExistsError(
            f"`{name}` must leave {folder} to the build, got something else there"
        )
    if target.exists() and (folder / MANIFEST).exists() and not (folder / STATE).exists():
        raise FileExistsError(f"`{name}` must leave {folder} to the build, got a database there")
    if not resume:
        raise FileExistsError(
            f"`{name}` must not be an unfinished build, got {folder}; {remedy} continues it"
        )


def tidy(target: Path) -> None:
    """Remove what a build that was killed when it had replaced a database left of the old one.

    The two exchange their names, so that the old one is in the unfinished build's place, and the
    new one has the build's state until the old one is gone. Without that a database in the
    unfinished build's place is none of ours.

    Raises:
        GcfastError: another process is about to do so.
    """
    state, old = target / STATE, partial_folder(target)
    if not (target / MANIFEST).exists() or not state.exists():
        return
    with files.locked(target, "building in"):
        if not state.exists():  # another process has done so, and may be building there by now
            return
        if (
            old.is_dir()
            and not (old / STATE).exists()
            and all(_ours(p.name) for p in old.iterdir())
        ):
            files.remove(old)
        if not os.path.lexists(old):  # or it is tried again
            state.unlink(missing_ok=True)


def state_of(folder: Path) -> dict[str, Any] | None:
    """The state of an unfinished build; None where there is none, or it cannot be read."""
    try:
        content = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _ours(name: str) -> bool:
    known = (STATE, f"{STATE}.new", HEAD, f"{HEAD}.new")
    return name in known or name.startswith(KeptSpool.PREFIX) or bool(OWN_FILES.fullmatch(name))
