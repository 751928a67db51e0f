"""Figures of maps and of what was measured of them, by matplotlib (gcfast's extra ``plots``).

Each function returns a ``matplotlib.figure.Figure`` that belongs to no window; ``save`` writes it.
Color maps are perceptually uniform by default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gcfast.errors import MissingExtraError
from gcfast.evaluation.reliability import Reliability
from gcfast.evaluation.table import Statistic
from gcfast.explain.calibration import IMAGES_A_KNOT, Calibration, Fidelity
from gcfast.images import overlay as lay_over
from gcfast.metrics import auroc

COLORMAP = "inferno"
# Okabe and Ito's colors, which color-blind readers can tell apart: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GRAY = "#777777"
_DASHES = ("--", ":", "-.", (0, (1, 3)))
_PANEL_INCHES = 2.0
_DPI = 120

Image = NDArray[np.uint8]  # [H, W, 3]
Heat = NDArray[Any]  # [H, W] in [0, 1]


def overlay(image: Image, heat: Heat, *, alpha: float = 0.55, colormap: str = COLORMAP) -> Image:
    """Lay a heat map over a picture; see :func:`gcfast.images.overlay.overlay`.

    Args:
        image: uint8 [H, W, 3].
        heat: floating point [H, W] in [0, 1].
        alpha: opacity of the hottest heat.
        colormap: a name that matplotlib knows.

    Raises:
        MissingExtraError: another color map than the default, and no matplotlib.
        TypeError, ValueError: as :func:`gcfast.images.overlay.overlay`; an unknown color map.
    """
    return lay_over(image, heat, alpha=alpha, table=_table(colormap))


def grid(
    images: Sequence[Image],
    maps: Mapping[str, Sequence[Heat]],
    scores: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    *,
    titles: Sequence[str] | None = None,
    colormap: str = COLORMAP,
) -> Any:
    """Draw pictures next to their maps by several methods, the scores under each.

    Args:
        images: n pictures, uint8 [H, W, 3].
        maps: method → n maps [H, W] in [0, 1].
        scores: method → score → n numbers, written under the maps.
        titles: n names, written under the pictures.
        colormap: of the overlays.

    Source: paper, Figure 5.
    """
    _require_same("maps", {name: len(m) for name, m in maps.items()}, len(images))
    figure, axes = _panels(len(images), 1 + len(maps))
    for i, image in enumerate(images):
        _show(axes[i][0], image, titles[i] if titles else "")
        if i == 0:
            axes[0][0].set_title("input", fontsize=9)
        for j, (name, heats) in enumerate(maps.items(), start=1):
            under = ""
            if scores and name in scores:
                under = "   ".join(f"{s} {v[i]:.2f}" for s, v in scores[name].items())
            _show(axes[i][j], overlay(image, heats[i], colormap=colormap), under)
            if i == 0:
                axes[0][j].set_title(name, fontsize=9)
    return figure


def transfer_pairs(
    queries: Sequence[Image],
    query_maps: Sequence[Heat],
    neighbors: Sequence[Image],
    neighbor_maps: Sequence[Heat],
    *,
    titles: Sequence[str] | None = None,
    colormap: str = COLORMAP,
) -> Any:
    """Draw each query and its nearest training picture side by side, with the maps of both.

    Args:
        queries: n pictures, uint8 [H, W, 3].
        query_maps: their transferred maps [H, W] in [0, 1].
        neighbors: the n pictures that lent their grad-weights.
        neighbor_maps: their own maps.
        titles: n lines, written under the pairs.
        colormap: of the overlays.

    Source: paper, Figure 4.
    """
    n = len(queries)
    sizes = {"query_maps": query_maps, "neighbors": neighbors, "neighbor_maps": neighbor_maps}
    _require_same("pairs", {name: len(v) for name, v in sizes.items()}, n)
    figure, axes = _panels(n, 4)
    heads = ("nearest training picture", "its own map", "query", "transferred map")
    for i in range(n):
        shown = (
            neighbors[i],
            overlay(neighbors[i], neighbor_maps[i], colormap=colormap),
            queries[i],
            overlay(queries[i], query_maps[i], colormap=colormap),
        )
        for j, image in enumerate(shown):
            _show(axes[i][j], image, titles[i] if titles and j == 2 else "")
            if i == 0:
                axes[0][j].set_title(heads[j], fontsize=9)
    return figure


def sensitivity(
    counts: Sequence[int | str],
    series: Mapping[str, Sequence[Statistic]],
    *,
    xlabel: str,
    ylabel: str = "score",
    title: str = "",
    levels: Mapping[str, float] | None = None,
) -> Any:
    """Draw scores against a count (M, T, centers), each with its bootstrap interval.

    Args:
        counts: where the points are, rising; they are spaced evenly and named, so the last may
            be "all".
        series: name → a statistic for each count.
        xlabel: what is counted.
        ylabel: what is scored.
        title: above.
        levels: name → height of a dashed line to compare with, four at most.

    Source: paper, Figure 7a.
    """
    _require_same("series", {name: len(v) for name, v in series.items()}, len(counts))
    figure, axes = _axes(xlabel, ylabel, title)
    at = np.arange(len(counts))
    for color, (name, points) in zip(_cycle(len(series)), series.items(), strict=True):
        axes.fill_between(
            at, [p.low for p in points], [p.high for p in points], color=color, alpha=0.18, lw=0
        )
        axes.plot(at, [p.mean for p in points], "o-", color=color, ms=4, label=name)
    for style, (name, height) in zip(_DASHES, (levels or {}).items(), strict=False):
        axes.axhline(height, color=_GRAY, ls=style, lw=1.2, label=name)
    axes.set_xticks(at, [str(c) for c in counts])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def top_channels(counts: NDArray[np.int64], *, title: str = "") -> Any:
    """Draw how many rows have each channel first, most frequent first.

    Args:
        counts: [C].
        title: above.

    Source: paper, Figure 7b.
    """
    figure, axes = _axes("channels, by how often they are first", "rows", title)
    ordered = np.sort(counts[counts > 0])[::-1]
    axes.fill_between(np.arange(len(ordered) + 1), [*ordered, 0], step="post", color=_COLORS[0])
    used, half = len(ordered), int(np.searchsorted(ordered.cumsum(), ordered.sum() / 2)) + 1
    axes.text(
        0.97,
        0.95,
        f"{used:,} of {len(counts):,} channels are ever first;\n"
        f"{half:,} of them in half of the {int(ordered.sum()):,} rows",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
    )
    axes.set_xlim(0, max(used, 1))
    axes.set_ylim(bottom=0)
    return figure


def localisation(
    thresholds: Sequence[float], accuracies: Mapping[str, Sequence[float]], *, title: str = ""
) -> Any:
    """Draw localisation accuracy against the threshold, a line for each method.

    Args:
        thresholds: K shares of the maximum.
        accuracies: method → K numbers in [0, 1].
        title: above.
    """
    _require_same("accuracies", {name: len(v) for name, v in accuracies.items()}, len(thresholds))
    figure, axes = _axes("threshold, share of the map's maximum", "accuracy at IoU 0.5", title)
    for color, (name, values) in zip(_cycle(len(accuracies)), accuracies.items(), strict=True):
        axes.plot(thresholds, values, "o-", color=color, ms=4, label=name)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False)
    return figure


def fidelity(measured: Fidelity, calibration: Calibration | None = None, *, title: str = "") -> Any:
    """Draw the agreement of transferred and own maps against the distance to the row.

    Args:
        measured: a point for each image.
        calibration: drawn as a line; None fits one if there are enough images.
        title: above.
    """
    figure, axes = _axes(
        "squared distance to the nearest row", "agreement with the image's own map", title
    )
    distances = measured.distances.numpy()
    for color, name, values in (
        (_COLORS[0], "cosine", measured.cosine),
        (_COLORS[1], "Spearman", measured.spearman),
    ):
        axes.plot(distances, values.numpy(), ".", color=color, ms=4, alpha=0.45, label=name)
    if calibration is None and len(measured) >= IMAGES_A_KNOT:
        calibration = Calibration.fit(measured.distances, measured.cosine)
    if calibration is not None:
        at = torch.linspace(float(distances.min()), float(distances.max()), 200)
        axes.plot(
            at.numpy(),
            calibration.fidelity(at).numpy(),
            "-",
            color="black",
            lw=2,
            label="cosine, isotonic fit",
        )
    if measured.control is not None:
        mean = float(measured.control.mean())
        axes.axhline(mean, color=_GRAY, ls="--", lw=1.2, label=f"cosine, a random row: {mean:.3f}")
    axes.set_ylim(min(0.0, float(measured.spearman.min()) - 0.05), 1.02)
    axes.legend(fontsize=8, frameon=False)
    return figure


def reliability(measured: Mapping[str, Reliability], *, title: str = "") -> Any:
    """Draw how often the map's class is right against the confidence that it is.

    A calibrated confidence lies on the diagonal. Bars are 95 % intervals of the shares (Wilson
    1927).

    Args:
        measured: row → its confidence, on images that it was not fitted to; at least one.
        title: above.
    """
    figure, axes = _axes("confidence that the map's class is right", "share that is", title)
    axes.plot([0, 1], [0, 1], ls="--", color=_GRAY, lw=1.2, label="calibrated")
    for color, (name, one) in zip(_cycle(len(measured)), measured.items(), strict=True):
        groups = one.groups()
        low, high = np.transpose([_wilson(group.right, group.images) for group in groups])
        right = np.array([group.right for group in groups])
        by_confidence, by_distance = (
            auroc(scores, one.right) for scores in (one.stated, -one.distances)
        )
        axes.errorbar(
            [group.stated for group in groups],
            right,
            np.maximum([right - low, high - right], 0),
            fmt="o-",
            color=color,
            ms=4,
            elinewidth=0.8,
            label=f"{name}: calibration error {one.error:.3f}\n(of a calibrated one "
            f"{one.chance:.3f}), AUROC {by_confidence:.3f}, of the distance {by_distance:.3f}",
        )
    first = next(iter(measured.values()))
    axes.text(
        0.02,
        0.98,
        f"fitted on one half ({first.fitted.images} images),\n"
        f"drawn for the other ({len(first.right)})",
        transform=axes.transAxes,
        va="top",
        fontsize=9,
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _wilson(share: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of so many images."""
    middle = share + z * z / (2 * images)
    half = z * np.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return (middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the ending of the name says the format."""
    figure.savefig(path, dpi=_DPI)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'gcfast[plots]'") from error
    return matplotlib


def _table(colormap: str) -> NDArray[np.uint8] | None:
    if colormap == COLORMAP:
        return None  # the default table, without matplotlib
    maps = _matplotlib().colormaps
    if colormap not in maps:
        raise ValueError(f"`colormap` must be one that matplotlib knows, got {colormap!r}")
    colors = maps[colormap](np.linspace(0, 1, 256))[:, :3]
    table: NDArray[np.uint8] = np.rint(colors * 255).astype(np.uint8)
    return table


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    figure = _matplotlib().figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    if rows < 1:
        raise ValueError("`images` must hold at least one picture, got none")
    size = (columns * _PANEL_INCHES, rows * (_PANEL_INCHES + 0.22) + 0.2)
    figure = _matplotlib().figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Any, image: Image, under: str) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(under, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cycle(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _require_same(name: str, lengths: Mapping[str, int], wanted: int) -> None:
    for key, length in lengths.items():
        if length != wanted:
            raise ValueError(f"`{name}` must have length {wanted} each, got {length} for {key!r}")
