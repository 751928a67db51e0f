"""What `gcfast evaluate` leaves: the table as text and CSV, the sweeps as CSV, all of it drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcfast.evaluation import figures
from gcfast.evaluation.evaluate import LOCALISED, Evaluation
from gcfast.evaluation.table import (
    INTERVAL,
    MAIN_ROW,
    QualityTable,
    Statistic,
    aligned,
    resampled,
    statistics,
)
from gcfast.metrics import localisation_accuracy, max_box_acc_v2
from gcfast.metrics.localisation import V2_IOUS

OUTPUTS = (
    "table.txt",
    "table.csv",
    "sweeps.csv",
    "localisation.csv",
    "fidelity.csv",
    "skipped.csv",
    "channels.png",
    "top-channels.png",
    "triplets.png",
    "centers.png",
    "localisation.png",
    "fidelity.png",
)
_FIELDS = ("images", "mean", "deviation", "low", "high")


def table_text(tables: dict[float, QualityTable], *, seed: int = 0) -> str:
    """The tables side by side: mean ± standard deviation [95 % interval of the mean]."""
    found = {center: table.statistics(seed=seed) for center, table in tables.items()}
    first = next(iter(tables.values()))
    header = [""]
    for center in tables:
        header += [c if center == 0 else f"{c}, center={center:g}" for c in first.columns]
    cells = [header]
    for name in first.scores:
        row = [name]
        for rows in found.values():
            row += [told(rows[name][column]) for column in first.columns]
        cells.append(row)
    return aligned(cells)


def told(one: Statistic) -> str:
    """A statistic as tables print it."""
    return f"{one.mean:.3f} ±{one.deviation:.3f} [{one.low:.3f}, {one.high:.3f}]"


def max_box_acc_statistic(best: Tensor, seed: int = 0) -> Statistic:
    """MaxBoxAccV2 of [B, K], its interval by choosing the best threshold anew in each draw.

    It is of the whole set, so that there is no deviation of the images: NaN.
    """
    B = len(best)
    hits = torch.stack([(best >= at).double() for at in V2_IOUS])  # [3, B, K]
    drawn = [(counts @ hits / B).amax(2).mean(0) for counts in resampled(B, seed)]
    low, high = torch.cat(drawn).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return Statistic(B, max_box_acc_v2(best), math.nan, low, high)


def write_tables(measured: Evaluation, out: Path, title: str, *, seed: int = 0) -> str:
    """Write every number to ``out``; returns the text of the table."""
    text = f"{title}\nmean ± standard deviation of the images [95 % interval of the mean]\n\n"
    text += table_text(measured.tables, seed=seed)
    found = measured.localisation
    boxes = {name: max_box_acc_statistic(best, seed) for name, best in found.best.items()}
    for name, one in boxes.items():
        text += f"\nMaxBoxAccV2, {name}: {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    for file, extra in (("table.csv", False), ("sweeps.csv", True)):
        with (out / file).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["row", "center", "column", *_FIELDS])
            for center, table in measured.tables.items():
                for name, columns in table.statistics(extra=extra, seed=seed).items():
                    for column, one in columns.items():
                        writer.writerow([name, f"{center:g}", column, *_numbers(one)])
    with (out / "localisation.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "measure", "threshold", *_FIELDS])
        for name, iou in found.iou.items():
            hits = (iou >= 0.5).double()
            for threshold, one in zip(found.thresholds, statistics(hits, seed), strict=True):
                writer.writerow([name, "accuracy at IoU 0.5", f"{threshold:g}", *_numbers(one)])
            (one,) = statistics(found.pointing[name][:, None].double(), seed)
            writer.writerow([name, "pointing game", "", *_numbers(one)])
        for name, one in boxes.items():
            writer.writerow([name, "MaxBoxAccV2", "", *_numbers(one)])
    with (out / "fidelity.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["distance", "cosine", "spearman", "cosine of a random row"])
        if measured.fidelity is not None:
            points = measured.fidelity
            assert points.control is not None
            parts = (points.distances, points.cosine, points.spearman, points.control)
            writer.writerows(zip(*(_texts(part) for part in parts), strict=True))
    return text


def draw(measured: Evaluation, out: Path, title: str, *, seed: int = 0) -> Iterator[str]:
    """Draw every curve that there is; gives the names of the files as they are written."""
    plain = measured.tables[0.0]
    extra = plain.statistics(extra=True, seed=seed)
    rows = plain.statistics(seed=seed)
    column = plain.columns[0] if "mask" not in plain.columns else "mask"

    def sweep(names: Sequence[str]) -> list[Statistic]:
        return [extra[name][column] for name in names]

    for file, counts, xlabel, series in (
        (
            "channels.png",
            measured.channel_counts,
            "M, channels kept",
            {
                f"evidence {e}": sweep([f"M={m}, {e}" for m in measured.channel_counts])
                for e in ("for", "against")
            },
        ),
        (
            "triplets.png",
            measured.triplet_counts,
            "T, triplets a row",
            {"top-50": sweep([f"T={t}" for t in measured.triplet_counts])},
        ),
        (
            "centers.png",
            measured.center_counts,
            "k-means centres",
            {"top-50": sweep([f"K={n}" for n in measured.center_counts])},
        ),
    ):
        if not counts:
            continue
        levels = {
            "channel sum": rows["channel sum"][column].mean,
            "uniform": rows["uniform"][column].mean,
        }
        if file == "centers.png":
            levels = {"all rows": rows[MAIN_ROW][column].mean, **levels}
        figure = figures.sensitivity(
            counts, series, xlabel=xlabel, ylabel=f"{column} score", title=title, levels=levels
        )
        figures.save(figure, out / file)
        yield file
    figures.save(
        figures.top_channels(measured.top_channels.numpy(), title=title), out / "top-channels.png"
    )
    yield "top-channels.png"
    found = measured.localisation
    if found.iou:
        # Seventeen lines would hide each other.
        few = [*LOCALISED, f"{MAIN_ROW}, center=1"]
        accuracies = {n: localisation_accuracy(found.iou[n]).tolist() for n in few}
        figures.save(
            figures.localisation(found.thresholds, accuracies, title=title),
            out / "localisation.png",
        )
        yield "localisation.png"
    if measured.fidelity is not None:
        figures.save(figures.fidelity(measured.fidelity, title=title), out / "fidelity.png")
        yield "fidelity.png"


def _numbers(one: Statistic) -> list[str]:
    return [str(one.images), *(f"{value:.6f}" for value in one[1:])]


def _texts(values: Tensor) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]
