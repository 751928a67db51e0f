"""Figures: what is drawn where, and that they render."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gcfast
from gcfast.evaluation import figures
from gcfast.evaluation.reliability import Reliability
from gcfast.evaluation.table import Statistic
from gcfast.explain.calibration import Calibration, Fidelity
from gcfast.explain.confidence import Confidence
from gcfast.images.overlay import overlay

pytest.importorskip("matplotlib", reason="matplotlib (gcfast's extra plots) is not installed")


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3)).astype(np.uint8)


def heat(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((24, 24)).astype(np.float32)


def test_overlay_takes_any_color_map() -> None:
    image, warm = picture(), heat()
    assert np.array_equal(figures.overlay(image, warm), overlay(image, warm))
    # matplotlib's own inferno differs from the report's table by rounding alone.
    import matplotlib

    table = np.rint(matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255)
    theirs = overlay(image, warm, table=table.astype(np.uint8))
    assert np.abs(theirs.astype(int) - overlay(image, warm)).max() <= 2
    assert not np.array_equal(figures.overlay(image, warm, colormap="viridis"), theirs)
    with pytest.raises(ValueError, match="`colormap` must be one that matplotlib knows, got 'no'"):
        figures.overlay(image, warm, colormap="no")


def test_grid_shows_each_method_with_its_scores(tmp_path: Path) -> None:
    images, maps = [picture(i) for i in range(3)], [heat(i) for i in range(3)]
    figure = figures.grid(
        images,
        {"Grad-CAM": maps, "channel sum": maps},
        {"Grad-CAM": {"box": [0.1, 0.2, 0.3], "mask": [0.4, 0.5, 0.6]}},
        titles=["a", "b", "c"],
    )
    assert len(figure.axes) == 9
    assert [a.get_title() for a in figure.axes[:3]] == ["input", "Grad-CAM", "channel sum"]
    assert [a.get_xlabel() for a in figure.axes[3:6]] == ["b", "box 0.20   mask 0.50", ""]
    shown = figure.axes[4].images[0].get_array()
    assert np.array_equal(shown, overlay(images[1], maps[1]))
    figures.save(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.width > saved.height * 0.8
    with pytest.raises(ValueError, match="`maps` must have length 3 each, got 2 for 'x'"):
        figures.grid(images, {"x": maps[:2]})
    with pytest.raises(ValueError, match="`images` must hold at least one picture, got none"):
        figures.grid([], {"x": []})


def test_pairs_show_neighbour_and_query() -> None:
    images, maps = [picture(i) for i in range(2)], [heat(i) for i in range(2)]
    figure = figures.transfer_pairs(
        images, maps, images[::-1], maps[::-1], titles=["d 0.1", "d 0.2"]
    )
    assert len(figure.axes) == 8
    assert np.array_equal(figure.axes[0].images[0].get_array(), images[1])
    assert np.array_equal(figure.axes[7].images[0].get_array(), overlay(images[1], maps[1]))
    assert figure.axes[6].get_xlabel() == "d 0.2"
    with pytest.raises(ValueError, match="`pairs` must have length 2 each, got 1 for 'neighbors'"):
        figures.transfer_pairs(images, maps, images[:1], maps)


def test_curves_hold_the_numbers() -> None:
    points = [Statistic(9, 0.1 * i, 0.2, 0.1 * i - 0.02, 0.1 * i + 0.02) for i in (3, 4, 2)]
    figure = figures.sensitivity(
        [1, 50, "all"], {"for": points}, xlabel="M", levels={"uniform": 0.05}
    )
    line, level = figure.axes[0].lines
    assert line.get_ydata() == pytest.approx([0.3, 0.4, 0.2])
    assert level.get_ydata()[0] == 0.05
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "50", "all"]

    figure = figures.localisation([0.2, 0.5], {"a": [0.1, 0.9], "b": [0.3, 0.2]})
    shown = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert shown == [[0.1, 0.9], [0.3, 0.2]]
    with pytest.raises(ValueError, match="`accuracies` must have length 2 each, got 1 for 'a'"):
        figures.localisation([0.2, 0.5], {"a": [0.1]})

    figure = figures.top_channels(np.array([0, 3, 0, 9, 1]))
    assert "3 of 5 channels are ever first;\n1 of them in half of the 13 rows" in (
        figure.axes[0].texts[0].get_text()
    )


def test_fidelity_draws_the_calibration() -> None:
    distances = torch.linspace(0, 1, 40)
    found = Fidelity(distances, 1 - distances / 2, 1 - distances, 0, 0)
    figure = figures.fidelity(found)
    cosine, rank, fit = figure.axes[0].lines
    assert cosine.get_ydata() == pytest.approx((1 - distances / 2).numpy())
    assert rank.get_ydata() == pytest.approx((1 - distances).numpy())
    x, y = (torch.tensor(v) for v in (fit.get_xdata(), fit.get_ydata()))
    assert torch.equal(Calibration.fit(distances, found.cosine).fidelity(x), y)
    controlled = Fidelity(distances, distances, distances, 0, 0, torch.full((40,), 0.25))
    *_, level = figures.fidelity(controlled).axes[0].lines
    assert level.get_label() == "cosine, a random row: 0.250"
    few = Fidelity(distances[:3], distances[:3], distances[:3], 0, 0)
    assert len(figures.fidelity(few).axes[0].lines) == 2


def test_reliability_draws_groups_with_intervals() -> None:
    stated = torch.tensor([0.9] * 20 + [0.2] * 20)
    right = torch.tensor([True] * 20 + [True] * 8 + [False] * 12)
    one = Reliability(Confidence(0.0, 1.0, 30, 20), stated, right, torch.arange(40.0))
    axes = figures.reliability({"a": one, "b": one}).axes[0]
    calibrated, points, *_ = axes.lines
    assert list(calibrated.get_xdata()) == list(calibrated.get_ydata()) == [0, 1]
    assert points.get_xdata() == pytest.approx([0.2, 0.9])
    assert points.get_ydata() == pytest.approx([0.4, 1.0])
    low, high = axes.collections[0].get_segments()
    # SciPy: binomtest(8, 20).proportion_ci(method="wilson"), and of 20 in 20.
    assert low[:, 1] == pytest.approx([0.2188, 0.6134], abs=1e-3)
    assert high[:, 1] == pytest.approx([0.8389, 1.0], abs=1e-3)
    assert "fitted on one half (30 images),\ndrawn for the other (40)" in axes.texts[0].get_text()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(label.startswith("b: calibration error 0.150\n(of a cal") for label in labels)


def test_a_missing_matplotlib_is_named_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **settings: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    figures.overlay(picture(), heat())  # needs none
    with pytest.raises(gcfast.MissingExtraError, match=r"pip install 'gcfast\[plots\]'"):
        figures.localisation([0.5], {"a": [0.1]})
