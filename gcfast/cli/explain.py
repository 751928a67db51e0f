"""The command `gcfast explain`: heat maps of picture files, as arrays, overlays and a page.

Pictures stream through: a batch is decoded, explained, written and forgotten, so that the number of
pictures is bounded by the disk alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import gcfast
from gcfast.cli.build import load_network, tell_unreadable
from gcfast.database.database import Database
from gcfast.database.manifest import read_manifest
from gcfast.images.folder import ImageLoader, find_images
from gcfast.images.html import Panel, ReportRow, write_report
from gcfast.images.overlay import overlay
from gcfast.images.preprocessing import Preprocessing

# What the command writes into its folder.
_OUTPUTS = ("maps.npy", "results.csv", "index.html", "overlays")

_MEANING = {
    "for": "Heat lies where this picture has what brings the two close.",
    "against": "Heat lies where this picture has what holds the two apart (the paper's sign).",
}

# Unreadable pictures that the page lists; all of them are in results.csv.
_LISTED_ON_PAGE = 50


def explain_files(options: argparse.Namespace) -> int:
    """Explains the pictures that the options name, and writes what the options ask for.

    Returns:
        The exit status.

    Raises:
        FileNotFoundError: If a path does not exist.
        FileExistsError: If the output folder is not empty and `--force` is not given.
        ValueError: If a folder has no pictures, or the database does not say how its were prepared.
        GcfastError: If the model or the database cannot be used, or (`--strict`) a picture not
            read.
    """
    if not 0 <= options.alpha <= 1:
        raise ValueError(f"`--alpha` must be in [0, 1], got {options.alpha}")
    files = list_files(options.paths)
    check_folder(options.out, options.force, _OUTPUTS)
    network, device, output_key = load_network(options)
    preprocessing, root, reshape = prepared(read_manifest(options.database), options.images)
    settings: dict[str, Any] = {"k": options.k, "index": options.index}
    if options.output_key is not None:  # the database knows its own
        settings["output_key"] = output_key
    explainer = gcfast.load(options.database, network.module, reshape=reshape, **settings)
    database = explainer.database
    assert database is not None
    loader = ImageLoader(
        files,
        files,
        preprocessing=preprocessing,
        batch_size=options.batch_size,
        workers=options.workers,
        strict=options.strict,
    )
    (options.out / "overlays").mkdir(parents=True, exist_ok=True)
    shown: list[dict[str, str]] = []
    flat = done = 0
    started = time.perf_counter()
    with (
        MapWriter(options.out / "maps.npy") as maps,
        open(
            options.out / "results.csv",
            "w",
            encoding="utf-8",
            errors="surrogateescape",  # a path that is not UTF-8 keeps its bytes
            newline="",
        ) as file,
        tqdm(total=len(files), unit="image", disable=not sys.stderr.isatty()) as bar,
    ):
        table = csv.DictWriter(file, _columns(options.k))
        table.writeheader()
        for images, _, names in loader:
            why = explainer.explain_batch(images.to(device), details=True, center=options.center)
            heat = why.maps.float().cpu().numpy()
            maps.write(heat)
            views = preprocessing.pictures(images)
            for i, name in enumerate(names):
                row = {"map": str(done + i), "path": name, "flat": str(int(why.flat[i]))}
                row |= _neighbours(
                    database, root, why.neighbors[i].tolist(), why.distances[i].tolist()
                )
                row["overlay"] = f"overlays/{done + i:06d}-{_safe(name)}.png"
                blended = overlay(views[i], heat[i], alpha=options.alpha)
                # Level 3 is a third of the default's time for 7 % more bytes (224 x 224 overlays).
                Image.fromarray(blended).save(options.out / row["overlay"], compress_level=3)
                table.writerow(row)
                if len(shown) < options.page_rows:
                    shown.append(row)
            done += len(names)
            flat += int(why.flat.sum())
            bar.update(len(names))
        seconds = time.perf_counter() - started
        for name, reason in loader.unreadable:
            table.writerow({"path": name, "error": reason})
    facts = [
        ("pictures explained", f"{done:,}"),
        ("database rows", f"{len(database):,}"),
        ("flat maps", f"{flat:,}"),
        ("unreadable pictures", f"{len(loader.unreadable):,}"),
        ("pictures a second, files to files", f"{done / seconds:.3g}"),
    ]
    lead = (
        "Each picture went through the network once, and its nearest picture in the database lent "
        "the weights of its channels. "
    ) + _MEANING[database.manifest["settings"]["evidence"]]
    if done > len(shown):
        lead += f"\n\nShown are the first {len(shown):,} of {done:,}; results.csv lists them all."
    write_report(
        options.out / "index.html",
        title=f"Explained with {options.database.resolve().name}",
        lead=lead,
        rows=_page_rows(options.out, shown, preprocessing),
        table=_unreadable_table(loader.unreadable),
        table_caption="Pictures that could not be read",
        facts=facts,
    )
    tell_unreadable(loader)
    if flat:
        print(f"flat maps, nothing left to show: {flat}", file=sys.stderr)
    print(f"{options.out / 'index.html'}: {done} pictures")
    return 0


def list_files(paths: Iterable[Path]) -> list[str]:
    """The picture files that paths name: files as they are, folders with all below them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder has no pictures.
    """
    files = []
    for path in paths:
        if path.is_dir():
            found = find_images(path)
            if not found:
                raise ValueError(f"`PATH` must be a picture or hold some, {path} has none")
            files += [os.fspath(path / name) for name in found]
        elif path.exists():
            files.append(os.fspath(path))
        else:
            raise FileNotFoundError(f"`PATH` must exist, got {path}")
    return files


class MapWriter:
    """An `.npy` file of maps, float32 [B, OH, OW], written batch by batch, B unknown until the end.

    NumPy leaves room in the header for the first dimension to grow, so the header is written twice.

    Args:
        path: The file; it is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._shape: tuple[int, ...] = (0, 0)
        self._count = 0
        self._data_at = 0

    def __enter__(self) -> MapWriter:
        return self

    def write(self, maps: NDArray[np.float32]) -> None:
        """Appends maps, float32 [B, OH, OW] with the OH and OW of the first call.

        Raises:
            ValueError: If OH or OW differ from the first call's.
        """
        if not self._data_at:
            self._shape = maps.shape[1:]
            self._header()
            self._data_at = self._file.tell()
        if maps.shape[1:] != self._shape:
            raise ValueError(
                f"`maps` must have shape [B, {self._shape[0]}, {self._shape[1]}], "
                f"got {list(maps.shape)}"
            )
        self._file.write(np.ascontiguousarray(maps, "<f4").tobytes())
        self._count += len(maps)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Completes the header, also after an error: the maps written so far are then readable."""
        with self._file:
            self._file.seek(0)
            self._header()

    def _header(self) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer,
            {"descr": "<f4", "fortran_order": False, "shape": (self._count, *self._shape)},
        )
        self._file.write(buffer.getvalue())


def check_folder(out: Path, force: bool, outputs: Sequence[str]) -> None:
    """Whether the files ``outputs`` may be written into ``out``.

    Raises:
        FileExistsError: It is a file, or holds something and `--force` is not given.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"`--out` must be a folder, {out} is a file")
    taken = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if taken and not force:
        raise FileExistsError(
            f"`--out` must be a new or empty folder, {out} holds {', '.join(taken[:3])}"
            f"{' …' if len(taken) > 3 else ''}; --force writes "
            f"{', '.join(outputs)} into it all the same"
        )


def prepared(
    manifest: Mapping[str, Any], moved: Path | None
) -> tuple[Preprocessing, Path | None, gcfast.TokenGrid | None]:
    """How the database's pictures were prepared, where they are if known, how tokens are read."""
    kept = manifest.get("preprocessing")
    if not kept:
        raise ValueError(
            "`--database` must say how its pictures were prepared, and was built without that: "
            "give build(…, preprocessing=gcfast.images.folder.Preprocessing(…).to_dict())"
        )
    root = kept.get("images") if moved is None else moved
    tokens = kept.get("tokens")
    return (
        Preprocessing.from_dict(kept),
        None if root is None else Path(root),
        None if tokens is None else gcfast.TokenGrid(prefix=tokens),
    )


def _columns(k: int) -> list[str]:
    columns = ["map", "path"]
    for i in range(1, k + 1):
        columns += [
            f"{name}{_suffix(i)}"
            for name in ("neighbour_row", "neighbour_id", "neighbour_path", "distance", "label")
        ]
    return [*columns, "flat", "overlay", "error"]


def _suffix(rank: int) -> str:
    return "" if rank == 1 else f"_{rank}"


def _neighbours(
    database: Database, root: Path | None, rows: Sequence[int], distances: Sequence[float]
) -> dict[str, str]:
    """Columns of results.csv for the neighbours of one picture; a missing one (-1) stays blank."""
    columns = {}
    for rank, (row, distance) in enumerate(zip(rows, distances, strict=True), start=1):
        if row < 0:
            continue
        name = database.ids[row]
        path = None if root is None else root / name
        for key, value in (
            ("neighbour_row", row),
            ("neighbour_id", name),
            ("neighbour_path", path if path is not None and path.is_file() else ""),
            ("distance", f"{distance:.6g}"),
            ("label", database.label_name(database.labels[row].item())),
        ):
            columns[f"{key}{_suffix(rank)}"] = str(value)
    return columns


def _safe(name: str) -> str:
    """A file name's stem with nothing in it that a file system or a URL minds."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]


def _page_rows(
    out: Path, rows: Iterable[dict[str, str]], preprocessing: Preprocessing
) -> Iterator[ReportRow]:
    """The page's rows, decoded one at a time; a picture that has gone meanwhile is left out."""
    for row in rows:
        panels = []
        neighbour = row.get("neighbour_path", "")
        name = row.get("neighbour_id", "")
        for path, caption in (
            (row["path"], "the network's input"),
            (neighbour, f"nearest: {name}"),
        ):
            if path:
                with contextlib.suppress(Exception):
                    panels.append(Panel(preprocessing.view(path), caption))
        with Image.open(out / row["overlay"]) as picture:
            what = "flat: nothing to show" if row["flat"] == "1" else "heat"
            panels.insert(1, Panel(np.asarray(picture.convert("RGB")), what))
        notes = "no neighbour"
        if name:
            notes = f"{row['label']}, row {row['neighbour_row']}, "
            notes += f"squared distance {float(row['distance']):.3g}"
            if not neighbour:
                notes += f"\n{name}: picture not found (--images says where they are)"
        yield ReportRow(row["path"], panels, notes)


def _unreadable_table(unreadable: Sequence[tuple[str, Any]]) -> list[list[str]] | None:
    if not unreadable:
        return None
    table = [["picture", "reason"], *([name, reason] for name, reason in unreadable)]
    return table[: _LISTED_ON_PAGE + 1]
