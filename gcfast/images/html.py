"""One self-contained HTML page of pictures and a table, from the template ``page.html``.

The page is a single file: style sheet and images are inside it, and it needs no font and no
network. A script is in it only where places of two pictures are linked, and everything else is
there without it. Rows are written as they come, so a generator of them costs the memory of one.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcfast.images.overlay import ANCHORS, check_image

# A number as tables print it: thousands commas, a spread after ±, a unit sign that keeps the order.
_NUMBER = re.compile(
    r"([-+\u2212]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(?:\u00b1\s*[\d.]+)?\s*[%\u00d7x]?",
    re.IGNORECASE,
)

MOST_PLACES = 14  # of a side of linked pictures: 50 KB of a page for each pair of them

# Pictures with more distinct colors than this are photographs: JPEG is then several times smaller.
_PNG_COLORS = 256


@dataclass
class Panel:
    """One picture of a row.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        caption: plain text under the picture; also its alternative text.
    """

    image: NDArray[np.uint8]
    caption: str


@dataclass
class Linked:
    """Two pictures of a row, each of which answers where the reader points at the other.

    Attributes:
        panels: their numbers in the row's ``panels``.
        names: what the page calls them; plain text.
        table: floating point [H, W, H', W'], how much each place of the one has to do with each of
            the other; what is negative is shown as nothing.
        shares: the parts (of the height, of the width) of the pictures that the places lie on, from
            the top left.
    """

    panels: tuple[int, int]
    names: tuple[str, str]
    table: NDArray[Any]
    shares: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 1.0), (1.0, 1.0))


@dataclass
class ReportRow:
    """Pictures that belong together, side by side on the page.

    Attributes:
        title: plain text above the pictures.
        panels: the pictures, in reading order.
        notes: plain text next to the title.
        comment: plain text below the pictures.
        more: further pictures, which the reader opens.
        more_label: what opens them; plain text.
        linked: two of the pictures, linked place by place.
    """

    title: str
    panels: list[Panel]
    notes: str = ""
    comment: str = ""
    more: Sequence[Panel] = ()
    more_label: str = "more"
    linked: Linked | None = None


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    rows: Iterable[ReportRow],
    table: Sequence[Sequence[str]] | None = None,
    table_caption: str = "",
    facts: Sequence[tuple[str, str]] = (),
    lower_is_better: Collection[str] = (),
    table_last: bool = False,
) -> None:
    """Write one self-contained HTML page.

    All text is plain text and is escaped. The page appears under its name only when it is complete.

    Args:
        path: where to write; its folder must exist.
        title: heading and document title.
        lead: paragraph below the heading; an empty line starts a new paragraph.
        rows: the picture rows, any iterable; consumed once, one row held at a time.
        table: header row, then the body. The first column names its row; a column whose body cells
            are numbers (blank or dash cells aside) is aligned right and its best value is marked.
        table_caption: text above the table.
        facts: (name, value) pairs, shown as tiles below the lead.
        lower_is_better: headers of the columns whose lowest value is the best.
        table_last: put the table below the pictures, not above them.

    Raises:
        TypeError: a panel's image is not a uint8 array.
        ValueError: a panel's image is not [H, W, 3], a linked table is not [H, W, H', W'] or has
            NaN, the table's rows differ in length, or
            ``lower_is_better`` names a column that the table does not have.
    """
    target = Path(path)
    page = _template().generate(
        title=title,
        lead=[p for p in re.split(r"\n\s*\n", lead.strip()) if p],
        base_style=base_style(),
        colors=ANCHORS[::3].tolist(),
        facts=facts,
        tiles=_columns(len(facts)),
        # Checked before anything is written, so that a bad table leaves an old page as it was.
        table=_card(table, table_caption, lower_is_better) if table else None,
        table_last=table_last,
        rows=_shown(rows),
    )
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(page)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def base_style() -> str:
    """Return the style sheet that all of gcfast's pages begin with, with the colors of heat."""
    colors = ", ".join("#" + color.tobytes().hex() for color in ANCHORS[::3])
    scale = f":root {{\n  --scale: linear-gradient(90deg, {colors});\n}}\n"
    return scale + (resources.files("gcfast.images") / "base.css").read_text("utf-8")


@functools.cache
def _template() -> jinja2.Template:
    folder = resources.files("gcfast.images")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html")


def _shown(rows: Iterable[ReportRow]) -> Iterator[dict[str, Any]]:
    """Yield the rows as the template takes them."""
    for index, row in enumerate(rows):
        panels = _figures(row.panels, f"rows[{index}].panels")
        linked = None
        if row.linked is not None:
            linked = _packed(row.linked, f"rows[{index}].linked")
            for side, number in enumerate(row.linked.panels):
                panels[number]["side"] = side
        yield {
            "title": row.title,
            "notes": row.notes,
            "comment": row.comment,
            "panels": panels,
            "more": _figures(row.more, f"rows[{index}].more"),
            "more_label": row.more_label,
            "linked": linked,
            "linked_names": () if row.linked is None else row.linked.names,
        }


def _packed(linked: Linked, name: str) -> dict[str, Any]:
    """Return linked places as the script takes them, the table in 8 bits.

    Grids of more than MOST_PLACES a side are summed over blocks of places.
    """
    table = np.asarray(linked.table, np.float32)
    if table.ndim != 4 or 0 in table.shape or not np.isfinite(table).all():
        raise ValueError(
            f"`{name}.table` must be finite and have shape [H, W, H', W'], got {list(table.shape)}"
        )
    shares = [list(share) for share in linked.shares]
    for axis, size in enumerate(table.shape):
        step = -(-size // MOST_PLACES)
        starts = np.arange(0, size, step)
        table = np.add.reduceat(table, starts, axis)
        shares[axis // 2][axis % 2] *= len(starts) * step / size  # the last block may reach beyond
    scaled = np.rint(table * (127 / max(float(np.abs(table).max()), 1e-30))).astype(np.int8)
    return {
        "table": base64.b64encode(scaled.tobytes()).decode("ascii"),
        "grids": [table.shape[:2], table.shape[2:]],
        "shares": shares,
    }


def _figures(panels: Sequence[Panel], name: str) -> list[dict[str, Any]]:
    figures = []
    for number, panel in enumerate(panels):
        check_image(panel.image, f"{name}[{number}].image")
        height, width = panel.image.shape[:2]
        data = _data_uri(panel.image)
        figure = {"data": data, "width": width, "height": height, "caption": panel.caption}
        figures.append(figure | {"side": None})
    return figures


def _columns(tiles: int) -> tuple[int, int]:
    """Return how many tiles stand side by side, at most five, and how many places the last takes.

    Rows are as even as they can be, and the last tile fills what its row leaves.
    """
    columns = math.ceil(tiles / max(1, math.ceil(tiles / 5)))
    return columns, 1 + -tiles % max(1, columns)


def _card(
    table: Sequence[Sequence[str]], caption: str, lower_is_better: Collection[str]
) -> dict[str, Any]:
    """Return the table as the template takes it: each cell with its class."""
    header, *body = table
    for number, cells in enumerate(body, start=1):
        if len(cells) != len(header):
            raise ValueError(
                f"`table` must have rows as long as its header ({len(header)} cells), "
                f"got {len(cells)} in row {number}"
            )
    unknown = sorted(set(lower_is_better) - set(header))
    if unknown:
        raise ValueError(
            f"`lower_is_better` must name columns of `table` ({', '.join(header)}), "
            f"got {', '.join(unknown)}"
        )
    kinds = [[""] * (len(body) + 1)]  # the first column names its row, even if by a number
    for i, name in enumerate(header[1:], start=1):
        kinds.append(_kinds([cells[i] for cells in body], name in lower_is_better))
    found_best = any("num best" in column for column in kinds)
    at = range(1, len(header))
    return {
        "caption": caption,
        "note": "Best value of a column in bold." if found_best else "",
        "header": [(cell, column[0]) for cell, column in zip(header, kinds, strict=True)],
        "body": [
            (cells[0], [(cells[i], kinds[i][row]) for i in at])
            for row, cells in enumerate(body, start=1)
        ],
    }


def _kinds(cells: Sequence[str], lowest: bool) -> list[str]:
    """Return the class of a column's header and of each of its cells."""
    numbers = _numbers(cells)
    if numbers is None:
        return [""] * (len(cells) + 1)
    values = {n for n in numbers if not math.isnan(n)}
    best = None  # where all are equal there is nothing to compare
    if len(values) > 1:
        best = min(values) if lowest else max(values)
    return ["num", *("num best" if n == best else "num" for n in numbers)]


def _numbers(cells: Sequence[str]) -> list[float] | None:
    """Read the numbers of a column, NaN for a blank or a dash; None for a column of words."""
    numbers = []
    for cell in cells:
        text = cell.strip()
        if text in ("", "-", "\u2013", "\u2014", "nan"):
            numbers.append(math.nan)
        elif match := _NUMBER.fullmatch(text):
            numbers.append(float(match[1].replace(",", "").replace("\u2212", "-")))
        else:
            return None
    return numbers if any(not math.isnan(n) for n in numbers) else None


def _data_uri(image: NDArray[np.uint8]) -> str:
    """Return a data URI of an image: PNG for masks and drawings, JPEG for photographs."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    if picture.getcolors(_PNG_COLORS) is not None:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
