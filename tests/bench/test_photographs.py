"""The table on photographs, on a few made pictures in COCO's layout."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

BENCH = Path(__file__).parents[2] / "bench"
SIDE = 96

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="not installed: efficientnet_lite_pytorch (gcfast's extra [bench])",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("photographs", "photographs_data", "photographs_maps", "photographs_trials")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of 120 x 100: a box on each, a disc on the first five, a dot on the first."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for i in range(6):
        image = Image.fromarray(rng.integers(90, 110, (100, 120, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        shapes = [(1, (5 + i, 10, 45 + i, 60), (250, 20, 20))]
        shapes += [(2, (60, 20 + i, 110, 70 + i), (20, 20, 250))] * (i < 5)
        shapes += [(3, (2, 80, 12, 90), (20, 250, 20))] * (i < 1)
        for number, (x0, y0, x1, y1), color in shapes:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=color)
            annotations.append({
                "id": len(annotations), "image_id": i, "category_id": number, "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            })  # fmt: skip
        image.save(tmp_path / f"val2017/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 100, "width": 120})
    names = ("box", "disc", "dot")
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_photographs_are_squashed_with_their_masks(
    bench: dict[str, ModuleType], folder: Path
) -> None:
    photographs = bench["photographs_data"].load_photographs(folder, side=SIDE)
    assert [one.name for one in photographs] == [f"{i}.png" for i in range(6)]
    first = photographs[0]
    assert first.image.shape == (SIDE, SIDE, 3)
    assert sorted(first.masks) == ["box", "disc", "dot"]
    box = first.masks["box"]  # x 5 to 45 of 120, y 10 to 60 of 100
    rows, columns = box.any(1).nonzero()[0], box.any(0).nonzero()[0]
    assert np.allclose([columns[0], columns[-1] + 1], [5 * SIDE / 120, 45 * SIDE / 120], atol=1)
    assert np.allclose([rows[0], rows[-1] + 1], [10 * SIDE / 100, 60 * SIDE / 100], atol=1)
    # The dot is too small to be a row; a crop shows the object alone.
    assert [label for label, _ in first.crops] == ["box", "disc"]
    assert (first.crops[0][1] == (250, 20, 20)).all()


def test_folds_share_no_picture(bench: dict[str, ModuleType], folder: Path) -> None:
    photographs = bench["photographs_data"].load_photographs(folder, side=SIDE)
    both = bench["photographs_maps"].folds(photographs)
    assert [[one.name for one in fold.queries] for fold in both] == [
        ["1.png", "3.png", "5.png"],
        ["0.png", "2.png", "4.png"],
    ]
    assert both[0].labels == ["box", "disc"] * 3
    assert both[1].labels == ["box", "disc", "box", "disc", "box"]


def test_a_class_with_one_crop_is_left_out(bench: dict[str, ModuleType], folder: Path) -> None:
    photographs = bench["photographs_data"].load_photographs(folder, side=SIDE)[:4]
    both = bench["photographs_maps"].folds([*photographs, photographs[3]])
    lonely = bench["photographs_maps"].folds([photographs[0]])
    assert both[1].labels == ["box", "disc", "box", "disc"]
    assert lonely[0].labels == []


def test_scores_by_hand(bench: dict[str, ModuleType]) -> None:
    photographs = bench["photographs"]
    own = torch.zeros(3, 4, 4, dtype=torch.bool)
    own[:, :2] = True
    other = torch.zeros(1, 4, 4, dtype=torch.bool)
    other[:, 2:, :2] = True
    regions = photographs.Regions(own, [other, other, other[:0]])
    maps = torch.zeros(3, 4, 4)
    maps[0, :2], maps[0, 2:, :2] = 1.0, 3.0  # 8 and 12 of heat on labelled pixels
    maps[1] = 1.0  # as hot everywhere
    maps[2, :2], maps[2, 3, 3] = 1.0, 8.0
    found = photographs.score(maps, regions)
    assert found["share"][:2].tolist() == pytest.approx([0.4, 8 / 12])
    assert found["right"][:2].tolist() == [0.0, 0.0]
    assert (
        found["share"].isnan().tolist() == found["right"].isnan().tolist() == [False, False, True]
    )
    assert found["mask"].tolist() == pytest.approx([0.4, 0.5, 0.5])
    assert found["AP"].tolist() == pytest.approx([8 / 12, 0.5, 8 / 9])
    assert found["IoU"].tolist() == pytest.approx([8 / 12, 0.5, 8 / 9])


def test_every_method_explains_a_class_on_the_picture(
    bench: dict[str, ModuleType], folder: Path
) -> None:
    maps = bench["photographs_maps"]
    data = bench["photographs_data"]
    network = data.Backbone(imagenet=False).eval().requires_grad_(False)
    (fold, _) = maps.folds(data.load_photographs(folder, side=SIDE))
    one = maps.explain(network, fold, seed=0)
    assert all(label in q.masks for label, q in zip(one.classes, fold.queries, strict=True))
    assert [tuple(finer.shape[1:]) for finer in one.query.finer] == [(112, 6, 6), (40, 12, 12)]

    # Class proxies, written out; a row's embedding is the direction of its activations.
    numbers = fold.numbers
    means = torch.stack([one.trained.table[numbers == k].mean(0) for k in (0, 1)])
    a = (means - means.mean(0))[one.target]
    q = one.query.embeddings
    weights = a - 0.5 * q * (q * a).sum(1, keepdim=True)
    wanted = torch.einsum("nc,nchw->nhw", weights, one.query.activations).clamp(min=0)
    wanted = wanted / wanted.amax((1, 2), keepdim=True)
    torch.testing.assert_close(one.maps["class proxy"], wanted, rtol=0, atol=1e-4)

    names = [name for name in one.maps if ", refined" not in name]
    assert len(one.maps) == 2 * len(names) + 1
    for name in names:
        assert one.maps[name].shape == (3, 3, 3)
        if name == "uniform":  # nothing to refine by
            assert (one.maps[f"{name}, refined"] == 1).all()
            continue
        hot = one.maps[name].amax((1, 2)) > 0  # a flat map stays flat
        assert hot.all() or name not in ("class proxy", "EmbeddingCAM")
        got = one.maps[f"{name}, refined"]
        assert got.shape == (3, 12, 12)
        assert not got[~hot].any()
        if not hot.any():
            continue
        wanted = one.maps[name][hot]
        for finer in one.query.finer:
            wanted = plain_refine(wanted, finer[hot])
        wanted = wanted / wanted.amax((1, 2), keepdim=True)  # finished as a user's map is
        torch.testing.assert_close(got[hot], wanted, rtol=0, atol=1e-4, msg=name)


def plain_refine(maps: torch.Tensor, finer: torch.Tensor) -> torch.Tensor:
    """The formula, written out."""
    u = maps / maps.amax((1, 2), keepdim=True)
    u = F.interpolate(u[:, None], finer.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    hot = torch.einsum("nchw,nhw->nc", finer, u**3) / (u**3).sum((1, 2))[:, None]
    mean, var = finer.mean((2, 3)), finer.var((2, 3), unbiased=False)
    v = (hot - mean) / (var + 0.1 * var.mean(1, keepdim=True))
    f = torch.einsum("nc,nchw->nhw", v, finer - mean[:, :, None, None]).clamp(min=0)
    return u * f / f.amax((1, 2), keepdim=True)


def test_calibration_error_by_hand(bench: dict[str, ModuleType]) -> None:
    probability = torch.tensor([0.1, 0.7, 0.1, 0.7])
    right = torch.tensor([True, True, False, False])
    error = bench["photographs_trials"].calibration_error(probability, right, bins=2)
    assert error == pytest.approx(0.3)


def test_spreading_over_equal_places_is_flat(bench: dict[str, ModuleType]) -> None:
    heat = torch.zeros(1, 2, 2)
    heat[0, 0, 0] = 1.0
    features = torch.ones(1, 3, 2, 2)
    out = bench["photographs_trials"].spread(heat, features, 4)
    torch.testing.assert_close(out, torch.full((1, 2, 2), 0.25))
    features[0, :, 1, 1] = 0.0  # nothing there to compare
    out = bench["photographs_trials"].spread(heat, features, 4)
    torch.testing.assert_close(out, torch.tensor([[[1 / 3, 1 / 3], [1 / 3, 0.0]]]))
