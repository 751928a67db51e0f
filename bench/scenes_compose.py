"""Pictures for `bench/scenes.py`: stamps with an outline, laid on photographs, with exact masks.

A class is one stamp. Every picture is a function of the seed, its kind, its classes and its number
alone, so a subset of the pictures is the same whichever others are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcfast.metrics import mask_box

PICTURE_PIXELS = 224
MIN_STAMP_PIXELS = 100
OBJECT_SIDE = (0.30, 0.60)  # longer side of the object's box after rotation, share of the picture
MAX_ANGLE_DEGREES = 25.0

# A stamp has a real outline when its box holds enough of both ends of alpha and little between:
# a scanned rectangle has no clear part, a flame or a glass has hardly an opaque one.
CLEAR_ALPHA, OPAQUE_ALPHA, MASK_ALPHA = 8, 247, 128
MIN_CLEAR_SHARE = 0.05
MIN_OPAQUE_SHARE = 0.50  # of the pixels that are not clear
# Mean absolute difference, in 1/255, of 32x32 thumbnails on mid-grey below which two stamps are one
# class: the same letter comes with several alphabets, and some stamps come mirrored.
DUPLICATE_DIFFERENCE = 3.0

# What is a photograph of things among the images that the wheels carry; the rest are drawings,
# text, microscopy, or (motorcycle_right) the same scene again.
PHOTOGRAPHS: Mapping[str, tuple[str, ...]] = {
    "skimage.data": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png",
        "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
        "moon.png", "motorcycle_left.png", "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip

# Numbers that keep the random streams of the three kinds of pictures apart.
KINDS = {"train": 0, "one": 1, "two": 2}


@dataclass(frozen=True)
class Stamp:
    """One object: `name` is its path below the stamps folder, `rgba` uint8 [h, w, 4], trimmed."""

    name: str
    rgba: NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One picture: image uint8 [S, S, 3], masks bool [n, S, S], boxes int64 [n, 4] half-open."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures with n objects each, and the class name of every object.

    images uint8 [B, S, S, 3], masks bool [B, n, S, S], boxes int64 [B, n, 4] (x0, y0, x1, y1,
    half-open), names a tuple of n class names for each picture.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64]
    names: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.images)


def has_outline(alpha: NDArray[np.uint8]) -> bool:
    """Whether alpha [h, w] is an object of at least 100 px a side with a real outline."""
    mask = alpha >= MASK_ALPHA
    if not mask.any():
        return False
    x0, y0, x1, y1 = mask_box(mask)
    if min(x1 - x0, y1 - y0) < MIN_STAMP_PIXELS:
        return False
    inside = alpha[y0:y1, x0:x1]
    seen = alpha > CLEAR_ALPHA
    opaque_share = np.count_nonzero(alpha >= OPAQUE_ALPHA) / np.count_nonzero(seen)
    return bool((inside <= CLEAR_ALPHA).mean() >= MIN_CLEAR_SHARE) and bool(
        opaque_share >= MIN_OPAQUE_SHARE
    )


def _thumbnail(rgba: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The stamp on mid-grey at 32x32, float32 [32, 32, 3], for telling duplicates."""
    ground = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]), (128, 128, 128, 255))
    ground.alpha_composite(Image.fromarray(rgba))
    small = ground.convert("RGB").resize((32, 32), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def load_stamps(root: Path, step: int = 1) -> list[Stamp]:
    """Every stamp below `root` that makes a class, by name; of every `step`-th file only.

    A stamp makes a class if `has_outline` holds and no stamp before it looks the same, as it is or
    mirrored. Stamps are trimmed, and reduced to the resolution that pictures can use.

    Raises:
        FileNotFoundError: If `root` holds no PNG file; says how to get the package.
    """
    paths = sorted(root.rglob("*.png")) if root.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"no stamps under {root}: install Debian's package (apt install "
            "tuxpaint-stamps-default), or unpack it without root (apt download "
            "tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb DIR) and pass "
            "--stamps DIR/usr/share/tuxpaint/stamps"
        )
    stamps: list[Stamp] = []
    thumbnails: list[NDArray[np.float32]] = []
    for path in paths[::step]:
        with Image.open(path) as file:
            rgba = np.array(file.convert("RGBA"))
        if not has_outline(rgba[..., 3]):
            continue
        x0, y0, x1, y1 = mask_box(rgba[..., 3] > CLEAR_ALPHA)
        rgba = rgba[y0:y1, x0:x1]
        small = _thumbnail(rgba)
        if any(
            np.abs(small - other).mean() < DUPLICATE_DIFFERENCE
            or np.abs(small[:, ::-1] - other).mean() < DUPLICATE_DIFFERENCE
            for other in thumbnails
        ):
            continue
        thumbnails.append(small)
        image = Image.fromarray(rgba)
        image.thumbnail((2 * PICTURE_PIXELS, 2 * PICTURE_PIXELS), Image.Resampling.BOX)
        name = path.relative_to(root).with_suffix("").as_posix()
        stamps.append(Stamp(name, np.array(image)))
    return stamps


def load_photographs() -> list[tuple[str, NDArray[np.uint8]]]:
    """The photographs inside the scikit-image and scikit-learn wheels, as (name, uint8 [h, w, 3]).

    Raises:
        FileNotFoundError: If one of the files is not in the installed wheel.
    """
    found = []
    for package, names in PHOTOGRAPHS.items():
        folder = resources.files(package)
        for name in names:
            with (folder / name).open("rb") as stream, Image.open(stream) as file:
                found.append((name, np.array(file.convert("RGB"))))
    return found


def split_classes(stamps: Sequence[Stamp], seed: int) -> tuple[list[int], list[int]]:
    """Half of the classes for training and the others for testing, as sorted stamp numbers."""
    order = np.random.default_rng([seed, 3]).permutation(len(stamps))
    half = len(stamps) // 2
    return sorted(order[:half].tolist()), sorted(order[half:].tolist())


def _light(
    rgb: NDArray[np.float32], rng: np.random.Generator, spread: float
) -> NDArray[np.float32]:
    """Varies brightness, colour temperature, saturation and contrast by up to about `spread`.

    `rgb` is float32 [..., 3] in 0..255 and so is the result.
    """
    gain = rng.uniform(1 - spread, 1 + spread)
    tint = rng.uniform(1 - spread / 3, 1 + spread / 3, size=3)
    saturation = rng.uniform(1 - spread, 1 + spread)
    contrast = rng.uniform(1 - spread / 2, 1 + spread / 2)
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    out = grey[..., None] + (rgb - grey[..., None]) * saturation
    out = (out - 128.0) * contrast + 128.0
    return np.clip(out * (gain * tint), 0.0, 255.0).astype(np.float32)


def turn_stamp(rgba: NDArray[np.uint8], side: int, angle: float, flip: bool) -> NDArray[np.uint8]:
    """The stamp flipped, rotated by `angle` degrees and scaled to a box of longer side `side`.

    The box is that of alpha >= 128; a faint fringe may reach beyond it. Colours are resampled
    premultiplied by alpha (Pillow does so for RGBA), so no dark rim appears, and what rotation
    uncovers is clear.

    Args:
        rgba: uint8 [h, w, 4].
        side: Longer side in pixels.
        angle: Counter-clockwise, in degrees.
        flip: Whether to mirror left and right first.

    Returns:
        uint8 [h', w', 4].
    """
    image = Image.fromarray(rgba[:, ::-1] if flip else rgba)
    # Twice the final resolution is enough; the margin gives edges at the border a place to fade to.
    reduce = 2.0 * side / max(image.size)
    if reduce < 1.0:
        size = [max(1, round(length * reduce)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
    padded = Image.new("RGBA", (image.width + 4, image.height + 4), (0, 0, 0, 0))
    padded.paste(image, (2, 2))
    turned = padded.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x0, y0, x1, y1 = mask_box(np.asarray(turned)[..., 3] >= MASK_ALPHA)
    scale = side / max(x1 - x0, y1 - y0)
    size = [max(1, round(length * scale)) for length in turned.size]
    return np.array(turned.resize((size[0], size[1]), Image.Resampling.BICUBIC))


def _crop(photo: NDArray[np.uint8], rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A random square of the photograph, at least half of its shorter side, as [size, size, 3]."""
    shorter = min(photo.shape[:2])
    side = int(rng.integers(min(shorter, max(size, shorter // 2)), shorter + 1))
    y = int(rng.integers(photo.shape[0] - side + 1))
    x = int(rng.integers(photo.shape[1] - side + 1))
    square = Image.fromarray(photo[y : y + side, x : x + side])
    out = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return out[:, ::-1] if rng.random() < 0.5 else out


def _layer(
    rgba: NDArray[np.uint8], rng: np.random.Generator, size: int
) -> NDArray[np.float32] | None:
    """Alpha and colours at a random place of a [size, size, 4] canvas; None if it does not fit."""
    x0, y0, x1, y1 = mask_box(rgba[..., 3] >= MASK_ALPHA)
    if max(x1 - x0, y1 - y0) > size:
        return None
    left = int(rng.integers(size - (x1 - x0) + 1)) - x0
    top = int(rng.integers(size - (y1 - y0) + 1)) - y0
    canvas = np.zeros((size, size, 4), np.float32)
    lo_x, lo_y = max(left, 0), max(top, 0)
    hi_x, hi_y = min(left + rgba.shape[1], size), min(top + rgba.shape[0], size)
    canvas[lo_y:hi_y, lo_x:hi_x] = rgba[lo_y - top : hi_y - top, lo_x - left : hi_x - left]
    return canvas


def _place(
    stamps: Sequence[NDArray[np.uint8]], rng: np.random.Generator, size: int
) -> list[NDArray[np.float32]]:
    """Each stamp on a canvas of its own, sizes and places redrawn until no two of them touch."""
    for _ in range(50):
        turned = [
            turn_stamp(
                rgba,
                side=round(size * rng.uniform(*OBJECT_SIDE)),
                angle=rng.uniform(-MAX_ANGLE_DEGREES, MAX_ANGLE_DEGREES),
                flip=bool(rng.random() < 0.5),
            )
            for rgba in stamps
        ]
        for _ in range(20):
            layers = [_layer(rgba, rng, size) for rgba in turned]
            fitting = [layer for layer in layers if layer is not None]
            seen = np.stack([layer[..., 3] > CLEAR_ALPHA for layer in fitting])  # [n, S, S]
            if len(fitting) == len(stamps) and seen.sum(0).max() <= 1:
                return fitting
    raise RuntimeError(f"could not place {len(stamps)} objects on {size} pixels without overlap")


def compose(
    stamps: Sequence[NDArray[np.uint8]],
    photographs: Sequence[NDArray[np.uint8]],
    rng: np.random.Generator,
    size: int = PICTURE_PIXELS,
) -> Scene:
    """Lays the stamps on a random crop of a random photograph.

    Objects lie wholly inside the picture and do not overlap: no pixel has more than one of them
    with alpha above 8 of 255. Sizes and places are drawn anew until that holds.

    Args:
        stamps: One or more uint8 [h, w, 4].
        photographs: uint8 [h, w, 3], of which one is drawn.
        rng: Decides everything.
        size: Side S of the picture in pixels.

    Returns:
        The scene; a pixel belongs to an object's mask where its alpha is at least 128 of 255.

    Raises:
        RuntimeError: If the objects cannot be kept apart.
    """
    photo = photographs[int(rng.integers(len(photographs)))]
    canvas = _crop(photo, rng, size)
    masks = []
    for layer in _place(stamps, rng, size):
        alpha = layer[..., 3:] / 255.0
        canvas = canvas * (1.0 - alpha) + _light(layer[..., :3], rng, 0.25) * alpha
        masks.append(layer[..., 3] >= MASK_ALPHA)
    image = np.rint(_light(canvas, rng, 0.15)).astype(np.uint8)
    boxes = np.array([mask_box(mask) for mask in masks], np.int64)
    return Scene(image, np.stack(masks), boxes)


def plan(kind: str, classes: Sequence[int], each: int, seed: int) -> Iterator[tuple[int, ...]]:
    """The classes of every picture of a kind, in order.

    "train" and "one" give each class `each` pictures in turn. "two" pairs the classes at random
    `each` times over, so that each class is in `each` pictures (one class of an odd number sits a
    round out).

    Raises:
        ValueError: If `kind` is not "train", "one" or "two".
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {sorted(KINDS)}, got {kind!r}")
    if kind != "two":
        yield from ((number,) for number in classes for _ in range(each))
        return
    rng = np.random.default_rng([seed, 4])
    for _ in range(each):
        order = rng.permutation(np.asarray(classes)).tolist()
        yield from zip(order[0::2], order[1::2], strict=False)


def make_pictures(
    kind: str,
    stamps: Sequence[Stamp],
    classes: Sequence[int],
    photographs: Sequence[NDArray[np.uint8]],
    *,
    each: int,
    seed: int,
    size: int = PICTURE_PIXELS,
) -> Pictures:
    """Composes all pictures of a kind: see `plan` for which classes they show.

    Args:
        kind: "train", "one" or "two".
        stamps: All stamps.
        classes: Numbers of the stamps that this kind shows.
        photographs: Backgrounds, uint8 [h, w, 3].
        each: Pictures of each class.
        seed: With the kind, the classes and the picture's number it decides the picture.
        size: Side of the pictures in pixels.
    """
    scenes, names, count = [], [], dict.fromkeys(classes, 0)
    for chosen in plan(kind, classes, each, seed):
        rng = np.random.default_rng([seed, KINDS[kind], *chosen, count[chosen[0]]])
        count[chosen[0]] += 1
        scenes.append(compose([stamps[i].rgba for i in chosen], photographs, rng, size))
        names.append(tuple(stamps[i].name for i in chosen))
    return Pictures(
        np.stack([scene.image for scene in scenes]),
        np.stack([scene.masks for scene in scenes]),
        np.stack([scene.boxes for scene in scenes]),
        names,
    )
