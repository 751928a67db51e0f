"""Maps laid back on the whole picture."""

import numpy as np
import pytest
from PIL import Image

from gcfast.images import overlay, overlay_whole, placed
from gcfast.images.preprocessing import Preprocessing

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))


def dot(shape, v, u):
    """A map with one hot spot around row v and column u, zero elsewhere."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.exp(-((y - v) ** 2 + (x - u) ** 2) / 4).astype(np.float32)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_heat_is_where_the_window_says(fit):
    """The hottest pixel of the map changes the picture most where the view had it."""
    ours = Preprocessing((32, 32), fit)
    x0, y0, x1, y1 = window = ours.window(PICTURE.size)
    white = Image.new("RGB", PICTURE.size, "white")
    whole = np.asarray(overlay_whole(white, dot((32, 32), 15, 20), window)).astype(int)
    colored = np.ptp(whole, axis=-1)
    y, x = np.unravel_index(colored.argmax(), colored.shape)
    want = (y0 + 15.5 * (y1 - y0) / 32, x0 + 20.5 * (x1 - x0) / 32)
    np.testing.assert_allclose((y + 0.5, x + 0.5), want, atol=max(x1 - x0, y1 - y0) / 32)


def test_what_was_not_seen_is_dimmed_and_grey_and_the_rest_is_as_it_was():
    whole = np.asarray(overlay_whole(PICTURE, np.zeros((32, 32), np.float32), (20, 0, 80, 60)))
    before = np.asarray(PICTURE)
    np.testing.assert_array_equal(whole[:, 20:80], before[:, 20:80])
    outside = np.concatenate([whole[:, :20], whole[:, 80:]], axis=1)
    assert np.ptp(outside, axis=-1).max() == 0
    grey = np.asarray(PICTURE.convert("L"))
    np.testing.assert_allclose(whole[:, :20, 0], 0.4 * grey[:, :20], atol=1)


def test_strips_give_what_one_piece_gives(monkeypatch):
    heat = np.random.default_rng(1).random((32, 32), dtype=np.float32)
    one = np.asarray(overlay_whole(PICTURE, heat, (20.5, 0, 80.5, 60))).astype(int)
    monkeypatch.setattr(placed, "_ROWS", 7)
    many = np.asarray(overlay_whole(PICTURE, heat, (20.5, 0, 80.5, 60))).astype(int)
    assert abs(one - many).max() <= 1


def test_the_same_size_is_the_plain_overlay():
    heat = np.random.default_rng(1).random((60, 100), dtype=np.float32)
    whole = np.asarray(overlay_whole(PICTURE, heat, (0, 0, 100, 60))).astype(int)
    assert abs(whole - overlay(np.asarray(PICTURE), heat)).max() <= 1


def test_a_window_outside_is_refused():
    with pytest.raises(ValueError, match="`window` must be part of the 100 x 60 picture, got"):
        overlay_whole(PICTURE, np.zeros((3, 3), np.float32), (100, 0, 160, 60))
