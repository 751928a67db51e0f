"""From a picture file to RGB pixels, the right way up.

Pillow decodes, and HEIC through ``pillow-heif`` where it is installed. Every mode becomes RGB in
one way: transparency is laid over white, one channel of more than 8 bits is scaled to 8, EXIF
rotation is applied.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Formats left out on purpose: EPS is run through Ghostscript, the others are video, plots of
# measurements or stubs that only name what they cannot read.
_LEFT_OUT = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"})

# Formats that a signature identifies, so that a file of any name may be tried. TIFF is not one of
# them unless the file has no ending: the raw files of cameras are TIFF with a thumbnail.
_SIGNED = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "JPEG2000", "AVIF", "HEIF", "PPM")

HEIF_ENDINGS = (".heic", ".heif", ".hif", ".avif")

_ORIENTATION = 0x0112
_BITS, _MAX_SAMPLE, _NO_DATA = 258, 281, 42113  # TIFF tags; the last is GDAL's
_DEPTHS = (8, 10, 12, 14, 16)  # bits of a sample, as cameras and scanners have them
_FEW_LEVELS = 16
_ROWS = 256  # of a picture at once, where NumPy makes an index of 8 bytes for each value

# How Pillow unpacks 16-bit color, and the same with the bytes of a value exchanged.
_OTHER_ORDER = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
}


class Limits(NamedTuple):
    """What a picture that is not trusted may be.

    Attributes:
        formats: Pillow's names of the formats to try; those that are not installed are left out.
        pixels: the most that are decoded.
    """

    formats: tuple[str, ...]
    pixels: int


class Decoded(NamedTuple):
    """A decoded picture.

    Attributes:
        picture: in mode "RGB".
        size: (w, h) of the whole picture; larger than ``picture`` where a JPEG was decoded small.
        doubts: what was assumed, or may have been lost; as a rule empty.
    """

    picture: Image.Image
    size: tuple[int, int]
    doubts: tuple[str, ...]


def decode(
    path: str | os.PathLike[str], *, at_least: int | None = None, depth: int | str = "auto"
) -> Image.Image:
    """Read a picture as RGB, the right way up.

    Transparent pixels are laid over white. 16-bit grey and color (without transparency) is scaled
    as ``depth`` says. 32-bit integers and floats have no fixed range and are stretched from their
    lowest to their highest value, unless they lie within [0, 255] (kept) or, floats only, within
    [0, 1] (times 255). NaN, infinity
    and the value that stands for "no data" (GDAL's tag, or -9999) are holes: they do not count for
    the range and come out black. Of several frames the first is read.

    Args:
        path: a picture file, of a format that Pillow reads (not EPS, nor stubs such as WMF).
        at_least: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both
            sides keep this many pixels.
        depth: bits of a 16-bit value that are used, 8 to 16; "range" stretches each picture
            from its lowest to its highest value; "auto" takes the depth that the file states, or
            the smallest of 8, 10, 12, 14 and 16 that holds its highest value.

    Returns:
        A picture in mode "RGB".

    Raises:
        OSError: the file cannot be opened, or is no picture.
        ValueError: every pixel is a hole.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow's limit.
        Exception: whatever Pillow raises on a damaged file.
    """
    return read_picture(path, at_least=at_least, depth=depth).picture


def read_picture(
    path: str | os.PathLike[str] | IO[bytes],
    *,
    at_least: int | None = None,
    depth: int | str = "auto",
    limits: Limits | None = None,
) -> Decoded:
    """Read a picture as :func:`decode` does, with its whole size and what was assumed.

    Args:
        path: a picture file, or one that is open for reading.
        at_least: as there.
        depth: as there.
        limits: of a picture that is not trusted; more pixels are a ``DecompressionBombError``,
            raised before any is decoded.
    """
    with warnings.catch_warnings(), _opened(path) as file:
        # Pillow warns at half the number of pixels that it refuses; its refusal is our limit.
        # Damaged EXIF blocks and odd palettes warn too, and the picture is still good.
        warnings.simplefilter("ignore")
        # An open file, not its path: given a path, Pillow maps the pixels of an uncompressed TIFF
        # into memory as they are stored, which is wrong where its orientation turns them.
        try:
            opened = Image.open(file, formats=_formats(limits))
        except UnidentifiedImageError:
            if not isinstance(path, str | os.PathLike):
                raise
            raise UnidentifiedImageError(
                f"cannot identify image file {os.fspath(path)!r}{_hint(path)}"
            ) from None
        with opened as picture:
            whole = picture.size
            if limits is not None and whole[0] * whole[1] > limits.pixels:
                raise Image.DecompressionBombError(
                    f"a picture must have at most {limits.pixels:,} pixels, got {whole[0]} x "
                    f"{whole[1]}"
                )
            if at_least is not None:
                picture.draft(None, (at_least, at_least))
            small = picture.size != whole
            color = _sixteen_bit_color(picture, file)
            turned = small and picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            if color is not None:
                # By the values that occur: 8 bytes for each value of a large picture are too many.
                present = _present(color)
                few, doubts = _eight_bit(picture, present[None, :, None].astype(np.float64), depth)
                table = np.zeros(1 << 16, np.uint8)
                table[present] = few[0, :, 0]
                rgb = Image.fromarray(_looked_up(table, color))
                rgb.getexif()[_ORIENTATION] = picture.getexif().get(_ORIENTATION, 1)
                ImageOps.exif_transpose(rgb, in_place=True)
            else:
                ImageOps.exif_transpose(picture, in_place=True)
                rgb, doubts = _rgb(picture, depth)
        if not small:
            return Decoded(rgb, rgb.size, doubts)
        return Decoded(rgb, whole[::-1] if turned else whole, doubts)


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a picture by its ending, or by its content if it has another one.

    Reads nothing of a file with a known ending. The raw files of cameras are not pictures here,
    since what Pillow finds in them is a thumbnail.
    """
    ending = ending_of(path)
    if ending in image_extensions():
        return True
    formats = [*_SIGNED, "TIFF"] if not ending else _SIGNED
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=[f for f in formats if f in _formats()]):
                return True
    except Exception:  # Pillow's readers raise anything on what is no picture
        return False


def ending_of(path: str | os.PathLike[str]) -> str:
    """Return a file's ending in lower case with the dot; "" without one."""
    return os.path.splitext(os.fspath(path))[1].lower()


@functools.cache
def image_extensions() -> dict[str, str]:
    """Return the file extensions that are read, lower case with the dot, and their formats."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions()  # loads every plug-in
    return {e: f for e, f in known.items() if f in Image.OPEN and f not in _LEFT_OUT}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | IO[bytes]) -> Iterator[IO[bytes]]:
    if isinstance(path, str | os.PathLike):
        with open(path, "rb") as file:
            yield file
    else:
        yield path


@functools.cache
def _formats(limits: Limits | None = None) -> tuple[str, ...]:
    """Return the formats to try on a file, whatever its name says."""
    image_extensions()
    wanted = Image.OPEN if limits is None else limits.formats
    return tuple(name for name in wanted if name in Image.OPEN and name not in _LEFT_OUT)


def _hint(path: str | os.PathLike[str]) -> str:
    if ending_of(path) in HEIF_ENDINGS and ending_of(path) not in image_extensions():
        return ": HEIC is read with pip install 'gcfast[images]'"
    return ""


def _rgb(picture: Image.Image, depth: int | str) -> tuple[Image.Image, tuple[str, ...]]:
    mode = picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        grey, doubts = _eight_bit(picture, np.asarray(picture).astype(np.float64), depth)
        return Image.fromarray(grey).convert("RGB"), doubts
    if mode == "LAB":
        # Pillow's own conversions do not know this one; its color management does.
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        return (picture.convert("RGB") if converted is None else converted), ()
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        if mode == "La":
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB"), ()
    return picture.convert("RGB"), ()


def _sixteen_bit_color(picture: Image.Image, file: IO[bytes]) -> NDArray[np.uint16] | None:
    """Read the values [H, W, 3] of 16-bit color; None for any other picture.

    Pillow keeps the first byte of each value. Told that the bytes are in the other order, it keeps
    the second one.
    """
    if picture.mode != "RGB" or not isinstance(picture, ImageFile.ImageFile):
        return None
    given = [tile.args or "" for tile in picture.tile]
    modes = {args if isinstance(args, str) else args[0] for args in given}
    if len(modes) != 1 or not modes <= _OTHER_ORDER.keys():
        return None
    other = _OTHER_ORDER[modes.pop()]
    values = np.asarray(picture).astype(np.uint16)
    values <<= 8
    file.seek(0)
    with Image.open(file, formats=[str(picture.format)]) as again:
        again.tile = [
            tile._replace(args=other if isinstance(args, str) else (other, *args[1:]))
            for tile, args in zip(again.tile, given, strict=True)
        ]
        values |= np.asarray(again)
    return values


def _present(values: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Return the values that occur, rising."""
    seen = np.zeros(1 << 16, np.bool_)
    for start in range(0, len(values), _ROWS):
        seen[values[start : start + _ROWS]] = True
    return np.flatnonzero(seen)


def _looked_up(table: NDArray[np.uint8], values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    out = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        out[start : start + _ROWS] = table[values[start : start + _ROWS]]
    return out


def _eight_bit(
    picture: Image.Image, values: NDArray[np.float64], depth: int | str
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Scale a picture's values [H, W] or [H, W, 3] to uint8 as ``decode`` says."""
    color = values.ndim == 3
    hole = np.zeros(values.shape, bool) if color else _holes(picture, values)
    good = values[~hole]
    if not good.size:
        raise ValueError("no pixel has a value: all of them are NaN or no data")
    low, high = float(good.min()), float(good.max())
    doubts = []
    sixteen = (
        color
        or picture.mode.startswith("I;16")
        or (picture.mode == "I" and low >= 0 and 255 < high < 65536)
    )
    stretched = depth == "range" and not 0 <= low == high <= 255
    if sixteen and not stretched:
        bits, stated = (depth, True) if isinstance(depth, int) else _depth(picture, high)
        if not stated and bits < 16:
            doubts.append(
                f"16-bit {'color' if color else 'grey'} that does not state its depth, read as "
                f"{bits}-bit since no value is higher (`depth` says otherwise)"
            )
        values *= 255 / (2**bits - 1)
    elif picture.mode == "F" and low >= 0 and high <= 1 and not stretched:
        values *= 255
    elif low < 0 or high > 255 or stretched:
        values = (values - low) * (255 / max(high - low, 1e-12))
    values[hole] = 0
    grey = np.rint(values.clip(0, 255)).astype(np.uint8)
    levels = len(np.unique(grey[~hole]))
    before = len(np.unique(good)) if levels < _FEW_LEVELS else levels
    if before > 2 * levels:
        doubts.append(
            f'few grey levels are left of 16 bits or more (`depth` "range" keeps more): {levels} '
            "of 256"
        )
    return grey, tuple(doubts)


def _holes(picture: Image.Image, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where there is no value: NaN, infinity, or the number that stands for no data."""
    hole: NDArray[np.bool_] = ~np.isfinite(values)
    with contextlib.suppress(TypeError, ValueError):
        hole |= values == float(str(_tag(picture, _NO_DATA)).strip("\0 "))
    if picture.mode in ("F", "I"):
        # Without the tag: what geographic software writes, if nothing is lower. The second is the
        # lowest float32.
        lowest = values[~hole].min(initial=0)
        if lowest == -9999 or lowest < -3e38:
            hole |= values == lowest
    return hole


def _depth(picture: Image.Image, high: float) -> tuple[int, bool]:
    """Return the bits of a 16-bit grey picture that are used, and whether the file states them."""
    if picture.format in ("JPEG2000", "PPM"):
        return 16, True  # Pillow has scaled the values by the depth that the file states
    for tag, in_bits in ((_MAX_SAMPLE, False), (_BITS, True)):
        value = _tag(picture, tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int) and value > 0:
            bits = value if in_bits else value.bit_length()
            if 8 < bits < 16 and high < 2**bits:
                return bits, True
    return next(bits for bits in _DEPTHS if high < 2**bits), False


def _tag(picture: Image.Image, number: int) -> Any:
    """Return a TIFF tag; None where there is none."""
    tags = getattr(picture, "tag_v2", None)
    return None if tags is None else tags.get(number)
