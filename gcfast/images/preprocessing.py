"""From a picture file to the network's input: decode, resize, normalize.

Pillow decodes. Every mode it reads becomes RGB in one way: transparency is laid over white, 16-bit
and float pictures are scaled to 8 bits, EXIF rotation is applied.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Formats left out on purpose: EPS is run through Ghostscript, the others are video, plots of
# measurements or stubs that only name what they cannot read.
_LEFT_OUT = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"})


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input; kept in the database's manifest.

    Attributes:
        size: side S of the square input, in pixels.
        resize: "crop" scales the shorter side to S and cuts out the center; "stretch" scales both
            sides to S.
        mean: subtracted from each channel, of values in [0, 1].
        std: divides each channel after that.

    Raises:
        TypeError: ``size`` is not an int.
        ValueError: ``size`` is not positive, ``resize`` unknown, ``mean`` or ``std`` not three
            finite numbers, or ``std`` not positive.
    """

    size: int = 224
    resize: str = "crop"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"`size` must be an int, got {type(self.size).__name__}")
        if self.size < 1:
            raise ValueError(f"`size` must be at least 1, got {self.size}")
        if self.resize not in ("crop", "stretch"):
            raise ValueError(f'`resize` must be "crop" or "stretch", got {self.resize!r}')
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                values = tuple(float(v) for v in given)
            except (TypeError, ValueError):
                values = ()
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"`{name}` must be three finite numbers, got {given!r}")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, got {list(self.std)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values; :meth:`from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote; other keys are ignored.

        Raises:
            ValueError: a setting is missing or is not what the class allows.
            TypeError: as the class.
        """
        names = ("size", "resize", "mean", "std")
        missing = [name for name in names if name not in settings]
        if missing:
            raise ValueError(
                f"`settings` must have {', '.join(names)}, got none for {', '.join(missing)}"
            )
        return cls(**{name: settings[name] for name in names})

    def view(self, path: str | os.PathLike[str]) -> NDArray[np.uint8]:
        """Return the part of a picture that the network sees.

        Scaling is bilinear with antialiasing. The crop is cut in source coordinates, so an
        extremely long picture costs no more than a square one.

        Args:
            path: a picture file.

        Returns:
            uint8 [S, S, 3], RGB.

        Raises:
            OSError: the file cannot be opened, or is no picture.
            Exception: whatever Pillow raises on a damaged file.
        """
        picture = decode(path, at_least=2 * self.size)
        box = self.window(picture.size)
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(picture)

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part (x0, y0, x1, y1) of a picture of size (w, h) that :meth:`view` shows."""
        width, height = size
        if self.resize == "stretch":
            return 0.0, 0.0, float(width), float(height)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def normalize(self, views: Tensor) -> Tensor:
        """Return the network input of a batch of views.

        Args:
            views: uint8 [B, S, S, 3].

        Returns:
            float32 [B, 3, S, S], (x / 255 - mean) / std, in channels-last memory format.
        """
        images = views.permute(0, 3, 1, 2).to(torch.float32)  # [B, 3, S, S], strides of the views
        mean = torch.tensor(self.mean).mul_(255).view(1, 3, 1, 1)
        std = torch.tensor(self.std).mul_(255).view(1, 3, 1, 1)
        return images.sub_(mean).div_(std)

    def pictures(self, images: Tensor) -> NDArray[np.uint8]:
        """Return the views that :meth:`normalize` made a batch from.

        Args:
            images: float32 [B, 3, S, S].

        Returns:
            uint8 [B, S, S, 3].
        """
        mean = torch.tensor(self.mean).view(1, 3, 1, 1)
        std = torch.tensor(self.std).view(1, 3, 1, 1)
        values = (images.cpu() * std + mean).mul_(255).round_().clamp_(0, 255)
        return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def decode(path: str | os.PathLike[str], *, at_least: int | None = None) -> Image.Image:
    """Read a picture as RGB, the right way up.

    Transparent pixels are laid over white. 16-bit values are divided by 257; 32-bit integers and
    floats have no fixed range and are stretched from their lowest to their highest value, unless
    they lie within [0, 255] (kept) or, floats only, within [0, 1] (times 255). Of several frames
    the first is read.

    Args:
        path: a picture file, of a format that Pillow reads (not EPS, nor stubs such as WMF).
        at_least: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both
            sides keep this many pixels.

    Returns:
        A picture in mode "RGB".

    Raises:
        OSError: the file cannot be opened, or is no picture.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow's limit.
        Exception: whatever Pillow raises on a damaged file.
    """
    with warnings.catch_warnings():
        # Pillow warns at half the number of pixels that it refuses; its refusal is our limit.
        # Damaged EXIF blocks and odd palettes warn too, and the picture is still good.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_formats()) as picture:
            if at_least is not None:
                picture.draft(None, (at_least, at_least))
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb(picture)


def _rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return Image.fromarray(_eight_bit(picture)).convert("RGB")
    if mode == "LAB":
        # Pillow's own conversions do not know this one; its color management does.
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        return picture.convert("RGB") if converted is None else converted
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        if mode == "La":
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _eight_bit(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a one-channel picture of more than 8 bits to uint8 [H, W] as ``decode`` says."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16") or (picture.mode == "I" and low >= 0 and 255 < high < 65536):
        values /= 257
    elif picture.mode == "F" and low >= 0 and high <= 1:
        values *= 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / max(high - low, 1e-12))
    return np.rint(values).astype(np.uint8)


@functools.cache
def image_extensions() -> dict[str, str]:
    """Return the file extensions that are read, lower case with the dot, and their formats."""
    known = Image.registered_extensions()  # loads every plug-in
    return {e: f for e, f in known.items() if f in Image.OPEN and f not in _LEFT_OUT}


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats to try on a file, whatever its name says."""
    image_extensions()
    return tuple(name for name in Image.OPEN if name not in _LEFT_OUT)
