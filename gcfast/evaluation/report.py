"""What ``gcfast evaluate`` writes: the table as text and CSV, the sweeps as CSV, and figures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcfast.evaluation import figures
from gcfast.evaluation.beyond import CENTERED_ROW, gains
from gcfast.evaluation.measure import LOCALISED, Evaluation
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
    "beyond.csv",
    "reliability.csv",
    "skipped.csv",
    "channels.png",
    "top-channels.png",
    "triplets.png",
    "centers.png",
    "localisation.png",
    "fidelity.png",
    "reliability.png",
)
_FIELDS = ("images", "mean", "deviation", "low", "high")


def table_text(tables: dict[float, QualityTable], *, seed: int = 0) -> str:
    """Return the tables side by side: mean ± standard deviation [95 % interval of the mean]."""
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


def beyond_text(beyond: QualityTable, *, seed: int = 0) -> str:
    """Return the table beyond the paper, and what class proxies are above their rivals by."""
    lines = [
        "beyond the paper: class proxies and refined maps",
        table_text({0.0: beyond}, seed=seed),
    ]
    for name, columns in gains(beyond, seed=seed).items():
        shown = (f"{c} {v.mean:+.3f} [{v.low:+.3f}, {v.high:+.3f}]" for c, v in columns.items())
        lines.append(f"{name}: {', '.join(shown)}")
    ranked = (
        int((~beyond.scores[CENTERED_ROW]["AP"].isnan()).sum()) if "AP" in beyond.columns else 0
    )
    if ranked:
        lines.append(f"AP and IoU are of {ranked} images")
    return "\n".join(lines)


def told(one: Statistic) -> str:
    """Return a statistic as tables print it."""
    return f"{one.mean:.3f} ±{one.deviation:.3f} [{one.low:.3f}, {one.high:.3f}]"


def max_box_acc_statistic(best: Tensor, seed: int = 0) -> Statistic:
    """Return MaxBoxAccV2 of [B, K]; each draw of its interval chooses its own best threshold.

    It is a measure of the whole set, so the deviation of the images is NaN.
    """
    B = len(best)
    hits = torch.stack([(best >= at).double() for at in V2_IOUS])  # [3, B, K]
    drawn = [(counts @ hits / B).amax(2).mean(0) for counts in resampled(B, seed)]
    low, high = torch.cat(drawn).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return Statistic(B, max_box_acc_v2(best), math.nan, low, high)


def write_tables(measured: Evaluation, out: Path, title: str, *, seed: int = 0) -> str:
    """Write every number to ``out`` and return the text of the table."""
    text = f"{title}\nmean ± standard deviation of the images [95 % interval of the mean]\n\n"
    text += f"{table_text(measured.tables, seed=seed)}\n\n{beyond_text(measured.beyond, seed=seed)}"
    for name, checked in measured.reliability.items():
        text += f"\nconfidence, {name}: {checked}"
    found = measured.localisation
    boxes = {name: max_box_acc_statistic(best, seed) for name, best in found.best.items()}
    for name, one in boxes.items():
        text += f"\nMaxBoxAccV2, {name}: {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    for file, extra in (("table.csv", False), ("sweeps.csv", True)):
        rows = [
            [name, f"{center:g}", column, *_numbers(one)]
            for center, table in measured.tables.items()
            for name, columns in table.statistics(extra=extra, seed=seed).items()
            for column, one in columns.items()
        ]
        write_csv(out / file, ["row", "center", "column", *_FIELDS], rows)
    both = [measured.beyond.statistics(seed=seed), gains(measured.beyond, seed=seed)]
    rows = [
        [name, column, *_numbers(one)]
        for part in both
        for name, columns in part.items()
        for column, one in columns.items()
    ]
    write_csv(out / "beyond.csv", ["row", "column", *_FIELDS], rows)
    rows = [
        [name, str(group.images), f"{group.stated:.6f}", f"{group.right:.6f}"]
        for name, checked in measured.reliability.items()
        for group in checked.groups()
    ]
    write_csv(out / "reliability.csv", ["row", "images", "confidence", "right"], rows)
    rows = []
    for name, iou in found.iou.items():
        hits = (iou >= 0.5).double()
        for threshold, one in zip(found.thresholds, statistics(hits, seed), strict=True):
            rows.append([name, "accuracy at IoU 0.5", f"{threshold:g}", *_numbers(one)])
        (one,) = statistics(found.pointing[name][:, None].double(), seed)
        rows.append([name, "pointing game", "", *_numbers(one)])
    rows += [[name, "MaxBoxAccV2", "", *_numbers(one)] for name, one in boxes.items()]
    write_csv(out / "localisation.csv", ["row", "measure", "threshold", *_FIELDS], rows)
    points = measured.fidelity
    parts: tuple[Tensor, ...] = ()
    if points is not None and points.control is not None:
        parts = (points.distances, points.cosine, points.spearman, points.control)
    write_csv(
        out / "fidelity.csv",
        ["distance", "cosine", "spearman", "cosine of a random row"],
        zip(*([f"{v:.6f}" for v in part.tolist()] for part in parts), strict=True),
    )
    return text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write one CSV file in UTF-8."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def draw(measured: Evaluation, out: Path, title: str, *, seed: int = 0) -> Iterator[str]:
    """Draw every curve; yields the names of the files as they are written."""
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
            "k-means centers",
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
        few = [*LOCALISED, CENTERED_ROW]
        accuracies = {n: localisation_accuracy(found.iou[n]).tolist() for n in few}
        figures.save(
            figures.localisation(found.thresholds, accuracies, title=title),
            out / "localisation.png",
        )
        yield "localisation.png"
    if measured.fidelity is not None:
        figures.save(figures.fidelity(measured.fidelity, title=title), out / "fidelity.png")
        yield "fidelity.png"
    if measured.reliability:
        figure = figures.reliability(measured.reliability, title=title)
        figures.save(figure, out / "reliability.png")
        yield "reliability.png"


def _numbers(one: Statistic) -> list[str]:
    return [str(one.images), *(f"{value:.6f}" for value in one[1:])]
