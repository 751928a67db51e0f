"""The commands ``gcfast build`` and ``gcfast layers``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gcfast
from gcfast.cli.given.columns import GivenColumns, is_made, known_pictures, read_columns
from gcfast.cli.inputs import labelled_pictures, load_network, reading, stated_preprocessing
from gcfast.cli.on_ray.commands import build_on_ray
from gcfast.cli.outputs import tell_doubts, tell_left_out
from gcfast.database.write import check_target
from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

# What the counts of a build mean.
_COUNTS = {
    "skipped_single": "left out, the only picture of their class",
    "skipped_no_triplet": "left out, without a triplet of positive loss",
    "hardest_triplet": "without a triplet of positive loss, took their hardest one",
    "estimated_counts": "with an estimate for the number of their triplets",
    "zero_rows": "whose weights are all zero, so that their maps are empty",
    "zero_rows, proxy": "whose activations are all zero, which count for no class",
    "zero_rows, elementwise": "whose cotangents are all zero, so that their maps are empty",
}


def build_database(options: argparse.Namespace) -> None:
    """Build the database that the options describe and tell what was left out of it.

    Raises:
        FileExistsError: as :func:`gcfast.database.write.check_target`.
        ValueError: the options or the pictures do not fit each other or the model.
        GcfastError: the model cannot be used, or (``--strict``) a picture not read.
    """
    if options.margin is not None and options.objective != "triplet":
        raise ValueError(
            f"`--margin` must be left out with --objective {options.objective}, which has none"
        )
    # Before hours of work, not after.
    check_target(
        options.out,
        overwrite=options.force,
        resume=options.resume,
        name="--out",
        remedies=("--force", "--resume"),
    )

    given, images = None, None
    if options.embeddings is None:
        _refuse_without_embeddings(options)
        images = labelled_pictures(options)
    else:
        if options.resume:
            raise ValueError("`--resume` must be left out with --embeddings, which takes minutes")
        if options.ray:
            raise ValueError("`--ray` must be left out with --embeddings, which runs no pictures")
        given = read_columns(options)
    loaded, _, output_key = load_network(options)
    preprocessing = stated_preprocessing(options, loaded.preprocessing)
    root = Path(options.images).absolute()
    if images is not None:
        loader = images.loader(preprocessing, **reading(options))
    else:
        assert given is not None
        loader = known_pictures(root, given.paths, preprocessing, **reading(options))
    objectives: dict[str, Callable[[], gcfast.Objective]] = {
        "triplet": lambda: gcfast.TripletLoss(0.2 if options.margin is None else options.margin),
        "distance-difference": gcfast.DistanceDifference,
        "positive": lambda: gcfast.PairDistance("positive"),
        "negative": lambda: gcfast.PairDistance("negative"),
    }
    settings: dict[str, Any] = {
        "layer": options.layer,
        "objective": objectives[options.objective](),
        "method": options.method,
        "triplets": options.triplets,
        "channels": options.channels,
        "evidence": options.evidence,
        "l2_normalize": not options.no_l2_normalize,
        "on_no_triplet": options.on_no_triplet,
        "output_key": output_key,
        "reshape": None if options.tokens is None else gcfast.TokenGrid(prefix=options.tokens),
        "seed": options.seed,
    }
    explainer = gcfast.Explainer(loaded.module, **settings)
    # ``explain`` also needs the folder of the neighbors' pictures and how the layer's output is
    # read, which the database itself does not keep.
    kept = preprocessing.to_dict() | {"images": os.fspath(root), "tokens": options.tokens}
    common: dict[str, Any] = {
        "progress": True,
        "preprocessing": kept,
        "out": options.out,
        "overwrite": options.force,
        "storage": options.storage,
    }
    try:
        if options.ray:
            assert images is not None
            database = build_on_ray(options, images, loaded.module, preprocessing, kept, settings)
        elif given is None:
            database = explainer.build(loader, resume=options.resume, **common)
        else:
            database = _from_embeddings(explainer, options, given, loader, common)
    finally:
        # Also when the build fails: what was skipped may be why (only one class remains, say).
        tell_left_out("unreadable pictures, skipped", loader.unreadable)
        tell_doubts(loader.doubts)
    for name, count in database.report.items():
        if count and name not in ("images", "rows"):
            said = _COUNTS.get(f"{name}, {options.method}", _COUNTS.get(name, name))
            print(f"pictures {said}: {count}", file=sys.stderr)
    # A class of a single picture has no row.
    classes = len(set(database.labels.tolist()))
    there = classes if images is None else len(images.class_names)
    of_all = "" if classes == there else f" of {there}"
    made = database.made_labels
    kinds = f"{classes}{of_all} classes" if made is None else f"without labels ({made})"
    print(f"{options.out}: {len(database)} rows, {kinds}, layer {database.manifest['layer']}")


def _refuse_without_embeddings(options: argparse.Namespace) -> None:
    """Refuse what says nothing where all pictures are run."""
    for name in ("paths", "norms", "pooled"):
        if getattr(options, name) is not None:
            raise ValueError(f"`--{name}` must be left out without --embeddings, which it is of")
    if is_made(options.labels):
        raise ValueError(
            f"`--labels` must be a CSV without --embeddings, got {options.labels}: save the "
            "embeddings, and build from them"
        )


def _from_embeddings(
    explainer: gcfast.Explainer,
    options: argparse.Namespace,
    given: GivenColumns,
    loader: ImageLoader,
    common: dict[str, Any],
) -> gcfast.Database:
    """Build from embeddings, with those of their pictures that are there."""
    batches = list(loader)
    images = torch.cat([batch[0] for batch in batches])
    names = [name for batch in batches for name in batch[2]]
    columns: dict[str, Any] = {
        name: None if file is None else np.load(file, mmap_mode="r")
        for name, file in (("norms", options.norms), ("pooled", options.pooled))
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        database = explainer.build_from_embeddings(
            given.embeddings,
            given.labels,
            sample=images,
            check=(images, names),
            ids=given.paths,
            min_cosine=options.min_cosine,
            **columns,
            **common,
        )
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    lowest = database.manifest["from_embeddings"]["lowest_cosine"]
    print(
        f"pictures compared with their rows: {len(names)}, lowest cosine {lowest:.4f}",
        file=sys.stderr,
    )
    return database


def show_layers(options: argparse.Namespace) -> None:
    """Print the layers of a model that can be explained.

    Raises:
        ValueError, GcfastError: the model cannot be made or used.
    """
    loaded, device, output_key = load_network(options)
    preprocessing = loaded.preprocessing or Preprocessing()
    if options.size is not None:
        preprocessing = replace(preprocessing, size=tuple(options.size))
    height, width = preprocessing.shape
    # Noise, in which no two places are alike.
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    print(gcfast.layers(loaded.module, image.to(device), output_key=output_key))
