"""A small Ray cluster of this machine that writes nowhere else, and what the tests give it."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager

# Before Ray is imported, and for its workers: nothing is reported to anyone.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
import torch
from networks import AFFINE_HEADS, OTHER_HEADS, Net

from gcfast.images.folder import ImageFolder
from gcfast.images.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(size=16)
BATCH = 8
SETTINGS = {"layer": "backbone", "channels": 5, "triplets": 7}


@contextmanager
def cluster(folder, cpus=2) -> Iterator[None]:
    """A cluster whose temporary files are in a folder, for as long as it is used."""
    # Workers import from the driver's folder first: at the root that would be the source tree.
    with chdir(folder):
        ray.init(
            num_cpus=cpus,
            object_store_memory=128 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


def model(head="linear"):
    torch.manual_seed(0)
    return Net((AFFINE_HEADS | OTHER_HEADS)[head](12))


def files(root, *, backwards=False):
    """A data set of the pictures below a folder, by their paths, in blocks of odd sizes."""
    folder = ImageFolder(root)
    rows = [
        {"image": str(folder.root / name), "id": name, "label": label}
        for name, label in zip(folder.ids, folder.labels, strict=True)
    ]
    rows = rows[::-1] if backwards else rows
    return ray.data.from_items(rows, override_num_blocks=3)


def same(one, two):
    """Whether two databases are the same: the manifest has the checksum of every file."""
    return json.loads((one / "manifest.json").read_text()) == json.loads(
        (two / "manifest.json").read_text()
    )
