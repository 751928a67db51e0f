"""Files that people have: orientations, depths, holes, endings, and Pillow's own test pictures."""

import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from gcfast.images.decode import Limits, decode, image_extensions, is_picture, read_picture
from gcfast.images.folder import ImageFolder, ImageLoader, in_words, scan
from gcfast.images.preprocessing import Preprocessing

GREY = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8))
TURNED = {
    1: GREY,
    2: GREY[:, ::-1],
    3: GREY[::-1, ::-1],
    4: GREY[::-1],
    5: GREY.T,
    6: np.rot90(GREY, -1),
    7: np.rot90(GREY, 2).T,
    8: np.rot90(GREY),
}
MODES = {
    "L": Image.fromarray(GREY),
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
    "P": Image.fromarray(GREY).convert("P"),
    "RGB": Image.fromarray(np.stack([GREY] * 3, -1)),
    "RGBA": Image.fromarray(np.stack([GREY] * 3 + [np.full_like(GREY, 255)], -1)),
}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", TURNED)
def test_tiff_of_every_orientation(tmp_path, mode, compression, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    settings = {} if compression is None else {"compression": compression}
    MODES[mode].save(tmp_path / "a.tif", exif=exif, **settings)
    read = read_picture(tmp_path / "a.tif", depth=16)
    assert read.size == read.picture.size
    np.testing.assert_array_equal(np.asarray(read.picture)[..., 0], TURNED[orientation])


def test_size_of_a_jpeg_that_is_decoded_small(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (1600, 1000)).save(tmp_path / "a.jpg", exif=exif)
    read = read_picture(tmp_path / "a.jpg", at_least=100)
    assert (read.size, read.picture.size) == ((1000, 1600), (125, 200))


# Depth


def grey16(path, values, **save):
    Image.fromarray(np.asarray([values], np.uint16)).save(path, **save)
    return path


@pytest.mark.parametrize(
    ("high", "bits"), [(200, 8), (1023, 10), (1024, 12), (4095, 12), (9000, 14), (16384, 16)]
)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_goes_by_the_highest_value(tmp_path, ending, high, bits):
    values = np.linspace(0, high, 300).astype(np.uint16)
    path = grey16(tmp_path / f"a.{ending}", values)
    read = read_picture(path)
    want = np.rint(values * (255 / (2**bits - 1)))
    np.testing.assert_array_equal(np.asarray(read.picture)[0, :, 0], want)
    assert [f"read as {bits}-bit" in doubt for doubt in read.doubts] == [True] * (bits < 16)


def test_the_depth_that_a_file_states_comes_first(tmp_path):
    path = grey16(tmp_path / "a.tif", [0, 100, 1000], tiffinfo={281: 4095})
    read = read_picture(path)
    assert read.doubts == ()
    np.testing.assert_array_equal(np.asarray(read.picture)[0, :, 0], [0, 6, 62])


def test_depth_is_an_option(tmp_path):
    path = grey16(tmp_path / "a.png", [100, 160, 200])
    for depth, want in ((16, [0, 1, 1]), (12, [6, 10, 12]), ("range", [0, 153, 255])):
        read = read_picture(path, depth=depth)
        np.testing.assert_array_equal(np.asarray(read.picture)[0, :, 0], want)


def color16(kind, values):
    """A PNG or a TIFF of 16-bit color [h, w, 3], which Pillow does not write."""
    h, w, _ = values.shape
    if kind == "png":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        parts = (
            (b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
        )
        chunks = [
            struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
            for t, d in (*parts, (b"IEND", b""))
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    order, packed = ("<" if "little" in kind else ">"), "packed" in kind
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if packed else data
    at = 8 + 2 + 12 * 10 + 4  # behind the one directory of ten entries
    entries = (
        (256, w), (257, h), (258, at), (259, 8 if packed else 1), (262, 2), (273, at + 6),
        (274, 6), (277, 3), (278, h), (279, len(data)),
    )  # fmt: skip
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, value in entries:
        out += struct.pack(
            order + "HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, value
        )
    return out + struct.pack(order + "IHHH", 0, 16, 16, 16) + data


@pytest.mark.parametrize("kind", ["png", "little tif", "big tif", "packed little tif"])
def test_sixteen_bit_color(tmp_path, kind):
    """All its bits count, in the order of the file; the TIFFs lie on their side."""
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, 3))
    values[0, 0] = 4095
    path = tmp_path / f"a.{kind[-3:]}"
    path.write_bytes(color16(kind, values))
    read = read_picture(path)
    wanted = np.rint(values * (255 / 4095))
    wanted = np.rot90(wanted, -1) if kind.endswith("tif") else wanted
    np.testing.assert_array_equal(np.asarray(read.picture), wanted)
    assert read.doubts[0].startswith("16-bit color that does not state its depth, read as 12-bit")
    assert read.size == read.picture.size
    assert np.asarray(decode(path, depth=16)).max() == 16


def test_few_levels_are_told_with_their_number(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(3):
        grey16(folder / f"{i}.png", np.arange(300) + i)
    whole = ImageLoader([os.fspath(folder / f"{i}.png") for i in range(3)], list("abc"),
                        preprocessing=Preprocessing(8, depth=16))  # fmt: skip
    list(whole)
    ((text, count),) = whole.doubts
    assert text.startswith("few grey levels are left of 16 bits or more")
    assert count == 3


def test_a_database_of_before_reads_sixteen_bits():
    old = {"size": 8, "resize": "crop", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert Preprocessing.from_dict(old) == Preprocessing(
        8, "crop", (0.5,) * 3, (0.5,) * 3, depth=16
    )


# Holes


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, -9999, -3.4028235e38])
def test_holes_of_float_tiffs_do_not_count_for_the_range(tmp_path, hole):
    Image.fromarray(np.array([[hole, 290, 300, 310]], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif"))[0, :, 0], [0, 0, 128, 255])


def test_the_tag_says_what_is_a_hole(tmp_path):
    picture = Image.fromarray(np.array([[7, 290, 300, 310]], np.float32))
    picture.save(tmp_path / "a.tif", tiffinfo={42113: "7"})
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif"))[0, :, 0], [0, 0, 128, 255])


def test_a_low_value_that_is_not_the_lowest_is_no_hole(tmp_path):
    Image.fromarray(np.array([[-20000, -9999, 0]], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif"))[0, :, 0], [0, 128, 255])


def test_a_picture_of_holes_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="no pixel has a value: all of them are NaN or no data"):
        decode(tmp_path / "a.tif")


# Which files


def test_content_decides_where_the_ending_does_not(tmp_path):
    picture = Image.new("RGB", (9, 7), (250, 0, 0))
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a" / "plain", "JPEG")
    picture.save(tmp_path / "a" / "stereo.MPO", "MPO", save_all=True, append_images=[picture])
    picture.save(tmp_path / "a" / "scan", "TIFF")
    picture.save(tmp_path / "a" / "raw.NEF", "TIFF")  # a camera's raw file: TIFF, with a thumbnail
    (tmp_path / "a" / "notes.txt").write_text("P6 is no picture")
    (tmp_path / "a" / "README").write_text("")
    (tmp_path / "a" / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "a" / ".DS_Store").write_bytes(b"hidden")
    os.symlink(tmp_path / "nowhere", tmp_path / "a" / "broken")
    found = scan(tmp_path)
    assert found.files == ["a/plain", "a/scan", "a/stereo.MPO"]
    assert found.by_content == Counter({"": 2, ".mpo": 1})
    heic = {} if ".heic" in image_extensions() else {".heic": 1}
    assert found.passed_over == Counter({"": 2, ".nef": 1, ".txt": 1, **heic})
    for name in found.files:
        assert decode(tmp_path / name).size == (9, 7)


@pytest.mark.skipif(".heic" in image_extensions(), reason="pillow-heif is installed")
def test_heic_says_what_reads_it(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(OSError, match=r"cannot identify .*: HEIC is read with pip install"):
        decode(tmp_path / "c" / "x.heic")
    assert in_words(Counter({".heic": 2})) == ".heic 2; pip install 'gcfast[images]' to read HEIC"
    with pytest.raises(ValueError, match=r"has none: .heic 1; pip install 'gcfast\[images\]'"):
        ImageFolder(tmp_path)


def test_heic_is_read_with_the_plugin(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), (200, 40, 90)).save(tmp_path / "x.heic", "HEIF", quality=95)
    np.testing.assert_allclose(decode(tmp_path / "x.heic").getpixel((9, 9)), (200, 40, 90), atol=6)
    assert scan(tmp_path).files == ["x.heic"]


def test_empty_class_folders_are_counted(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    images = ImageFolder(tmp_path)
    assert images.empty_classes == ["owl"]
    assert images.class_names == ["cat", "dog"]


# Pillow's own test pictures: Tests/images of its source distribution (pip download --no-binary
# pillow pillow), whose folder GCFAST_PILLOW_IMAGES names; and the pictures of installed packages.


def real_files():
    named = os.environ.get("GCFAST_PILLOW_IMAGES")
    if not named:
        pytest.skip("GCFAST_PILLOW_IMAGES does not name the Tests/images of Pillow's source")
    return sorted(p for p in Path(named).rglob("*") if p.is_file())


def pixels_of_pillow(path):
    """Return the pixels by Pillow alone, where its conversion is the definition; else None."""
    with open(path, "rb") as file, Image.open(file) as picture:
        plain = picture.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX")
        picture = ImageOps.exif_transpose(picture)
        if not plain or "transparency" in picture.info:
            return None
        return np.asarray(picture.convert("RGB"))


@pytest.mark.filterwarnings("ignore")
def test_pillows_own_pictures_decode_right_or_are_refused_or_counted():
    right = refused = counted = 0
    for path in real_files():
        if not is_picture(path):
            counted += 1
            continue
        try:
            got = decode(path)
        except Exception:
            refused += 1
            continue
        assert got.mode == "RGB", path
        want = pixels_of_pillow(path)
        if want is not None:
            np.testing.assert_array_equal(np.asarray(got), want, err_msg=str(path))
        right += 1
    assert right > 300, (right, refused, counted)


def test_pictures_that_are_not_trusted(tmp_path):
    limits = Limits(("PNG", "JPEG", "NOT INSTALLED"), 1200)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    Image.new("RGB", (40, 31), "red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "c.bmp")
    with open(tmp_path / "a.png", "rb") as file:
        assert read_picture(file, limits=limits).size == (40, 30)
        assert not file.closed
    assert read_picture(tmp_path / "a.png", limits=limits).size == (40, 30)
    with pytest.raises(Image.DecompressionBombError, match="at most 1,200 pixels, got 40 x 31"):
        read_picture(tmp_path / "b.png", limits=limits)
    with (
        open(tmp_path / "c.bmp", "rb") as file,
        pytest.raises(UnidentifiedImageError, match="cannot identify"),
    ):
        read_picture(file, limits=limits)
    assert read_picture(tmp_path / "c.bmp").size == (40, 30)
