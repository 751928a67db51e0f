"""Picture files to batches: every mode, unreadable files, folders and label lists."""

import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from gcfast.errors import GcfastError
from gcfast.images.folder import (
    ImageDataset,
    ImageFolder,
    ImageLoader,
    Preprocessing,
    UnreadableImageError,
    find_images,
)
from gcfast.images.preprocessing import decode

# Python 3.12 and later warn of any fork of a process with threads, which PyTorch always has.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

RAW = Preprocessing(size=8, mean=(0, 0, 0), std=(1, 1, 1))


def solid(path, color=(200, 40, 90), size=(30, 20), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **save)
    return path


def tree(root, classes=("cat", "dog"), each=3):
    for c, name in enumerate(classes):
        for i in range(each):
            solid(root / name / f"{i}.png", (20 * c + i, 60, 80))
    return root


# Decoding


@pytest.mark.parametrize(
    ("mode", "color", "want"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
    ],
)
def test_png_modes(tmp_path, mode, color, want):
    path = tmp_path / "a.png"
    Image.new(mode, (9, 7), color).save(path)
    picture = decode(path)
    assert (picture.mode, picture.size) == ("RGB", (9, 7))
    assert picture.getpixel((4, 3)) == want


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png"))[0, :, 0], [0, 100, 255])


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 100.0, 200.0]], np.float32), [0, 100, 200]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[5, 100, 255]], np.int32), [5, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[0, 100000, 200000]], np.int32), [0, 128, 255]),
        (np.full((1, 3), -7.0, np.float32), [0, 0, 0]),
    ],
)
def test_tiff_of_floats_and_integers(tmp_path, values, want):
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif"))[0, :, 0], want)


def test_palette_with_transparency_is_laid_over_white(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    picture.putpixel((0, 0), 2)
    picture.save(tmp_path / "a.png", transparency=1)
    assert decode(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (0, 200, 0)


def test_cmyk_and_lab(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(decode(tmp_path / "a.jpg").getpixel((5, 5)), (255, 0, 0), atol=6)
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "b.tif")
    np.testing.assert_allclose(decode(tmp_path / "b.tif").getpixel((1, 1)), (255, 255, 255), atol=3)


def test_rotation_in_exif_is_applied(tmp_path):
    picture = Image.new("RGB", (32, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 16))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the white half is on top
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = decode(tmp_path / "a.jpg")
    assert turned.size == (16, 32)
    assert turned.getpixel((8, 4))[0] > 240
    assert turned.getpixel((8, 28))[0] < 15


def test_big_jpegs_decode_small(tmp_path):
    solid(tmp_path / "a.jpg", size=(1600, 1200))
    assert decode(tmp_path / "a.jpg", at_least=100).size == (200, 150)
    assert decode(tmp_path / "a.jpg").size == (1600, 1200)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), c) for c in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "a.gif").getpixel((2, 2)) == (250, 0, 0)


def test_postscript_is_never_run(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    solid(tmp_path / "a.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    loader = ImageLoader([tmp_path / "a.png"], ["a"], preprocessing=RAW)
    with pytest.raises(UnreadableImageError, match="DecompressionBombError"):
        list(loader)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow only warns up to twice the limit
    assert decode(tmp_path / "a.png").size == (50, 50)


# Preprocessing


def test_crop_keeps_the_centre_and_stretch_keeps_all(tmp_path):
    picture = Image.new("RGB", (48, 16), (255, 0, 0))
    picture.paste((0, 255, 0), (16, 0, 32, 16))  # green centre square
    picture.save(tmp_path / "a.png")
    crop = RAW.view(tmp_path / "a.png")
    # The outermost columns touch the red beside the crop: the filter reaches over its edge.
    np.testing.assert_array_equal(crop[:, 1:-1], np.broadcast_to([0, 255, 0], (8, 6, 3)))
    stretch = Preprocessing(size=9, resize="stretch").view(tmp_path / "a.png")
    np.testing.assert_array_equal(stretch[4, [0, 4, 8]], [[255, 0, 0], [0, 255, 0], [255, 0, 0]])


def test_a_very_long_picture_is_cheap(tmp_path):
    solid(tmp_path / "a.png", size=(20000, 1))
    assert Preprocessing(size=224).view(tmp_path / "a.png").shape == (224, 224, 3)


def test_downscaling_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    view = RAW.view(tmp_path / "a.png")
    assert (abs(view[:, 1:-1].astype(int) - 127) < 4).all()  # not one stripe or the other


def test_normalisation_by_hand_and_back():
    views = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    preprocessing = Preprocessing(size=8)
    images = preprocessing.normalize(views)
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images[1, 2, 3, 4].item() == pytest.approx((views[1, 3, 4, 2] / 255 - 0.406) / 0.225)
    np.testing.assert_array_equal(preprocessing.pictures(images), views.numpy())


def test_settings_survive_json():
    settings = Preprocessing(size=96, resize="stretch", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    text = json.dumps(settings.to_dict() | {"other": 1})
    assert Preprocessing.from_dict(json.loads(text)) == settings


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"size": 0}, ValueError, "`size` must be at least 1, got 0"),
        ({"size": 2.5}, TypeError, "`size` must be an int or two, got float"),
        ({"size": (1, 2, 3)}, ValueError, r"`size` must be \(H, W\) or one side of a square"),
        ({"resize": "fill"}, ValueError, '`resize` must be "crop", "pad" or "stretch"'),
        ({"interpolation": "cubic"}, ValueError, "`interpolation` must be one of nearest, box"),
        ({"crop_pct": 0}, ValueError, "`crop_pct` must be above 0 and at most 1, got 0"),
        ({"crop_pct": 1.1}, ValueError, "`crop_pct` must be above 0 and at most 1, got 1.1"),
        ({"depth": 7}, ValueError, '`depth` must be "auto", "range" or 8 to 16, got 7'),
        ({"transform": "torch"}, ValueError, "`transform` must be package.module:function"),
        ({"mean": (1, 2)}, ValueError, r"`mean` must be three finite numbers, got \(1, 2\)"),
        ({"mean": None}, ValueError, "`mean` must be three finite numbers, got None"),
        ({"std": (1, 1, float("nan"))}, ValueError, "`std` must be three finite numbers"),
        ({"std": (1, 1, 0)}, ValueError, "`std` must be positive"),
    ],
)
def test_settings_are_checked(settings, error, words):
    with pytest.raises(error, match=words):
        Preprocessing(**settings)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="got none for mean, std"):
        Preprocessing.from_dict({"size": 3, "resize": "crop"})


# Finding


def test_finds_pictures_in_order_and_leaves_the_rest(tmp_path):
    for name in ("b/2.JPG", "b/10.jpeg", "a/x/1.png", "a/.hidden.png", ".git/3.png"):
        solid(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert find_images(tmp_path) == ["a/x/1.png", "b/10.jpeg", "b/2.JPG"]


def test_a_link_in_a_circle_ends(tmp_path):
    solid(tmp_path / "a" / "1.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert find_images(tmp_path) == ["a/1.png"]


def test_folder_for_each_class(tmp_path):
    solid(tmp_path / "dog" / "deep" / "z.png")
    solid(tmp_path / "cat" / "a.png")
    images = ImageFolder(tmp_path)
    assert images.ids == ["cat/a.png", "dog/deep/z.png"]
    assert images.labels == ["cat", "dog"]
    assert images.class_names == ["cat", "dog"]
    assert len(images) == 2


def test_labels_from_a_csv(tmp_path):
    tree(tmp_path / "root")
    outside = solid(tmp_path / "far.png")
    labels = tmp_path / "labels.csv"
    # A byte order mark, columns in another order, an absolute path: all of them occur.
    labels.write_text(
        f"label,split,path\nB,x,dog/0.png\nA,x,./cat/../cat/1.png\nB,y,{outside}\n", "utf-8-sig"
    )
    images = ImageFolder(tmp_path / "root", labels)
    assert images.ids == ["dog/0.png", "cat/1.png", outside.as_posix()]
    assert images.labels == ["B", "A", "B"]
    assert len([i for _, _, ids in images.loader(RAW) for i in ids]) == 3


def test_names_that_are_not_utf8_are_refused_early(tmp_path):
    tree(tmp_path)
    os.link(tmp_path / "cat" / "0.png", os.fsencode(tmp_path / "cat") + b"/\xff.png")
    with pytest.raises(ValueError, match=r"must be UTF-8, got b'cat/\\xff.png'"):
        ImageFolder(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder of pictures, .* does not exist"):
        ImageFolder(tmp_path / "none")
    file = solid(tmp_path / "file.png")
    with pytest.raises(NotADirectoryError, match=r"must be a folder of pictures, .* is a file"):
        ImageFolder(file)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must hold pictures in a folder for each class, .* none"):
        ImageFolder(tmp_path / "empty")
    for i in range(7):
        solid(tree(tmp_path / "loose") / f"{i}.png")
    with pytest.raises(ValueError, match=r"pictures next to them: 0.png, .*4.png and 2 more; move"):
        ImageFolder(tmp_path / "loose")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            "file,label\na,b\n",
            ValueError,
            "must have the columns path and label, .* has file, label",
        ),
        ("", ValueError, "has no header"),
        ("path,label\n", ValueError, "must name at least one picture"),
        ("path,label\ncat/0.png\n", ValueError, "line 2 of .* lacks one"),
        ("path,label\ncat/0.png,\n", ValueError, "line 2 of .* lacks one"),
        ("path,label\ncat/0.png,a\ncat/0.png,b\n", ValueError, "cat/0.png comes again in line 3"),
        ("path,label\ncat/0.png,a\nx,b\ny,b\n", FileNotFoundError, "2 of 3 are missing: x, y"),
    ],
)
def test_csv_errors(tmp_path, text, error, words):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(error, match=words):
        ImageFolder(tree(tmp_path / "root"), tmp_path / "labels.csv")


# Loading


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_gives_the_same(tmp_path, workers):
    loader = ImageFolder(tree(tmp_path)).loader(RAW, batch_size=4, workers=workers)
    assert len(loader) == 2
    passes = [list(loader), list(loader)]
    for batches in passes:
        assert [ids for _, _, ids in batches] == [
            ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png"],
            ["dog/1.png", "dog/2.png"],
        ]
        assert batches[1][1] == ["dog", "dog"]
        values = torch.cat([images for images, _, _ in batches])[:, 0, 0, 0] * 255
        np.testing.assert_allclose(values, [0, 1, 2, 20, 21, 22], atol=1e-4)


def test_passes_leave_the_global_random_state_alone(tmp_path):
    loader = ImageFolder(tree(tmp_path)).loader(RAW)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_skipped_counted_and_listed(tmp_path, workers):
    tree(tmp_path)
    whole = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "0.png").write_bytes(b"no picture at all")
    (tmp_path / "dog" / "1.png").write_bytes(b"")
    loader = ImageFolder(tmp_path).loader(RAW, batch_size=2, workers=workers)
    for _ in range(2):  # the second pass adds nothing to the list
        ids = [i for _, _, ids in loader for i in ids]
        assert ids == ["cat/0.png", "cat/2.png", "dog/2.png"]
        assert [name for name, _ in loader.unreadable] == ["cat/1.png", "dog/0.png", "dog/1.png"]
    reason = dict(loader.unreadable)["dog/0.png"]
    assert reason == "UnidentifiedImageError: cannot identify image file"


def test_strict_stops_with_the_path(tmp_path):
    tree(tmp_path)
    bad = tmp_path / "dog" / "0.png"
    bad.write_bytes(b"no picture")
    loader = ImageFolder(tmp_path).loader(RAW, strict=True)
    with pytest.raises(UnreadableImageError, match=f"cannot read {bad}: UnidentifiedImageError"):
        list(loader)


def test_all_unreadable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UnreadableImageError, match="none of the 1 pictures can be read; the first"):
        list(ImageLoader([tmp_path / "a.png"], ["a"]))


@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="the worker would not see the patch"
)
def test_a_killed_worker_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Preprocessing, "load", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    loader = ImageFolder(tree(tmp_path)).loader(RAW, workers=1)
    with pytest.raises(GcfastError, match="was killed, most likely for lack of memory: use fewer"):
        list(loader)


def test_dataset_is_picklable(tmp_path):
    dataset = ImageDataset([os.fspath(solid(tmp_path / "a.png"))], RAW)
    view, reason = pickle.loads(pickle.dumps(dataset))[0]
    np.testing.assert_array_equal(view[0, 0], (200, 40, 90))
    assert (len(dataset), reason) == (1, "")


def test_loader_arguments_are_checked():
    with pytest.raises(ValueError, match="`files` must name at least one picture, got none"):
        ImageLoader([], [])
    with pytest.raises(ValueError, match="`ids` must have length 1, got 2"):
        ImageLoader(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        ImageLoader(["a"], ["a"], batch_size=0)
    with pytest.raises(ValueError, match="`workers` must be at least 0, got -1"):
        ImageLoader(["a"], ["a"], workers=-1)
