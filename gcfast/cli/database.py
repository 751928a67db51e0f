"""The commands on an existing database: compress, index, remove, relabel, merge and info."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gcfast.database.database import Database
from gcfast.database.write import check_target

_FEW_POINTS = re.compile(
    r"clustering (\d+) points to (\d+) centroids: please provide at least (\d+)"
)


def compress_database(options: argparse.Namespace) -> None:
    """Compress a database and tell the sizes.

    Raises:
        FileExistsError: as :func:`gcfast.database.write.check_target`.
        ValueError: there are more centers than rows.
        GcfastError: there is no database, or no FAISS.
    """
    check_target(
        options.out, overwrite=options.force, name="--out", remedies=("--force", "--resume")
    )
    whole = Database.open(options.database)
    with _faiss_in_words():
        small = whole.compress(options.centers, seed=options.seed, iterations=options.iterations)
    small.save(options.out, overwrite=options.force, storage=options.storage)
    before, after = (
        sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith("rows-"))
        for folder in (options.database, options.out)
    )
    print(
        f"{options.out}: {len(whole):,} rows in {before:,} bytes became {len(small):,} centers in "
        f"{after:,}, 1/{before / after:.0f}"
    )


def index_database(options: argparse.Namespace) -> None:
    """Make and store an index and tell its size.

    Raises:
        ValueError: no factory string, or one that cannot be trained on so few rows.
        GcfastError: there is no database, or no FAISS.
    """
    database = Database.open(options.database)
    with _faiss_in_words():
        database.build_index(options.factory)
    size = database.manifest["index"]["bytes"]
    print(f"{database.index_path}: {options.factory} of {len(database):,} rows, {size:,} bytes")


def remove_rows(options: argparse.Namespace) -> None:
    """Take rows out of a database and tell how many stay.

    Raises:
        ValueError: no ids, one twice, one that no row has, or all of them.
        GcfastError: there is no database, or another process writes to it.
    """
    ids = list(options.ids)
    if options.ids_from is not None:
        text = options.ids_from.read_text(encoding="utf-8", errors="surrogateescape")
        ids += [line for line in text.splitlines() if line]
    database = Database.open(options.database)
    changed = _told(lambda: database.remove(ids))
    print(f"{options.database}: {len(database) - len(changed)} rows removed, {len(changed)} stay")


def relabel_rows(options: argparse.Namespace) -> None:
    """Give rows other labels and tell how many.

    Raises:
        ValueError: no CSV with the columns path and label; an id twice, or one that no row has.
        GcfastError: there is no database, or another process writes to it.
    """
    database = Database.open(options.database)
    kind: Callable[[str], Any] = str
    if not database.class_names:
        kind = float if database.labels.is_floating_point() else int
    labels: dict[str, Any] = {}
    with options.labels.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"`--labels` must have the columns path and label, {options.labels} has "
                f"{', '.join(reader.fieldnames or ()) or 'none'}"
            )
        for line in reader:
            if line["path"] in labels:
                raise ValueError(
                    f"`--labels` must name each picture once, got {line['path']} twice"
                )
            try:
                labels[line["path"]] = kind(line["label"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"`--labels` must give numbers, as the database's labels are, got "
                    f"{line['label']!r} for {line['path']}"
                ) from None
    changed = _told(lambda: database.relabel(labels))
    new = changed.class_names[len(database.class_names) :]
    print(f"{options.database}: {len(labels)} rows relabelled, {len(new)} new classes")


def merge_databases(options: argparse.Namespace) -> None:
    """Join databases and tell how many rows they have together.

    Raises:
        FileExistsError: as :func:`gcfast.database.write.check_target`.
        ValueError: fewer than two, of other settings, or with an id in common.
        GcfastError: there is no database, or one of another model.
    """
    check_target(
        options.out, overwrite=options.force, name="--out", remedies=("--force", "--resume")
    )
    parts = [Database.open(path) for path in options.databases]
    merged = Database.merge(
        *parts, out=options.out, prefixes=options.prefixes, overwrite=options.force
    )
    rows = " + ".join(f"{len(part):,}" for part in parts)
    print(f"{options.out}: {rows} = {len(merged):,} rows")


def _told(change: Callable[[], Database]) -> Database:
    """Make a change; its warnings go to standard error as lines."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        changed = change()
    for warning in said:
        print(f"gcfast: {warning.message}", file=sys.stderr)
    return changed


def describe_database(options: argparse.Namespace) -> None:
    """Print what a database holds; reads no weights unless its checksums are compared.

    Raises:
        GcfastError: there is no database, or it is damaged.
    """
    database = Database.open(options.database, verify=options.verify)
    size = sum(f.stat().st_size for f in options.database.iterdir() if f.is_file())
    facts: dict[str, Any] = {
        "database": os.fspath(options.database),
        "rows": len(database),
        "distinct labels" if database.labels.is_floating_point() else "classes": len(
            set(database.labels.tolist())
        ),
        "embedding": database.dim,
        **(
            {"channels kept": database.m}
            if database.m
            else {}
            if database.classes is None
            else {"class proxies": len(database.classes.labels)}
        ),
        "bytes": size,
    }
    if options.json:
        print(json.dumps(facts | {"manifest": database.manifest}, indent=2, ensure_ascii=False))
        return
    for name, value in (facts | _flat(database.manifest)).items():
        print(f"{name:<28} {value:,}" if type(value) is int else f"{name:<28} {value}")


@contextlib.contextmanager
def _faiss_in_words() -> Iterator[None]:
    """Catch what FAISS's C++ writes to standard error, and say its warnings in one line each."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        real = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines()
    few = [found.groups() for line in lines if (found := _FEW_POINTS.search(line))]
    if few:
        rows, centers, wanted = max(few, key=lambda found: int(found[2]))
        print(
            f"warning: few rows for {int(centers):,} centers: {int(rows):,}, FAISS advises "
            f"{int(wanted):,} or more",
            file=sys.stderr,
        )
    for line in lines:
        if not _FEW_POINTS.search(line):
            print(line, file=sys.stderr)


def _flat(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the manifest to values by dotted name; long lists become their length."""
    facts: dict[str, Any] = {}
    for key, value in manifest.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            facts |= _flat(value, f"{name}.")
        elif isinstance(value, list) and (len(value) > 8 or any(map(_nested, value))):
            facts[name] = f"{len(value)} values"
        elif isinstance(value, list):
            facts[name] = ", ".join(map(str, value))
        else:
            facts[name] = value
    return facts


def _nested(value: object) -> bool:
    return isinstance(value, (list, Mapping))
