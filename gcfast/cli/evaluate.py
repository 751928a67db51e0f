"""The command ``gcfast evaluate``: the paper's tables and curves on annotated pictures."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from gcfast.cli.inputs import open_database, reading
from gcfast.cli.outputs import check_folder, tell_left_out
from gcfast.database.database import Database
from gcfast.evaluation.beyond import RANKED_IMAGES
from gcfast.evaluation.datasets import ScoredLoader, Truth, labelled_loader, open_dataset
from gcfast.evaluation.examples import FILES, draw_examples
from gcfast.evaluation.measure import AnnotationScore, Compress, evaluate
from gcfast.evaluation.report import OUTPUTS, draw, write_csv, write_tables
from gcfast.evaluation.ways import Trained
from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

_SAME_EMBEDDING = 1e-2  # as a build's second pass allows


def evaluate_database(options: argparse.Namespace) -> None:
    """Measure what the options name, print the table and write the rest.

    Raises:
        FileNotFoundError: the data lack a file of their layout, or a picture is gone.
        FileExistsError: the output folder is not empty and ``--force`` is not given.
        ValueError: the training pictures are not those that the database was built from; it was
            built with ``--transform``.
        GcfastError: the model or the database cannot be used, or (``--strict``) an image not.
    """
    check_folder(options.out, options.force, (*OUTPUTS, *FILES))
    test = open_dataset(options.data, "test")
    opened = open_database(options, refine=options.refine)
    if opened.preprocessing.transform is not None:
        raise ValueError(
            f"`--database` must not be built with --transform {opened.preprocessing.transform}: it "
            "does not say which part of a picture it keeps, so annotations cannot be placed; build "
            "with --size, --fit, --mean and --std"
        )
    train, from_database, left_out = _training(
        options, opened.preprocessing, opened.database, opened.images
    )
    loader = ScoredLoader(test, opened.preprocessing, **reading(options))
    started = time.perf_counter()
    try:
        measured = evaluate(
            opened.explainer,
            train,
            _on_device(loader, opened.device),
            AnnotationScore(),
            labels=lambda truth: truth.labels,
            localised=lambda truth: truth.localised,
            objects=(lambda truth, _: truth.masks) if test.has_masks else None,
            ranked=None if options.thorough else RANKED_IMAGES,
            compress=compressor(),
            total=len(test.samples),
            seed=options.seed,
            thorough=options.thorough,
            check=lambda trained: check_rows(trained, opened.database, from_database),
            progress=True,
        )
    finally:
        tell_left_out("training pictures, left out", [*left_out, *train.unreadable])
        tell_left_out("images, skipped", loader.skipped)
        if test.single:
            print(
                f"classes of one image, without triplets of their own: {len(test.single)}, "
                + ", ".join(test.single),
                file=sys.stderr,
            )
    seconds = time.perf_counter() - started
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "skipped.csv", ["image", "reason"], loader.skipped)
    title = f"{test.name}, {measured.images} images"
    text = write_tables(measured, options.out, title, seed=options.seed)
    print(text)
    for name in draw(measured, options.out, test.name, seed=options.seed):
        print(options.out / name)
    for name in draw_examples(opened.explainer, loader, opened.images, options.out):
        print(options.out / name)
    print(f"{measured.images} images scored in {seconds:.0f} s, flat maps: {measured.flat}")


def compressor() -> Compress | None:
    """Return ``Database.compress``, or None without FAISS, which leaves its sweep out."""
    return Database.compress if find_spec("faiss") else None


def check_rows(trained: Trained, database: Database, from_database: bool) -> None:
    """Check that the training pictures are those that the database was built from.

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
    """Open the pictures that the variants of the table are built from.

    Returns:
        (loader, whether the database said where they are, what the reader left out and why).
    """
    if options.train is not None:
        found = open_dataset(options.train, "train")
        return labelled_loader(found, preprocessing, **reading(options)), False, found.skipped
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
            f"pictures that the database left out; they are not used as negatives here: {left_out}",
            file=sys.stderr,
        )
    labels = [database.label_name(label) for label in database.labels.tolist()]
    loader = ImageLoader(
        files, database.ids, labels, preprocessing=preprocessing, **reading(options)
    )
    return loader, True, []


def _on_device(loader: ScoredLoader, device: torch.device) -> Iterator[tuple[Tensor, Truth]]:
    for images, truth in loader:
        yield images.to(device), truth
