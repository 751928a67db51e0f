"""The commands on a database that is there: `gcfast compress`, `gcfast index`."""

from __future__ import annotations

import argparse

from gcfast.database.database import Database
from gcfast.database.manifest import check_target


def compress_database(options: argparse.Namespace) -> int:
    """Compresses a database and tells the sizes.

    Returns:
        The exit status.

    Raises:
        FileExistsError: As `gcfast.database.manifest.check_target`.
        ValueError: If there are more centres than rows.
        GcfastError: If there is no database, or no FAISS.
    """
    check_target(options.out, options.force, name="--out", remedy="--force")
    whole = Database.open(options.database)
    small = whole.compress(options.centers, seed=options.seed, iterations=options.iterations)
    small.save(options.out, overwrite=options.force, storage=options.storage)
    before, after = (
        sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith("rows-"))
        for folder in (options.database, options.out)
    )
    print(
        f"{options.out}: {len(whole):,} rows in {before:,} bytes became {len(small):,} centres in "
        f"{after:,}, 1/{before / after:.0f}"
    )
    return 0


def index_database(options: argparse.Namespace) -> int:
    """Makes and stores an index and tells its size.

    Returns:
        The exit status.

    Raises:
        ValueError: If the factory string is none, or cannot be trained on so few rows.
        GcfastError: If there is no database, or no FAISS.
    """
    database = Database.open(options.database)
    database.build_index(options.factory)
    size = database.manifest["index"]["bytes"]
    print(f"{database.index_path}: {options.factory} of {len(database):,} rows, {size:,} bytes")
    return 0
