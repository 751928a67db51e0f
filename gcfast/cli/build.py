"""The command `gcfast build`, and what it shares with `gcfast explain`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch

import gcfast
from gcfast.cli.models import LoadedModel, load_model
from gcfast.database.manifest import check_target
from gcfast.database.partial import check_unfinished, tidy
from gcfast.images.folder import ImageFolder, ImageLoader
from gcfast.images.preprocessing import Preprocessing

# What the counts of a build mean.
_COUNTS = {
    "skipped_single": "left out, the only picture of their class",
    "skipped_no_triplet": "left out, without a triplet of positive loss",
    "hardest_triplet": "without a triplet of positive loss, took their hardest one",
}


def build_database(options: argparse.Namespace) -> int:
    """Builds the database that the options describe and tells what was left out of it.

    Returns:
        The exit status.

    Raises:
        FileExistsError: As `gcfast.database.manifest.check_target`, or for an unfinished build.
        ValueError: If the options or the pictures do not fit each other or the model.
        GcfastError: If the model cannot be used, or (`--strict`) a picture not read.
    """
    if options.margin is not None and options.objective != "triplet":
        raise ValueError(
            f"`--margin` must be left out with --objective {options.objective}, which has none"
        )
    # Before hours of work, not after.
    tidy(options.out)
    check_target(options.out, options.force, name="--out", remedy="--force")
    check_unfinished(options.out, options.resume, name="--out", remedy="--resume")

    images = ImageFolder(options.images, options.labels)
    loaded, _, output_key = load_network(options)
    preprocessing = _preprocessing(options, loaded.preprocessing)
    loader = images.loader(
        preprocessing,
        batch_size=options.batch_size,
        workers=options.workers,
        strict=options.strict,
    )
    objectives: dict[str, Callable[[], gcfast.Objective]] = {
        "triplet": lambda: gcfast.TripletLoss(0.2 if options.margin is None else options.margin),
        "distance-difference": gcfast.DistanceDifference,
        "positive": lambda: gcfast.PairDistance("positive"),
        "negative": lambda: gcfast.PairDistance("negative"),
    }
    explainer = gcfast.Explainer(
        loaded.module,
        layer=options.layer,
        objective=objectives[options.objective](),
        method=options.method,
        triplets=options.triplets,
        channels=options.channels,
        evidence=options.evidence,
        l2_normalize=not options.no_l2_normalize,
        on_no_triplet=options.on_no_triplet,
        output_key=output_key,
        reshape=None if options.tokens is None else gcfast.TokenGrid(prefix=options.tokens),
        seed=options.seed,
    )
    # What `explain` needs to know besides: where the neighbours' pictures are, and how the layer's
    # output is read, which the database itself does not keep.
    kept = preprocessing.to_dict() | {"images": os.fspath(images.root), "tokens": options.tokens}
    try:
        database = explainer.build(
            loader,
            progress=sys.stderr.isatty(),
            preprocessing=kept,
            out=options.out,
            resume=options.resume,
            overwrite=options.force,
            storage=options.storage,
        )
    finally:
        # Also when the build fails: what was skipped may be why (one class left, say).
        tell_unreadable(loader)
    for name, count in database.report.items():
        if count and name not in ("images", "rows"):
            print(f"pictures {_COUNTS.get(name, name)}: {count}", file=sys.stderr)
    print(
        f"{options.out}: {len(database)} rows, {len(images.class_names)} classes, "
        f"layer {explainer.layer_name}"
    )
    return 0


def _preprocessing(options: argparse.Namespace, default: Preprocessing | None) -> Preprocessing:
    """What the model's source says, where no option says otherwise."""
    settings = (default or Preprocessing()).to_dict()
    for name in ("size", "resize", "mean", "std"):
        given = getattr(options, name)
        if given is not None:
            settings[name] = given
    return Preprocessing.from_dict(settings)


def load_network(options: argparse.Namespace) -> tuple[LoadedModel, torch.device, int | str | None]:
    """The network that the options name, on its device, the device, and the output's key.

    Raises:
        ValueError: If `--device` is none, or is not there; and as `gcfast.cli.models.load_model`.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'`--device` must be "cpu", "cuda" or "cuda:0", got {name!r}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`--device` must be one that is there, got {name!r} without CUDA")
    loaded = load_model(options.model, options.weights)
    loaded.module.to(device)
    key: int | str | None = options.output_key or loaded.output_key
    if isinstance(key, str) and key.isdecimal():
        key = int(key)  # a place in a tuple
    return loaded, device, key


def tell_unreadable(loader: ImageLoader) -> None:
    """Counts and lists the pictures that were skipped, on standard error."""
    unreadable = loader.unreadable
    if unreadable:
        print(f"unreadable pictures, skipped: {len(unreadable)}", file=sys.stderr)
        for name, reason in unreadable:
            print(f"  {name}: {reason}", file=sys.stderr)
