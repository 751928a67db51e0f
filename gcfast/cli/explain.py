"""The command ``gcfast explain``: heat maps of picture files, as arrays, overlays and a page.

Pictures stream through: a batch is decoded, explained, written and dropped, so the number of
pictures is bounded by the disk alone.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcfast._checks import listed
from gcfast._progress import Progress, tracked
from gcfast.cli.inputs import Opened, list_files, open_database, reading
from gcfast.cli.on_ray.commands import explain_on_ray
from gcfast.cli.outputs import JsonRows, MapWriter, check_folder, tell_doubts, tell_left_out
from gcfast.database.database import Database
from gcfast.explain.result import Finish
from gcfast.images.decode import read_picture
from gcfast.images.folder import ImageLoader
from gcfast.images.html import Panel, ReportRow, write_report
from gcfast.images.overlay import overlay
from gcfast.images.placed import overlay_whole
from gcfast.images.preprocessing import Preprocessing
from gcfast.method.settings import ELEMENTWISE, PROXY

# What the command writes into its folder.
_OUTPUTS = ("maps.npy", "transforms.json", "results.csv", "index.html", "overlays")

_MEANING = {
    "for": "Heat is on what brings this picture and its neighbor close.",
    "against": "Heat is on what keeps this picture and its neighbor apart (the paper's sign).",
    None: "Heat is on what the neighbor's class has and the other classes have not.",
}

# Unreadable pictures that the page lists; all of them are in results.csv.
_LISTED_ON_PAGE = 50

_PANEL = 448  # pixels of the longer side of an overlay on the page


def explain_files(options: argparse.Namespace) -> None:
    """Explain the pictures that the options name, and write what the options ask for.

    Raises:
        FileNotFoundError: a path does not exist.
        FileExistsError: the output folder is not empty and ``--force`` is not given.
        ValueError: a folder has no pictures, or the database does not say how its pictures were
            prepared.
        GcfastError: the model or the database cannot be used, or (``--strict``) a picture not
            read.
    """
    if options.ray:
        explain_on_ray(options)
        return
    for name in ("alpha", "dim"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ValueError(f"`--{name}` must be in [0, 1], got {value}")
    files = list_files(options.paths)
    check_folder(options.out, options.force, _OUTPUTS)
    opened = open_database(
        options,
        k=options.k,
        index=options.index,
        requery=options.requery,
        refine=options.refine,
    )
    database, preprocessing = opened.database, opened.preprocessing
    loader = ImageLoader(files, files, preprocessing=preprocessing, **reading(options))
    (options.out / "overlays").mkdir(parents=True, exist_ok=True)
    on_page: list[dict[str, str]] = []
    flat = done = 0
    started = time.perf_counter()
    with (
        MapWriter(options.out / "maps.npy") as maps,
        JsonRows(options.out / "transforms.json") as transforms,
        open(
            options.out / "results.csv",
            "w",
            encoding="utf-8",
            errors="surrogateescape",  # a path that is not UTF-8 keeps its bytes
            newline="",
        ) as file,
        Progress("explaining", "pictures", total=len(files), show=True) as shown,
    ):
        table = csv.DictWriter(file, _columns(options.k))
        table.writeheader()
        for images, _, names in loader:
            why = opened.explainer.explain_batch(
                images.to(opened.device), details=True, center=options.center
            )
            heat = why.maps.float().cpu().numpy()
            maps.write(heat)
            views = preprocessing.pictures(images)
            for i, name in enumerate(names):
                whole, place = _laid_back(preprocessing, name, views[i], heat[i], options)
                row = {"map": str(done + i), "path": name, "flat": str(int(why.flat[i]))}
                if why.confidence is not None:
                    row["confidence"] = f"{float(why.confidence[i]):.4f}"
                row |= _neighbors(
                    database, opened.images, why.neighbors[i].tolist(), why.distances[i].tolist()
                )
                row["overlay"] = f"overlays/{done + i:06d}-{_safe(name)}.png"
                # Level 3 is a third of the default's time for 7 % more bytes (224 x 224 overlays).
                whole.save(options.out / row["overlay"], compress_level=3)
                transforms.write({"map": done + i, "path": name} | place)
                table.writerow(row)
                if len(on_page) < options.page_rows:
                    on_page.append(row)
            done += len(names)
            flat += int(why.flat.sum())
            shown.update(len(names))
        seconds = time.perf_counter() - started
        for name, reason in loader.unreadable:
            table.writerow({"path": name, "error": reason})
    refined = opened.explainer.info()["refine"]
    facts = [
        ("pictures explained", f"{done:,}"),
        ("database rows", f"{len(database):,}"),
        ("flat maps", f"{flat:,}"),
        ("unreadable pictures", f"{len(loader.unreadable):,}"),
        ("pictures a second, files to files", f"{done / seconds:.3g}"),
    ]
    method = database.manifest["settings"].get("method")
    lender, lent = "its nearest picture", "the weights of its channels"
    if method == PROXY:
        lender += "'s class"
    if method == ELEMENTWISE:
        lent = "the direction in which its embedding should move"
    lead = (
        f"Each picture went through the network once, and {lender} in the database lent {lent}. "
        + _MEANING[database.manifest["settings"].get("evidence")]
    )
    if refined:
        lead += f" Maps are refined by {listed(refined)} of the same picture (--refine)."
    if done > len(on_page):
        lead += f"\n\nShown are the first {len(on_page):,} of {done:,}; results.csv lists them all."
    write_report(
        options.out / "index.html",
        title=f"Explained with {options.database.resolve().name}",
        lead=lead,
        rows=_page_rows(
            tracked(on_page, "page", "pictures", show=True), opened, options, bool(refined)
        ),
        table=_unreadable_table(loader.unreadable),
        table_caption="Pictures that could not be read",
        facts=facts,
    )
    tell_left_out("unreadable pictures, skipped", loader.unreadable)
    tell_doubts(loader.doubts)
    if preprocessing.transform is not None:
        print(
            f"overlays show what {preprocessing.transform} gives: it does not say which part of a "
            "picture it keeps",
            file=sys.stderr,
        )
    if flat:
        print(f"flat maps, no positive value: {flat}", file=sys.stderr)
    print(f"{options.out / 'index.html'}: {done} pictures")


def _laid_back(
    preprocessing: Preprocessing,
    path: str,
    view: NDArray[np.uint8],
    heat: NDArray[np.float32],
    options: argparse.Namespace,
) -> tuple[Image.Image, dict[str, Any]]:
    """Lay a map on the whole picture, or on the view where that is asked for or all there is.

    Returns:
        The overlay, and what leads back from the map to the picture, for transforms.json: column
        ``u`` and row ``v`` of the map, counted from 0, are at x = x0 + (u + 0.5) · scale_x and
        y = y0 + (v + 0.5) · scale_y, in pixels of the picture (the right way up) from its corner.
    """
    place: dict[str, Any] = {"map_size": list(heat.shape)}
    picture = None
    if preprocessing.transform is None:
        picture = read_picture(path, depth=preprocessing.depth).picture
        x0, y0, x1, y1 = window = preprocessing.window(picture.size)
        place |= {
            "picture_size": [picture.height, picture.width],
            "x0": x0,
            "y0": y0,
            "scale_x": (x1 - x0) / heat.shape[1],
            "scale_y": (y1 - y0) / heat.shape[0],
        }
    if picture is None or options.overlays == "view":
        return Image.fromarray(overlay(view, heat, alpha=options.alpha, dim=options.dim)), place
    return overlay_whole(picture, heat, window, alpha=options.alpha, dim=options.dim), place


def _columns(k: int) -> list[str]:
    columns = ["map", "path"]
    for i in range(1, k + 1):
        columns += [
            f"{name}{_suffix(i)}"
            for name in ("neighbor_row", "neighbor_id", "neighbor_path", "distance", "label")
        ]
    return [*columns, "confidence", "flat", "overlay", "error"]


def _suffix(rank: int) -> str:
    return "" if rank == 1 else f"_{rank}"


def _neighbors(
    database: Database, root: Path | None, rows: Sequence[int], distances: Sequence[float]
) -> dict[str, str]:
    """Return the columns of results.csv for a picture's neighbors; a missing one (-1) is blank."""
    columns = {}
    for rank, (row, distance) in enumerate(zip(rows, distances, strict=True), start=1):
        if row < 0:
            continue
        name = database.ids[row]
        path = None if root is None else root / name
        for key, value in (
            ("neighbor_row", row),
            ("neighbor_id", name),
            ("neighbor_path", path if path is not None and path.is_file() else ""),
            ("distance", f"{distance:.6g}"),
            ("label", database.label_name(database.labels[row].item())),
        ):
            columns[f"{key}{_suffix(rank)}"] = str(value)
    return columns


def _safe(name: str) -> str:
    """Keep of a file name's stem only the characters that file systems and URLs accept."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]


def _page_rows(
    rows: Iterable[dict[str, str]], opened: Opened, options: argparse.Namespace, refined: bool
) -> Iterator[ReportRow]:
    """Yield the page's rows, decoded one at a time; a picture that was removed is left out.

    The neighbor's own map and, where maps are refined, the plain one take a forward pass each.
    """
    for row in rows:
        name, neighbor = row.get("neighbor_id", ""), row.get("neighbor_path", "")
        panels, more = [], []
        seen = _seen(row["path"], opened)
        if seen is not None:
            panels.append(Panel(opened.preprocessing.pictures(seen)[0], "the network's input"))
            if refined:
                plain = _own_heat(row["path"], seen, opened, options, finer=False)
                more.append(_panel(plain, "heat, not refined"))
        with Image.open(options.out / row["overlay"]) as picture:
            what = "flat: nothing to show" if row["flat"] == "1" else "heat"
            panels.append(_panel(picture, what))
        if neighbor and (near := _seen(neighbor, opened)) is not None:
            view = opened.preprocessing.pictures(near)[0]
            panels.append(Panel(view, f"nearest: {name}"))
            panels.append(_panel(_own_heat(neighbor, near, opened, options), "its own heat"))
        notes = "no neighbor"
        if name:
            notes = f"{row['label']}, row {row['neighbor_row']}, "
            notes += f"squared distance {float(row['distance']):.3g}"
            if not neighbor:
                notes += f"\n{name}: picture not found (--images says where they are)"
        yield ReportRow(row["path"], panels, notes, more=more, more_label="The plain map")


def _seen(path: str, opened: Opened) -> Tensor | None:
    """Return what the network takes of a picture, [1, 3, H, W]; None if it cannot be read."""
    try:
        values = opened.preprocessing.load(path).values
    except Exception:  # whatever Pillow raises, or a transform
        return None
    return opened.preprocessing.normalize(torch.from_numpy(np.array(values))[None])


def _own_heat(
    path: str, seen: Tensor, opened: Opened, options: argparse.Namespace, *, finer: bool = True
) -> Image.Image:
    """Lay the map of a picture on it."""
    explainer = opened.explainer
    images = explainer.network.checked("images", seen.to(opened.device))
    finish = Finish.checked(images, center=options.center)
    why = explainer.attach(finish, images=images).explain(images, finish, finer=finer)
    view = opened.preprocessing.pictures(seen)[0]
    return _laid_back(opened.preprocessing, path, view, why.maps[0].cpu().numpy(), options)[0]


def _panel(picture: Image.Image, caption: str) -> Panel:
    """Show a picture, made smaller in place if it is large."""
    picture.thumbnail((_PANEL, _PANEL))
    return Panel(np.asarray(picture.convert("RGB")), caption)


def _unreadable_table(unreadable: Sequence[tuple[str, Any]]) -> list[list[str]] | None:
    if not unreadable:
        return None
    table = [["picture", "reason"], *([name, reason] for name, reason in unreadable)]
    return table[: _LISTED_ON_PAGE + 1]
