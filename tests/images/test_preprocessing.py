"""What the network sees of a picture: as timm and torchvision cut it, with margins, transformed."""

import json
import os

import numpy as np
import pytest
import torch
from libraries import library
from PIL import Image

from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

SIZES = [(64, 48), (48, 64), (50, 50), (173, 60), (61, 200), (20, 30)]


def photograph(path, size):
    """Smooth random colors, in which a shift of half a pixel shows."""
    noise = np.random.default_rng(sum(size)).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("mode", "fit"), [("center", "crop"), ("squash", "squash"), ("border", "pad")]
)
@pytest.mark.parametrize("share", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("out", [(32, 32), (48, 24)], ids=str)
def test_views_are_timms(tmp_path, size, mode, fit, share, out):
    library("timm")
    pytest.importorskip("timm", minversion="1.0.31")  # older ones round otherwise
    from timm.data.transforms_factory import transforms_imagenet_eval

    mean = (0.5, 0.4, 0.3)
    path = photograph(tmp_path / "a.png", size)
    transform = transforms_imagenet_eval(
        out, crop_pct=share, crop_mode=mode, interpolation="bicubic", mean=mean, std=(1, 1, 1)
    )
    with Image.open(path) as picture:
        want = transform(picture)
    ours = Preprocessing(
        out, fit, mean=mean, std=(1, 1, 1), interpolation="bicubic", crop_pct=share
    )
    got = ours.normalize(torch.from_numpy(ours.view(path).copy())[None])[0]
    # The same pixels up to rounding, which Pillow does once more between its two passes.
    np.testing.assert_allclose(got, want, atol=2.01 / 255)


def test_configuration_is_timms():
    library("timm")
    import timm

    from gcfast.cli import models

    for name in ("efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
                 "resnet18", "mobilenetv3_small_100", "vit_base_patch14_dinov2"):  # fmt: skip
        model = timm.create_model(name, pretrained=False, num_classes=0)
        want = timm.data.resolve_model_data_config(model)
        got = models._timm_preprocessing(model)
        assert got.shape == want["input_size"][1:]
        assert (got.mean, got.std) == (tuple(want["mean"]), tuple(want["std"]))
        assert (got.crop_pct, got.interpolation) == (want["crop_pct"], want["interpolation"])
        assert got.resize == {"center": "crop", "squash": "stretch"}[want["crop_mode"]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_margins_have_the_mean_color_and_show_all(tmp_path, size):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
    pad = Preprocessing((32, 40), "pad", mean=(0, 1, 0.2))
    view = pad.view(tmp_path / "a.png").astype(int)
    red = (abs(view - [255, 0, 0]).max(-1) < 2).mean()
    green = (abs(view - [0, 255, 51]).max(-1) < 2).mean()
    share = min(40 / size[0], 32 / size[1]) ** 2 * size[0] * size[1] / (32 * 40)
    assert red == pytest.approx(share, abs=0.05)
    assert red + green == 1


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("share", [None, 0.875])
def test_the_window_says_where_a_pixel_came_from(tmp_path, size, fit, share):
    """A dot in the picture is found in the view where the window puts it."""
    w, h = size[0] * 4, size[1] * 4
    at = (int(w * 0.55), int(h * 0.45))
    dots = np.zeros((h, w), np.float32)
    y, x = np.mgrid[:h, :w]
    dots = 255 * np.exp(
        -((x + 0.5 - at[0]) ** 2 + (y + 0.5 - at[1]) ** 2) / (0.02 * min(w, h) ** 2)
    )
    Image.fromarray(dots.astype(np.uint8)).save(tmp_path / "a.png")
    ours = Preprocessing((64, 96), fit, mean=(0, 0, 0), crop_pct=share)
    view = ours.view(tmp_path / "a.png")[..., 0].astype(float)
    x0, y0, x1, y1 = ours.window((w, h))
    v, u = np.mgrid[:64, :96]
    found = [(view * (u + 0.5)).sum() / view.sum(), (view * (v + 0.5)).sum() / view.sum()]
    back = [x0 + found[0] * (x1 - x0) / 96, y0 + found[1] * (y1 - y0) / 64]
    np.testing.assert_allclose(back, at, atol=0.02 * max(w, h))


def test_sizes_and_fits_survive_json():
    settings = Preprocessing(
        (96, 48), "pad", interpolation="lanczos", crop_pct=0.9, depth="range", transform="a:b"
    )
    assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert Preprocessing((7, 7)) == Preprocessing(7)
    assert Preprocessing(7, "squash") == Preprocessing(7, "stretch")
    assert Preprocessing((96, 48)).shape == (96, 48)
    assert str(Preprocessing((96, 48), crop_pct=0.875, interpolation="bicubic")) == (
        "96 x 48, center crop of 0.875 of each side, bicubic, "
        "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    )


TRANSFORMS = """
import numpy as np, torch
def halves(picture):
    return torch.from_numpy(np.asarray(picture.resize((12, 8)), np.float32).transpose(2, 0, 1)) / 2
def many(picture):
    return torch.zeros(3, picture.height, 4)
def whole(picture):
    return torch.zeros(3, 4, 4, dtype=torch.uint8)
def flat(picture):
    return torch.zeros(4, 4)
value = 3
"""


@pytest.fixture
def transforms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gcf_views.py").write_text(TRANSFORMS)
    for i in range(3):
        Image.new("RGB", (6, 4 + i), (40 * i, 100, 200)).save(tmp_path / f"{i}.png")
    yield [os.fspath(tmp_path / f"{i}.png") for i in range(3)]
    __import__("sys").modules.pop("gcf_views", None)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_of_the_users(transforms, workers):
    ours = Preprocessing(transform="gcf_views:halves")
    loader = ImageLoader(transforms, list("abc"), preprocessing=ours, workers=workers)
    ((images, _, _),) = list(loader)
    assert (images.shape, images.dtype) == ((3, 3, 8, 12), torch.float32)
    np.testing.assert_array_equal(images[:, :, 0, 0], [[20 * i, 50, 100] for i in range(3)])
    views = ours.pictures(images)
    np.testing.assert_array_equal(views[1, 0, 0], [0, 96, 255])  # 20, 50, 100, stretched
    np.testing.assert_array_equal(ours.view(transforms[1])[0, 0], [0, 96, 255])
    with pytest.raises(ValueError, match="does not say which part of a picture it keeps"):
        ours.window((9, 9))


def test_wrong_transforms(transforms):
    def loads(name):
        loader = ImageLoader(
            transforms, list("abc"), preprocessing=Preprocessing(transform=name), strict=True
        )
        return list(loader)

    with pytest.raises(ValueError, match=r"must give all pictures one size, got .* and "):
        loads("gcf_views:many")
    for name, words in (
        ("whole", r"must give floating point \[3, H, W\], got uint8"),
        ("flat", r"must give \[3, H, W\], got \[4, 4\]"),
        ("value", "must name a function of gcf_views"),
    ):
        with pytest.raises(Exception, match=words):
            loads(f"gcf_views:{name}")
