"""The command `gcfast evaluate`: the paper's tables and curves on annotated pictures."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gcfast
from gcfast.cli.build import load_network
from gcfast.cli.explain import check_folder, prepared
from gcfast.database.database import Database
from gcfast.database.manifest import read_manifest
from gcfast.evaluation.datasets import ScoredLoader, ScoredSet, Truth, labelled_loader, open_dataset
from gcfast.evaluation.evaluate import AnnotationScore, Compress, evaluate
from gcfast.evaluation.examples import FILES, draw_examples
from gcfast.evaluation.report import OUTPUTS, draw, write_tables
from gcfast.evaluation.ways import Trained
from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

_SAME_EMBEDDING = 1e-2  # as a build's second pass allows


def evaluate_database(options: argparse.Namespace) -> int:
    """Measures what the options name, prints the table and writes the rest.

    Returns:
        The exit status.

    Raises:
        FileNotFoundError: If the data lack a file of their layout, or a picture is gone.
        FileExistsError: If the output folder is not empty and `--force` is not given.
        ValueError: If the training pictures are not those that the database was built from.
        GcfastError: If the model or the database cannot be used, or (`--strict`) an image not.
    """
    check_folder(options.out, options.force, (*OUTPUTS, *FILES))
    test = open_dataset(options.data, "test")
    network, device, output_key = load_network(options)
    preprocessing, root, reshape = prepared(read_manifest(options.database), options.images)
    settings: dict[str, Any] = {} if options.output_key is None else {"output_key": output_key}
    explainer = gcfast.load(options.database, network.module, reshape=reshape, **settings)
    database = explainer.database
    assert database is not None
    train, from_database, left_out = _training(options, preprocessing, database, root)
    loader = ScoredLoader(
        test,
        preprocessing,
        batch_size=options.batch_size,
        workers=options.workers,
        strict=options.strict,
    )
    started = time.perf_counter()
    try:
        measured = evaluate(
            explainer,
            train,
            _on_device(loader, device),
            AnnotationScore(),
            labels=lambda truth: truth.labels,
            localised=lambda truth: truth.localised,
            compress=compressor(),
            total=len(test.samples),
            seed=options.seed,
            thorough=options.thorough,
            check=lambda trained: check_rows(trained, database, from_database),
            progress=sys.stderr.isatty(),
        )
    finally:
        _tell_skipped(loader, test, [*left_out, *train.unreadable])
    seconds = time.perf_counter() - started
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "skipped.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "reason"])
        table.writerows(loader.skipped)
    title = f"{test.name}, {measured.images} images"
    text = write_tables(measured, options.out, title, seed=options.seed)
    print(text)
    for name in draw(measured, options.out, test.name, seed=options.seed):
        print(options.out / name)
    for name in draw_examples(explainer, loader, root, options.out):
        print(options.out / name)
    print(f"{measured.images} images scored in {seconds:.0f} s, flat maps: {measured.flat}")
    return 0


def compressor() -> Compress | None:
    """``Database.compress``; None, which leaves its sweep out, where FAISS is not installed."""
    return Database.compress if find_spec("faiss") else None


def check_rows(trained: Trained, database: Database, from_database: bool) -> None:
    """Whether the training pictures are those that the database was built from.

    Raises:
        ValueError: other pictures, another number of them, or other embeddings.
    """
    where = "`--images`" if from_database else "`--train`"
    ours = trained.database
    if ours.ids != database.ids:
        pairs = zip(ours.ids, database.ids, strict=False)
        row = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(database)))
        got = [db.ids[row] if row < len(db) else "nothing" for db in (ours, database)]
        raise ValueError(
            f"{where} must give the {len(database)} pictures that the database was built from: "
            f"row {row} is {got[0]}, in the database {got[1]}"
        )
    moved = (ours.embeddings - database.embeddings).norm(dim=1)
    if bool((moved > _SAME_EMBEDDING * database.embeddings.norm(dim=1)).any()):
        row = int(moved.argmax())
        raise ValueError(
            f"{where} must give the pictures that the database was built from: "
            f"the embedding of {ours.ids[row]} differs"
        )


def _training(
    options: argparse.Namespace,
    preprocessing: Preprocessing,
    database: Database,
    root: Path | None,
) -> tuple[ImageLoader, bool, list[tuple[str, str]]]:
    """The pictures that the variants of the table are built from.

    Returns:
        (loader, whether the database said where they are, what the reader left out and why).
    """
    common = {
        "batch_size": options.batch_size,
        "workers": options.workers,
        "strict": options.strict,
    }
    if options.train is not None:
        found = open_dataset(options.train, "train")
        return labelled_loader(found, preprocessing, **common), False, found.skipped
    if root is None:
        raise ValueError(
            "`--train` must name the pictures that the database was built from, which it does not "
            "say itself"
        )
    files = [root / name for name in database.ids]
    missing = [os.fspath(f) for f in files if not f.is_file()]
    if missing:
        raise FileNotFoundError(
            f"`--images` must be where the database's pictures are, {len(missing)} of {len(files)} "
            f"are missing, the first is {missing[0]}"
        )
    left_out = database.report["images"] - len(database)
    if left_out:
        print(
            f"pictures that the database left out, and that serve as no negatives here: {left_out}",
            file=sys.stderr,
        )
    labels = [database.label_name(label) for label in database.labels.tolist()]
    loader = ImageLoader(files, database.ids, labels, preprocessing=preprocessing, **common)
    return loader, True, []


def _on_device(loader: ScoredLoader, device: torch.device) -> Iterator[tuple[Tensor, Truth]]:
    for images, truth in loader:
        yield images.to(device), truth


def _tell_skipped(loader: ScoredLoader, test: ScoredSet, train: list[tuple[str, str]]) -> None:
    """Counts and lists what was left out, on standard error."""
    for what, listed in (
        ("training pictures, left out", train),
        ("images, skipped", loader.skipped),
    ):
        if listed:
            print(f"{what}: {len(listed)}", file=sys.stderr)
            for name, reason in listed:
                print(f"  {name}: {reason}", file=sys.stderr)
    if test.single:
        print(
            f"classes of one image, without triplets of their own: {len(test.single)}, "
            + ", ".join(test.single),
            file=sys.stderr,
        )
