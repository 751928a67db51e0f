"""The commands ``gcfast append`` and ``gcfast calibrate``: labelled pictures for a database."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from gcfast._checks import listed
from gcfast.cli.inputs import Opened, labelled_pictures, open_database, reading
from gcfast.cli.outputs import tell_doubts, tell_left_out
from gcfast.database.manifest import CALIBRATION, require_same_rows
from gcfast.database.write import commit, disk_errors, writing
from gcfast.images.folder import ImageFolder, ImageLoader


def append_pictures(options: argparse.Namespace) -> None:
    """Add the pictures that the options name to a database.

    Raises:
        ValueError: a picture is in the database already; as :meth:`gcfast.Explainer.append`.
        GcfastError: the model or the database cannot be used, or (``--strict``) a picture not
            read.
    """
    opened = open_database(options)
    before = len(opened.database)
    loader = _loader(options, opened, labelled_pictures(options))
    given = set(loader.ids)
    again = [name for name in opened.database.ids if name in given]
    if again:
        raise ValueError(
            f"`--images` must hold pictures that are not in the database, {len(again)} are: "
            f"{listed(again)}"
        )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            database = opened.explainer.append(loader, progress=True)
    finally:
        tell_left_out("unreadable pictures, skipped", loader.unreadable)
        tell_doubts(loader.doubts)
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{options.database}: {len(database) - before} rows more, {len(database)} in all")


def calibrate_database(options: argparse.Namespace) -> None:
    """Measure how maps of held-out pictures agree with their own, and keep it in the database.

    Raises:
        ValueError: as :meth:`gcfast.Explainer.calibrate`.
        GcfastError: the model or the database cannot be used, or (``--strict``) a picture not
            read; another process writes to the database.
    """
    opened = open_database(options)
    loader = _loader(options, opened, labelled_pictures(options))
    try:
        fidelity = opened.explainer.calibrate(loader, progress=True)
    finally:
        tell_left_out("unreadable pictures, skipped", loader.unreadable)
        tell_doubts(loader.doubts)
    manifest, folder = opened.database.manifest, opened.database.path
    assert folder is not None
    with (
        writing(folder, lambda: require_same_rows(folder, manifest)) as stored,
        disk_errors(folder),
    ):
        commit(folder, stored | {CALIBRATION: manifest[CALIBRATION]})
    if fidelity.unknown:
        print(
            f"pictures of classes that the database does not know: {fidelity.unknown}",
            file=sys.stderr,
        )
    print(fidelity)
    print(f"{options.database}: calibrated on {len(fidelity)} pictures")


def _loader(options: argparse.Namespace, opened: Opened, images: ImageFolder) -> ImageLoader:
    """Return the pictures, named as the database names its own: relative to its folder."""
    kept = opened.database.manifest["preprocessing"].get("images")
    root = images.root if kept is None else Path(kept)
    files = [Path(os.path.normpath(images.root / name)) for name in images.ids]
    ids = [(f.relative_to(root) if f.is_relative_to(root) else f).as_posix() for f in files]
    return ImageLoader(
        files, ids, images.labels, preprocessing=opened.preprocessing, **reading(options)
    )
