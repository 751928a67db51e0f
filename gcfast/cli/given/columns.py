"""The files of ``gcfast build --embeddings``, as columns."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gcfast._extras import import_faiss, needs_extra
from gcfast.builder.given.made_labels import KMEANS, NEIGHBORS
from gcfast.builder.given.vectors import own_ids
from gcfast.database.ids import repeated
from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

PICTURES = 256  # that are run for the mean activation and compared with their rows
PARQUET = ("embedding", "label", "path")


class GivenColumns(NamedTuple):
    """What :meth:`gcfast.Explainer.build_from_embeddings` takes."""

    embeddings: Any
    labels: Any
    paths: Sequence[str]  # of the pictures, in the order of the rows


def is_made(labels: Path | None) -> bool:
    """Whether ``--labels`` says how to go without."""
    return labels is not None and str(labels).partition(":")[0] in (NEIGHBORS, KMEANS)


def read_columns(options: argparse.Namespace) -> GivenColumns:
    """Read ``--embeddings``, ``--labels`` and ``--paths``.

    Raises:
        ValueError: another kind of file, missing columns, or rows without a label or a path.
        OSError: a file that cannot be read.
        MissingExtraError: FAISS or pyarrow is needed, and not installed.
    """
    file: Path = options.embeddings
    labels: Any = None
    paths: Sequence[str] | None = None
    numbers = None
    if file.suffix == ".npy":
        embeddings: Any = np.load(file, mmap_mode="r")
    elif file.suffix == ".parquet":
        embeddings, labels, paths = _parquet(file)
    elif file.suffix in (".index", ".faiss"):
        faiss = import_faiss("embeddings")
        if not file.is_file():
            raise FileNotFoundError(f"`embeddings` must be a file, {file} does not exist")
        try:
            embeddings = faiss.read_index(str(file))
        except RuntimeError as error:
            raise ValueError(
                f"`embeddings` must be a FAISS index, {file} cannot be read as one: {error}"
            ) from error
        numbers = own_ids(embeddings)
    else:
        raise ValueError(
            f"`embeddings` must be a file .npy, .parquet, .index or .faiss, got {file}"
        )
    if is_made(options.labels):
        labels = str(options.labels)
    elif options.labels is not None:
        labels, paths = _csv(options.labels, numbers)
    if options.paths is not None:
        paths = options.paths.read_text(encoding="utf-8").splitlines()
    if labels is None or paths is None:
        raise ValueError(
            f"`{'labels' if labels is None else 'paths'}` must be given with {file.name}, which "
            f"does not say {'the label' if labels is None else 'the path'} of each row"
        )
    return GivenColumns(embeddings, labels, paths)


def known_pictures(
    root: Path, paths: Sequence[str], preprocessing: Preprocessing, **reading: Any
) -> ImageLoader:
    """Return those of the rows' pictures that are there, evenly spread, PICTURES at most.

    Args:
        root: the folder of the pictures.
        paths: of the rows, relative to it or absolute.
        preprocessing: of the pictures.
        **reading: as for :class:`gcfast.images.folder.ImageLoader`.

    Raises:
        ValueError: fewer than two of them are there.
    """
    # In an order in which any beginning is spread over all.
    order = np.random.default_rng(0).permutation(len(paths))
    found = []
    for row in order.tolist():
        if (root / paths[row]).is_file():
            found.append(row)
        if len(found) == PICTURES:
            break
    if len(found) < 2:
        raise ValueError(
            f"`images` must hold some of the pictures that were embedded, at least 2 of the "
            f"{len(paths)} that are named, {root} has {len(found)} of them"
        )
    names = [paths[row] for row in sorted(found)]
    return ImageLoader(
        [str(root / name) for name in names],
        names,
        [""] * len(names),
        preprocessing=preprocessing,
        **reading,
    )


def _csv(file: Path, numbers: Any) -> tuple[Any, list[str]]:
    """Return (labels, paths) of a CSV, in the order of the rows; a mapping by an index's ids."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        needed = ("path", "label") if numbers is None else ("path", "label", "id")
        columns = reader.fieldnames or []
        if not set(needed) <= set(columns):
            raise ValueError(
                f"`labels` must have the columns {', '.join(needed)}, {file} has "
                f"{', '.join(columns) or 'no header'}"
            )
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        if not all(row[name] for name in needed):
            raise ValueError(
                f"`labels` must give {', '.join(needed)} in every line, line {number} of {file} "
                "lacks one"
            )
    if numbers is None:
        return [row["label"] for row in rows], [row["path"] for row in rows]
    for number, row in enumerate(rows, 2):
        if not re.fullmatch(r"-?\d+", row["id"].strip()):
            raise ValueError(
                f"`labels` must have whole numbers as id, line {number} of {file} has {row['id']!r}"
            )
    by_id = {int(row["id"]): row for row in rows}
    if (twice := repeated([str(int(row["id"])) for row in rows])) is not None:
        raise ValueError(f"`labels` must have one line for each id, {file} has {twice[0]} twice")
    missing = [number for number in numbers if number not in by_id]
    if missing:
        raise ValueError(
            f"`labels` must have a line for every id of the index, {file} lacks {missing[0]}"
        )
    return (
        {number: row["label"] for number, row in by_id.items()},
        [by_id[number]["path"] for number in numbers],
    )


def _parquet(file: Path) -> tuple[Any, list[Any] | None, list[str] | None]:
    """Return (embeddings [N, D], labels, paths) of a Parquet file; None for a missing column."""
    with needs_extra("parquet", "gcfast build --embeddings FILE.parquet"):
        from pyarrow import compute, parquet
    names = parquet.read_schema(file).names
    if PARQUET[0] not in names:
        raise ValueError(
            f"`embeddings` must have the column embedding, {file} has {', '.join(names)}"
        )
    table = parquet.read_table(file, columns=[name for name in PARQUET if name in names])
    column = table.column(PARQUET[0]).combine_chunks()
    values = np.asarray(column.flatten())
    sizes = set(compute.list_value_length(column).to_pylist())
    if len(sizes) != 1 or column.null_count:
        raise ValueError(
            f"`embeddings` must have as many numbers in every row of {file}, and no row without"
        )
    labels, paths = (
        table.column(name).to_pylist() if name in names else None for name in PARQUET[1:]
    )
    return values.reshape(len(column), -1), labels, paths
