"""Pictures, and one cluster for all tests: it takes long to start."""

import gc
import tempfile
import warnings

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """132 pictures of four classes, one of them unreadable, and one of a class of its own."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for kind in range(4):
        (root / f"class{kind}").mkdir()
        for number in range(33):
            pixels = random.integers(0, 256, (20, 24, 3)).astype(np.uint8)
            pixels[..., kind % 3] //= 2
            pixels[4 * kind : 4 * kind + 4] = 220
            Image.fromarray(pixels).save(root / f"class{kind}" / f"{number:02}.png")
    (root / "alone").mkdir()
    Image.fromarray(pixels).save(root / "alone" / "0.png")
    (root / "class1" / "05.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="session")
def on_ray():
    """A cluster of two CPUs."""
    # Not below pytest's folder: the path of a socket of Ray's has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray_case import cluster

        with cluster(folder):
            yield
        gc.collect()
