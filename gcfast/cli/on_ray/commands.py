"""Building and explaining picture files on a Ray cluster."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import gcfast.ray
from gcfast._extras import import_ray
from gcfast.cli.inputs import list_files, load_network
from gcfast.database.database import Database
from gcfast.images.folder import ImageFolder
from gcfast.images.preprocessing import Preprocessing


def build_on_ray(
    options: argparse.Namespace,
    images: ImageFolder,
    model: nn.Module,
    preprocessing: Preprocessing,
    kept: dict[str, Any],
    settings: dict[str, Any],
) -> Database:
    """Build the database that the options describe; see :func:`gcfast.ray.build`.

    Args:
        options: of ``gcfast build``.
        images: the pictures.
        model: the network.
        preprocessing: how pictures are prepared.
        kept: what the manifest keeps of it.
        settings: of :class:`gcfast.Explainer`.

    Raises:
        MissingExtraError, ValueError, GcfastError: as there.
    """
    _start(options)
    paths = [os.fspath(images.root / name) for name in images.ids]
    dataset = _files(paths, images.ids, label=images.labels, order=list(range(len(paths))))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        database = gcfast.ray.build(
            dataset,
            model.cpu(),
            options.out,
            preprocessing=preprocessing,
            order="order",
            batch_size=options.batch_size,
            strict=options.strict,
            kept=kept,
            storage=options.storage,
            resume=options.resume,
            overwrite=options.force,
            progress=True,
            **_work(options),
            **settings,
        )
    _tell(told)
    return database


def explain_on_ray(options: argparse.Namespace) -> None:
    """Explain the pictures that the options name; see :func:`gcfast.ray.explain`.

    Raises:
        ValueError: an option of overlays or the page, or ``--force``.
        MissingExtraError, FileExistsError, GcfastError: as there.
    """
    if options.force:
        raise ValueError(
            "`--force` must be left out with --ray, whose results are not replaced one by one: "
            "--resume adds what --out lacks, and without its folder a run starts over"
        )
    for name, default in options.of_pages.items():
        if getattr(options, name) != default:
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be left out with --ray, which writes maps, and "
                "neither overlays nor a page"
            )
    files = list_files(options.paths)
    network, _, output_key = load_network(options)
    _start(options)
    settings: dict[str, Any] = {} if options.output_key is None else {"output_key": output_key}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        written = gcfast.ray.explain(
            _files([os.fspath(Path(file).absolute()) for file in files], files),
            network.module.cpu(),
            options.database.absolute(),
            options.out,
            format=options.format,
            maps=options.maps,
            batch_size=options.batch_size,
            strict=options.strict,
            options={"center": options.center},
            resume=options.resume,
            progress=True,
            k=options.k,
            index=options.index,
            requery=options.requery,
            refine=options.refine,
            **_work(options),
            **settings,
        )
    _tell(told)
    for count, what in (
        (written.unreadable, "unreadable pictures, whose rows have an `error`"),
        (written.flat, "flat maps, no positive value"),
    ):
        if count:
            print(f"{what}: {count}", file=sys.stderr)
    print(f"{options.out}: {written.pictures} pictures, {written.new} of them in this run")


def _start(options: argparse.Namespace) -> None:
    """Join the cluster, or start one of this machine."""
    ray = import_ray("--ray")
    if not ray.is_initialized():
        address = options.ray_address or os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        # Given for a cluster that runs already it is an error.
        own = {} if address else {"include_dashboard": False}
        ray.init(address=address, **quiet, **own)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells every plan that it runs


def _work(options: argparse.Namespace) -> dict[str, Any]:
    """Return how the work is divided."""
    work: dict[str, Any] = {
        "actors": gcfast.ray.pool(options.actors, cpus=options.cpus, gpus=options.gpus)
    }
    return work | ({} if options.part_rows is None else {"part_rows": options.part_rows})


def _files(paths: list[str], ids: list[str], **columns: list[Any]) -> Any:
    import pyarrow as pa

    table = pa.table(
        {"image": list(paths), "id": list(ids)} | {k: list(columns[k]) for k in columns}
    )
    return import_ray("--ray").data.from_arrow(table)


def _tell(told: Sequence[warnings.WarningMessage]) -> None:
    for warning in told:
        if issubclass(warning.category, UserWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
