"""From a picture to the network's input: resize, cut out, normalize.

Which part of a picture the network sees is arithmetic on its size alone, so that a map can be laid
back on the picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcfast.images.decode import Decoded, Limits, decode, image_extensions, read_picture
from gcfast.images.named import named_function

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "View", "decode", "image_extensions"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FITS = ("crop", "pad", "stretch")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
Window = tuple[float, float, float, float]


Source = str | os.PathLike[str] | IO[bytes] | NDArray[Any]


class View(NamedTuple):
    """What a picture gives the network.

    Attributes:
        values: uint8 [H, W, 3], RGB; with a ``transform`` its float32 [3, H, W].
        size: (w, h) of the whole picture, the right way up.
        doubts: what was assumed about the file; as a rule empty.
    """

    values: NDArray[Any]
    size: tuple[int, int]
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input; kept in the database's manifest.

    Attributes:
        size: the input in pixels, (H, W), or one side S of a square.
        resize: "crop" fills the input and cuts off what is longer, "pad" shows the whole picture
            with margins of the mean color, "stretch" (or "squash") scales both sides on their own.
        mean: subtracted from each channel, of values in [0, 1].
        std: divides each channel after that.
        interpolation: Pillow's filter: "nearest", "box", "bilinear", "hamming", "bicubic" or
            "lanczos"; all but the first are antialiased.
        crop_pct: the share of each side that is left when the middle of the scaled picture is cut
            out, on whole pixels, as timm and torchvision do. None keeps all, and cuts "crop" in
            the picture's own coordinates.
        depth: bits of 16-bit grey and color, as for :func:`gcfast.images.decode.decode`.
        transform: ``package.module:function`` from a ``PIL.Image`` in RGB to floating point
            [3, H, W], used in place of all of the above but ``depth``; None for none.

    Raises:
        TypeError: ``size`` is not an int or two.
        ValueError: another setting is out of range, by its name.
    """

    size: int | tuple[int, int] = 224
    resize: str = "crop"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    depth: int | str = "auto"
    transform: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _checked_size(self.size))
        if self.resize == "squash":
            object.__setattr__(self, "resize", "stretch")
        if self.resize not in FITS:
            raise ValueError(
                f'`resize` must be "crop", "pad" or "stretch" ("squash"), got {self.resize!r}'
            )
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
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, "
                f"got {self.interpolation!r}"
            )
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must be above 0 and at most 1, got {self.crop_pct}")
        if self.depth not in ("auto", "range") and self.depth not in range(8, 17):
            raise ValueError(f'`depth` must be "auto", "range" or 8 to 16, got {self.depth!r}')
        if self.transform is not None and ":" not in self.transform:
            raise ValueError(f"`transform` must be package.module:function, got {self.transform!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the network's input; with a ``transform``, of what it would be without."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values; :meth:`from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote, also before it had all of today's keys.

        Other keys are ignored.

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
        later = ("interpolation", "crop_pct", "depth", "transform")
        # Databases without a depth were made when all 16-bit grey was taken to use its 16 bits.
        known = {"depth": 16} | {name: settings[name] for name in later if name in settings}
        return cls(**{name: settings[name] for name in names}, **known)

    def __str__(self) -> str:
        """Return the settings in words, for people."""
        if self.transform is not None:
            return self.transform
        height, width = self.shape
        how = {"crop": "center crop", "pad": "whole, with margins", "stretch": "stretched"}
        share = "" if self.crop_pct in (None, 1) else f" of {self.crop_pct:.3g} of each side"
        mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return (
            f"{height} x {width}, {how[self.resize]}{share}, {self.interpolation}, "
            f"mean {mean}, std {std}"
        )

    def load(self, source: Source, *, limits: Limits | None = None) -> View:
        """Read a picture and return what of it goes to the network.

        A cut is made in the picture's coordinates, so an extremely long picture costs no more than
        a square one.

        Args:
            source: a picture file, one that is open for reading, or pixels, uint8 [h, w, 3] in RGB.
            limits: of a picture that is not trusted.

        Raises:
            PIL.Image.DecompressionBombError: more pixels than the limit.
            OSError: the file cannot be opened, or is no picture.
            TypeError, ValueError: the ``transform`` gives something else than [3, H, W]; pixels
                that are something else than uint8 [h, w, 3].
            Exception: whatever Pillow raises on a damaged file, or the ``transform``.
        """
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise TypeError(
                    "a picture's pixels must be uint8 [h, w, 3] in RGB, got "
                    f"{source.dtype} {list(source.shape)}"
                )
            pixels = Image.fromarray(source)
            decoded = Decoded(pixels, pixels.size, ())
        else:
            side = math.ceil(max(self.shape) / (self.crop_pct or 1))
            at_least = 2 * side if self.transform is None else None
            decoded = read_picture(source, at_least=at_least, depth=self.depth, limits=limits)
        if self.transform is not None:
            return View(self._transformed(decoded.picture), decoded.size, decoded.doubts)
        picture = self.render(decoded.picture, decoded.size)
        return View(np.asarray(picture), decoded.size, decoded.doubts)

    def view(self, path: str | os.PathLike[str]) -> NDArray[np.uint8]:
        """Return the part of a picture that the network sees; raises as :meth:`load`.

        Args:
            path: a picture file.

        Returns:
            uint8 [H, W, 3], RGB; of a ``transform`` its values, stretched to 0 to 255.
        """
        values = self.load(path).values
        if self.transform is None:
            return values
        seen: NDArray[np.uint8] = self.pictures(torch.from_numpy(values)[None])[0]
        return seen

    def window(self, size: tuple[int, int]) -> Window:
        """Return the part (x0, y0, x1, y1) of a picture of size (w, h) that the network sees.

        With margins it reaches beyond the picture.

        Raises:
            ValueError: there is a ``transform``, which does not say.
        """
        if self.transform is not None:
            raise ValueError(
                f"`transform` {self.transform} does not say which part of a picture it keeps"
            )
        (w, h), (H, W) = size, self.shape
        if self.resize == "crop" and self.crop_pct is None:
            width, height = min(w, h * W / H), min(h, w * H / W)
            left, top = (w - width) / 2, (h - height) / 2
            return left, top, left + width, top + height
        nw, nh = self._scaled(size)
        left, top = _offset(nw, W), _offset(nh, H)
        return left * w / nw, top * h / nh, (left + W) * w / nw, (top + H) * h / nh

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (w, h), in whole pixels, of the scaled picture that is cut or padded."""
        (w, h), (H, W) = size, self.shape
        share = 1.0 if self.crop_pct is None else self.crop_pct
        H, W = math.floor(H / share), math.floor(W / share)
        if self.resize == "stretch":
            return W, H
        if self.resize == "crop" and H == W:
            # The longer side is rounded down, as in torchvision and transformers.
            return (W, int(W * h / w)) if w <= h else (int(W * w / h), W)
        scale = (max if self.resize == "crop" else min)(W / w, H / h)
        return max(1, round(w * scale)), max(1, round(h * scale))

    def render(
        self,
        picture: Image.Image,
        size: tuple[int, int] | None = None,
        *,
        interpolation: str | None = None,
        fill: Any = None,
    ) -> Image.Image:
        """Return a picture's part that the network sees, at the network's size.

        Args:
            picture: any mode that Pillow can resize.
            size: (w, h) of the whole picture, where this one is smaller; None: as it is.
            interpolation: another filter than the setting.
            fill: color of the margins; None takes the mean.
        """
        H, W = self.shape
        whole = size or picture.size
        x0, y0, x1, y1 = self.window(whole)
        a, b, left, right = _inside(x0, x1, W, whole[0], picture.width)
        c, d, top, bottom = _inside(y0, y1, H, whole[1], picture.height)
        way = Image.Resampling[(interpolation or self.interpolation).upper()]
        seen = picture.resize((b - a, d - c), way, box=(left, top, right, bottom))
        if seen.size == (W, H):
            return seen
        fill = tuple(round(255 * min(max(v, 0), 1)) for v in self.mean) if fill is None else fill
        canvas = Image.new(picture.mode, (W, H), fill)
        canvas.paste(seen, (a, c))
        return canvas

    def normalize(self, views: Tensor) -> Tensor:
        """Return the network input of a batch of views.

        Args:
            views: uint8 [B, H, W, 3]; or floating point [B, 3, H, W] of a ``transform``, which is
                returned as it is.

        Returns:
            float32 [B, 3, H, W], (x / 255 - mean) / std, in channels-last memory format.
        """
        if views.is_floating_point():
            return views
        images = views.permute(0, 3, 1, 2).to(torch.float32)  # [B, 3, H, W], strides of the views
        mean = torch.tensor(self.mean).mul_(255).view(1, 3, 1, 1)
        std = torch.tensor(self.std).mul_(255).view(1, 3, 1, 1)
        return images.sub_(mean).div_(std)

    def pictures(self, images: Tensor) -> NDArray[np.uint8]:
        """Return the views that :meth:`normalize` made a batch from.

        Args:
            images: float32 [B, 3, H, W].

        Returns:
            uint8 [B, H, W, 3]; of a ``transform`` each image's values, stretched to 0 to 255.
        """
        if self.transform is None:
            mean = torch.tensor(self.mean).view(1, 3, 1, 1)
            std = torch.tensor(self.std).view(1, 3, 1, 1)
            values = images.cpu() * std + mean
        else:
            values = images.cpu().float()
            low, high = (f(values, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
            values = (values - low) / (high - low).clamp(min=1e-12)
        values = values.mul(255).round_().clamp_(0, 255)
        return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def _transformed(self, picture: Image.Image) -> NDArray[np.float32]:
        assert self.transform is not None
        given = named_function(self.transform, "transform")(picture)
        values = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
        if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
            kind = values.dtype if isinstance(values, np.ndarray) else type(given).__name__
            raise TypeError(f"`transform` must give floating point [3, H, W], got {kind}")
        if values.ndim != 3 or values.shape[0] != 3:
            raise ValueError(f"`transform` must give [3, H, W], got {list(values.shape)}")
        return np.ascontiguousarray(values, np.float32)


def _offset(scaled: int, out: int) -> int:
    """Return where the input begins on a side of the scaled picture; as in torchvision and timm."""
    if scaled < out:
        return -((out - scaled) // 2)  # a margin
    return round((scaled - out) / 2)  # Python rounds halves to even, as they do


def _inside(
    start: float, stop: float, count: int, whole: int, pixels: int
) -> tuple[int, int, float, float]:
    """Cut one side of a window to the picture.

    Args:
        start: where the window begins, in pixels of the whole picture.
        stop: where it ends.
        count: pixels of the network's input along this side.
        whole: pixels of the whole picture along this side.
        pixels: those of the picture at hand, which may be smaller.

    Returns:
        The input's pixels, first and after the last, that the picture fills, and the part of the
        picture at hand that fills them.
    """
    step = (stop - start) / count
    a, b = max(0, round(-start / step)), min(count, round((whole - start) / step))
    shrink = pixels / whole
    left, right = (min(max(start + i * step, 0), whole) * shrink for i in (a, b))
    return a, b, left, right


def _checked_size(size: Any) -> int | tuple[int, int]:
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    if len(sides) not in (1, 2):
        raise ValueError(f"`size` must be (H, W) or one side of a square, got {size!r}")
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool):
            raise TypeError(f"`size` must be an int or two, got {type(side).__name__}")
        if side < 1:
            raise ValueError(f"`size` must be at least 1, got {side}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
