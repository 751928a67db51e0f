"""What the commands read: the network, a database with its preprocessing, picture files."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gcfast
from gcfast._checks import listed
from gcfast.cli.models import LoadedModel, load_model
from gcfast.cli.outputs import tell_passed_over
from gcfast.database.database import Database
from gcfast.database.manifest import read_manifest
from gcfast.images.folder import ImageFolder, in_words, scan
from gcfast.images.preprocessing import Preprocessing


class Opened(NamedTuple):
    """A database on the network that the options name."""

    explainer: gcfast.Explainer
    database: Database
    device: torch.device
    preprocessing: Preprocessing
    images: Path | None  # where the database's pictures are, if known


Loaded = tuple[LoadedModel, torch.device, int | str | None]  # with the key of its output


def open_database(options: argparse.Namespace, **settings: Any) -> Opened:
    """Open ``--database`` with ``--model``.

    Args:
        options: of a command on a database.
        **settings: as for :func:`gcfast.load`.

    Raises:
        ValueError: the database does not say how its pictures were prepared; as
            :func:`load_network`.
        GcfastError: the model or the database cannot be used.
    """
    return open_on(load_network(options), options, **settings)


def open_on(loaded: Loaded, options: argparse.Namespace, **settings: Any) -> Opened:
    """Open ``--database`` on a network that is loaded; raises as :func:`open_database`."""
    network, device, output_key = loaded
    kept = read_manifest(options.database).get("preprocessing")
    if not kept or not isinstance(kept, dict):
        raise ValueError(
            "`--database` must say how its pictures were prepared, and was built without that: "
            "give build(…, preprocessing=gcfast.images.folder.Preprocessing(…).to_dict())"
        )
    preprocessing = Preprocessing.from_dict(kept)
    if options.output_key is not None:  # the database knows its own
        settings["output_key"] = output_key
    tokens = kept.get("tokens")
    explainer = gcfast.load(
        options.database,
        network.module,
        reshape=None if tokens is None else gcfast.TokenGrid(prefix=tokens),
        **settings,
    )
    assert explainer.database is not None
    images = kept.get("images") if options.images is None else options.images
    root = None if images is None else Path(images)
    return Opened(explainer, explainer.database, device, preprocessing, root)


def load_network(options: argparse.Namespace, *, texts: bool = False) -> Loaded:
    """Return the network that the options name, on its device, the device, and the output's key.

    ``texts`` also keeps the model's text tower.

    Raises:
        ValueError: ``--device`` is no device, or is not there; as
            :func:`gcfast.cli.models.load_model`.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'`--device` must be "cpu", "cuda" or "cuda:0", got {name!r}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`--device` must be one that is there, got {name!r} without CUDA")
    loaded = load_model(options.model, options.weights, options.pool, texts=texts)
    loaded.module.to(device)
    key: int | str | None = options.output_key or loaded.output_key
    if isinstance(key, str) and key.isdecimal():
        key = int(key)  # a place in a tuple
    return loaded, device, key


def labelled_pictures(options: argparse.Namespace) -> ImageFolder:
    """Find the labelled pictures of ``--images``, and tell what is passed over.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as
            :class:`gcfast.images.folder.ImageFolder`.
    """
    images = ImageFolder(options.images, options.labels)
    tell_passed_over(images.passed_over, images.by_content)
    if images.empty_classes:
        count, names = len(images.empty_classes), listed(images.empty_classes)
        print(f"class folders without pictures: {count} ({names})", file=sys.stderr)
    return images


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Return how pictures are read, as the loaders take it."""
    return {
        "batch_size": options.batch_size,
        "workers": options.workers,
        "strict": options.strict,
    }


def list_files(paths: Iterable[Path]) -> list[str]:
    """List the picture files that paths name: files as they are, folders with all below them.

    What is passed over in folders is told on standard error.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no pictures.
    """
    files = []
    passed_over: Counter[str] = Counter()
    by_content: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            found = scan(path)
            if not found.files:
                got = f": {in_words(found.passed_over)}" if found.passed_over else ""
                raise ValueError(f"`PATH` must be a picture or hold some, {path} has none{got}")
            files += [os.fspath(path / name) for name in found.files]
            passed_over += found.passed_over
            by_content += found.by_content
        elif path.exists():
            files.append(os.fspath(path))
        else:
            raise FileNotFoundError(f"`PATH` must exist, got {path}")
    tell_passed_over(passed_over, by_content)
    return files


def stated_preprocessing(
    options: argparse.Namespace, default: Preprocessing | None
) -> Preprocessing:
    """Take the settings of the model's source, unless an option says otherwise, and say them."""
    given = {
        field.name: value
        for field in fields(Preprocessing)
        if (value := getattr(options, field.name)) is not None
    }
    settings = (default or Preprocessing()).to_dict() | given
    preprocessing = Preprocessing.from_dict(settings)
    what = "preprocessing"
    if default is None and "transform" not in given:
        assumed = [f"--{name}" for name in ("size", "fit", "mean", "std", "interpolation")
                   if name.replace("fit", "resize") not in given]  # fmt: skip
        if assumed:
            what = (
                f"preprocessing, assumed where the model and you do not say ({', '.join(assumed)})"
            )
    print(f"{what}: {preprocessing}", file=sys.stderr)
    return preprocessing
