"""The command ``gcfast explain``: heat maps of picture files, as arrays, overlays and a page.

Pictures stream through: a batch is decoded, explained, written and dropped, so the number of
pictures is bounded by the disk alone.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gcfast._checks import listed
from gcfast._progress import Progress, tracked
from gcfast.cli.direct.alike import Alike, usual_embedding
from gcfast.cli.direct.drawn import Seen, laid_back, panel, readable, safe_name
from gcfast.cli.direct.opening import VIEW
from gcfast.cli.direct.text import explain_towards
from gcfast.cli.inputs import Opened, list_files, open_database, reading
from gcfast.cli.on_ray.commands import explain_on_ray
from gcfast.cli.outputs import JsonRows, MapWriter, check_folder, tell_doubts, tell_left_out
from gcfast.database.database import Database
from gcfast.explain.result import Finish
from gcfast.images.folder import ImageLoader
from gcfast.images.html import Panel, ReportRow, write_report
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
    if options.text is not None:
        explain_towards(options)
        return
    if options.database is None:
        raise ValueError("`--database` must be given, unless --text says what to explain towards")
    if options.neutral is not None:
        raise ValueError("`--neutral` must be left out without --text")
    for name in ("layer", "tokens", *VIEW):
        if getattr(options, name) is not None:
            raise ValueError(f"`{name}` must be left out with --database, which has its own")
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
                whole, place = laid_back(preprocessing, name, views[i], heat[i], options)
                row = {"map": str(done + i), "path": name, "flat": str(int(why.flat[i]))}
                if why.confidence is not None:
                    row["confidence"] = f"{float(why.confidence[i]):.4f}"
                row |= _neighbors(
                    database, opened.images, why.neighbors[i].tolist(), why.distances[i].tolist()
                )
                row["overlay"] = f"overlays/{done + i:06d}-{safe_name(name)}.png"
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
    lead += (
        "\n\nBeside its nearest picture: what the two have in common, on either one, less what "
        "all of the database's pictures share."
    )
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


def _page_rows(
    rows: Iterable[dict[str, str]], opened: Opened, options: argparse.Namespace, refined: bool
) -> Iterator[ReportRow]:
    """Yield the page's rows, decoded one at a time; a picture that was removed is left out.

    What the picture and its neighbor have in common takes a forward pass of each, the neighbor's
    own map and, where maps are refined, the plain one take another.
    """
    usual = usual_embedding(opened.database, opened.device)
    for number, row in enumerate(rows):
        name, neighbor = row.get("neighbor_id", ""), row.get("neighbor_path", "")
        panels, more, linked = [], [], None
        own = readable(row["path"], opened.preprocessing)
        if own is not None:
            panels.append(Panel(own.view, "the network's input"))
            if refined:
                more.append(
                    panel(_own_heat(own, opened, options, finer=False), "heat, not refined")
                )
        with Image.open(options.out / row["overlay"]) as picture:
            what = "flat: nothing to show" if row["flat"] == "1" else "heat"
            panels.append(panel(picture, what))
        near = readable(neighbor, opened.preprocessing) if neighbor else None
        if near is not None:
            panels.append(Panel(near.view, f"nearest: {name}"))
            more.append(panel(_own_heat(near, opened, options), "own heat of the nearest"))
            if own is not None:
                pair = Alike.of(opened, own, near, unlike=usual, linked=number < options.linked)
                panels += pair.panels(
                    opened.preprocessing, options, ("alike, here", "alike, there")
                )
                linked = pair.linked((0, 2), ("the network's input", "the nearest"))
        notes = "no neighbor"
        if name:
            notes = f"{row['label']}, row {row['neighbor_row']}, "
            notes += f"squared distance {float(row['distance']):.3g}"
            if not neighbor:
                notes += f"\n{name}: picture not found (--images says where they are)"
            elif near is None:
                notes += f"\n{name}: picture cannot be read any more"
        yield ReportRow(
            row["path"], panels, notes, more=more, more_label="Further maps", linked=linked
        )


def _own_heat(
    picture: Seen, opened: Opened, options: argparse.Namespace, *, finer: bool = True
) -> Image.Image:
    """Lay the map of a picture on it."""
    explainer = opened.explainer
    images = explainer.network.checked("images", picture.images.to(opened.device))
    finish = Finish.checked(images, center=options.center)
    why = explainer.attach(finish, images=images).explain(images, finish, finer=finer)
    heat = why.maps[0].cpu().numpy()
    return laid_back(opened.preprocessing, picture.path, picture.view, heat, options)[0]


def _unreadable_table(unreadable: Sequence[tuple[str, Any]]) -> list[list[str]] | None:
    if not unreadable:
        return None
    table = [["picture", "reason"], *([name, reason] for name, reason in unreadable)]
    return table[: _LISTED_ON_PAGE + 1]
