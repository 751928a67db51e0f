"""The commands on an existing database: ``gcfast compress``, ``gcfast index``, ``gcfast info``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from gcfast.database.database import Database
from gcfast.database.write import check_target


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
    database.build_index(options.factory)
    size = database.manifest["index"]["bytes"]
    print(f"{database.index_path}: {options.factory} of {len(database):,} rows, {size:,} bytes")


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
        "channels kept": database.m,
        "bytes": size,
    }
    if options.json:
        print(json.dumps(facts | {"manifest": database.manifest}, indent=2, ensure_ascii=False))
        return
    for name, value in (facts | _flat(database.manifest)).items():
        print(f"{name:<28} {value:,}" if type(value) is int else f"{name:<28} {value}")


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
