"""The arguments of ``gcfast build --embeddings``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gcfast.builder.given.sample import MIN_COSINE


def add_embeddings(build: argparse.ArgumentParser) -> None:
    """Add the group of arguments to the command ``build``."""
    given = build.add_argument_group(
        "embeddings that exist already",
        "Of --images only some pictures are then run: up to 256 that --labels names and that are "
        "there. They show that the embeddings are this model's.",
    )
    given.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help=".npy [N, D], .parquet (columns embedding, label and path) or an .index or .faiss of "
        "FAISS; --labels then has a line for each row, in order, and for an index with ids of its "
        'own a column id; or it is "neighbors", "neighbors:3" or "kmeans:1000" where there are '
        "no labels, and the rows' paths are in --paths",
    )
    given.add_argument(
        "--paths", type=Path, metavar="FILE", help="a line for each row: its picture's path"
    )
    given.add_argument(
        "--norms", type=Path, metavar="FILE", help=".npy [N]: lengths before normalization"
    )
    given.add_argument(
        "--pooled",
        type=Path,
        metavar="FILE",
        help=".npy [N, C]: each picture's activations at the layer, averaged; for gradcam++, proxy",
    )
    given.add_argument(
        "--min-cosine",
        type=float,
        default=MIN_COSINE,
        metavar="COS",
        help="of a picture's embedding and its row, both less the mean of all rows, at least",
    )
