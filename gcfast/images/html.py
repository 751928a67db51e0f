"""Heat maps over photographs, and one self-contained HTML page to show them on.

The page is a single file: style sheet and images are inside it, and it needs no script, no font and
no network. Rows are written as they come, so a generator of them costs the memory of one.
"""

from __future__ import annotations

import base64
import contextlib
import html
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

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Every fifth entry of the 256-entry colour map "inferno" (perceptually uniform, its lightness rises
# monotonically) by Nathaniel J. Smith and Stefan van der Walt, released under CC0 1.0 at
# https://github.com/BIDS/colormap. Interpolated linearly it is within 1.2/255 of the full table.
_INFERNO = bytes.fromhex(
    "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c59106e61136e69166e"
    "71196e781c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557bf3952c63d4dcc4248d34743d94d3ddf5337"
    "e45a31e9612bed6925f1711ff47918f78212f98b0bfa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156"
    "f2ea69f2f27df5f992fcffa4"
)
_ANCHORS = np.frombuffer(_INFERNO, np.uint8).reshape(-1, 3)  # [52, 3]

# A number as tables print it: thousands commas, a spread after ±, a unit sign that keeps the order.
_NUMBER = re.compile(
    r"([-+\u2212]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(?:\u00b1\s*[\d.]+)?\s*[%\u00d7x]?",
    re.IGNORECASE,
)

# Pictures with more distinct colours than this are photographs: JPEG is then several times smaller.
_PNG_COLOURS = 256


def _table() -> NDArray[np.uint8]:
    """The 256-entry colour table, uint8 [256, 3]."""
    at = np.linspace(0.0, 255.0, len(_ANCHORS))
    channels = [np.interp(np.arange(256), at, _ANCHORS[:, i]) for i in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


_INFERNO_256 = _table()


def colorize(heat: NDArray[Any], table: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Colours of a heat map: 0 is near black, 1 is pale yellow.

    Args:
        heat: Floating-point [H, W] in [0, 1].
        table: uint8 [256, 3], another colour map.

    Returns:
        uint8 [H, W, 3], a new array.

    Raises:
        TypeError: If `heat` is not a floating-point array.
        ValueError: If `heat` is not [H, W], or holds values outside [0, 1] or NaN.

    Source: colour map "inferno" (CC0), see the table's comment.
    """
    _check_heat(heat)
    index = np.rint(np.clip(heat, 0.0, 1.0) * 255.0).astype(np.uint8)
    colors: NDArray[np.uint8] = (_INFERNO_256 if table is None else table)[index]
    return colors


def overlay(
    image: NDArray[np.uint8],
    heat: NDArray[Any],
    *,
    alpha: float = 0.55,
    table: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Lays a heat map over a photograph; cold areas keep the photograph.

    The opacity of a pixel is `alpha * (1 - (1 - heat)^2)`: nothing where it is cold, `alpha` at the
    hottest. The photograph below loses colour, not lightness, at the same pace, so that the
    object's own hues are not read as heat.

    Args:
        image: uint8 [H, W, 3], RGB.
        heat: Floating-point [H, W] in [0, 1].
        alpha: Opacity of the heat where it is 1, in [0, 1].
        table: uint8 [256, 3], another colour map.

    Returns:
        uint8 [H, W, 3], a new array. Where `heat` is 0 it equals `image`.

    Raises:
        TypeError: If `image` is not uint8 or `heat` is not floating-point.
        ValueError: If the shapes do not match, `alpha` is outside [0, 1], or `heat` holds NaN or
            values outside [0, 1].
    """
    _check_image(image, "image")
    _check_heat(heat)
    if heat.shape != image.shape[:2]:
        raise ValueError(
            f"`heat` must have the height and width of `image`, {list(image.shape[:2])}, "
            f"got {list(heat.shape)}"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}")
    h = np.clip(heat, 0.0, 1.0).astype(np.float32)[..., None]  # [H, W, 1]
    # Steep at first, so that a weak response is visible; the dark end of the colour map never
    # reaches a noticeable opacity, so cold does not mean darkened.
    strength = 1.0 - (1.0 - h) ** 2
    photo = image.astype(np.float32)
    luma = photo @ np.array([0.299, 0.587, 0.114], np.float32)  # [H, W], ITU-R BT.601
    photo += (luma[..., None] - photo) * (strength * alpha)
    photo += (colorize(heat, table).astype(np.float32) - photo) * (strength * alpha)
    return np.rint(photo).astype(np.uint8)


@dataclass
class Panel:
    """One picture of a row.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        caption: Plain text under the picture; also its alternative text.
    """

    image: NDArray[np.uint8]
    caption: str


@dataclass
class ReportRow:
    """Pictures that belong together, side by side on the page.

    Attributes:
        title: Plain text above the pictures.
        panels: The pictures, in reading order.
        notes: Plain text beside the title.
    """

    title: str
    panels: list[Panel]
    notes: str = ""


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
    """Writes one self-contained HTML page.

    All text is plain text and is escaped. The page appears under its name only when it is complete.

    Args:
        path: Where to write; its folder must exist.
        title: Heading and document title.
        lead: Paragraph below the heading; an empty line starts a new paragraph.
        rows: The picture rows, any iterable; consumed once, one row held at a time.
        table: Header row, then the body. The first column names its row; a column whose body cells
            are numbers (blank or dash cells aside) is aligned right and its best value is marked.
        table_caption: Text above the table.
        facts: (name, value) pairs, shown as tiles below the lead.
        lower_is_better: Headers of the columns whose lowest value is the best.
        table_last: Put the table below the pictures, not above them.

    Raises:
        TypeError: If a panel's image is not a uint8 array.
        ValueError: If a panel's image is not [H, W, 3], the table's rows differ in length, or
            `lower_is_better` names a column that the table has not.
    """
    target = Path(path)
    # Checked before anything is written, so that a bad table leaves an old page as it was.
    table_html = _table_html(table, table_caption, lower_is_better) if table else ""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_page(title, lead, rows, table_html, facts, table_last))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _page(
    title: str,
    lead: str,
    rows: Iterable[ReportRow],
    table_html: str,
    facts: Sequence[tuple[str, str]],
    table_last: bool,
) -> Iterator[str]:
    name = html.escape(title)
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{name}</title>\n'
        f"<style>{_style()}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{name}</h1>\n"
    )
    for paragraph in re.split(r"\n\s*\n", lead.strip()):
        if paragraph:
            yield f'<p class="lead">{html.escape(paragraph)}</p>\n'
    if facts:
        yield '<dl class="facts">\n'
        for key, value in facts:
            yield f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>\n"
        yield "</dl>\n"
    yield "</header>\n<main>\n"
    if not table_last:
        yield table_html
    opened = False
    for index, row in enumerate(rows):
        if not opened:
            yield _LEGEND + '<section class="rows" aria-label="Pictures">\n'
            opened = True
        yield _row_html(row, index)
    if opened:
        yield "</section>\n"
    if table_last:
        yield table_html
    yield "</main>\n<footer>Made by gcfast. This page is one file and loads nothing.</footer>\n"
    yield "</body>\n</html>\n"


def _row_html(row: ReportRow, index: int) -> str:
    wide = " wide" if len(row.panels) > 3 else ""
    notes = f'<p class="notes">{html.escape(row.notes)}</p>' if row.notes else ""
    parts = [
        f'<article class="row{wide}" aria-labelledby="r{index}">\n'
        f'<div class="head"><h2 id="r{index}">{html.escape(row.title)}</h2>{notes}</div>\n'
        f'<div class="panels" style="--n:{max(1, len(row.panels))}">\n'
    ]
    for number, panel in enumerate(row.panels):
        _check_image(panel.image, f"rows[{index}].panels[{number}].image")
        height, width = panel.image.shape[:2]
        parts.append(
            f'<figure><img src="{_data_uri(panel.image)}" width="{width}" height="{height}" '
            f'loading="lazy" alt="{html.escape(f"{row.title}: {panel.caption}")}">'
            f"<figcaption>{html.escape(panel.caption)}</figcaption></figure>\n"
        )
    parts.append("</div>\n</article>\n")
    return "".join(parts)


def _table_html(
    table: Sequence[Sequence[str]], caption: str, lower_is_better: Collection[str]
) -> str:
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
    numbers = [_column([cells[i] for cells in body]) for i in range(len(header))]
    numbers[0] = None  # the first column names its row, also where the names are numbers
    best = [
        None if column is None else _best(column, header[i] in lower_is_better)
        for i, column in enumerate(numbers)
    ]
    note = "Best value of a column in bold." if any(b is not None for b in best) else ""
    # Outside the table, so that it wraps to the screen and does not scroll away with wide columns.
    parts = [
        '<section class="card">\n'
        f'<p class="caption" id="t">{html.escape(caption or "Table")} <small>{note}</small></p>\n'
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="t">\n'
        '<table aria-labelledby="t">\n<thead><tr>'
    ]
    for i, cell in enumerate(header):
        kind = "" if numbers[i] is None else ' class="num"'
        parts.append(f'<th scope="col"{kind}>{html.escape(cell)}</th>')
    parts.append("</tr></thead>\n<tbody>\n")
    for at, cells in enumerate(body):
        parts.append(f'<tr><th scope="row">{html.escape(cells[0])}</th>')
        for i, cell in enumerate(cells[1:], start=1):
            column, text = numbers[i], html.escape(cell)
            if column is None:
                parts.append(f"<td>{text}</td>")
            elif best[i] is not None and column[at] == best[i]:
                parts.append(f'<td class="num best"><strong>{text}</strong></td>')
            else:
                parts.append(f'<td class="num">{text}</td>')
        parts.append("</tr>\n")
    parts.append("</tbody>\n</table>\n</div>\n</section>\n")
    return "".join(parts)


def _column(cells: Sequence[str]) -> list[float] | None:
    """The numbers of a column, NaN where a cell is blank or a dash; None for a column of words."""
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


def _best(column: Sequence[float], lowest: bool) -> float | None:
    """The best number of a column; None where there is nothing to compare."""
    values = {n for n in column if not math.isnan(n)}
    if len(values) < 2:
        return None
    return min(values) if lowest else max(values)


def _data_uri(image: NDArray[np.uint8]) -> str:
    """A data URI of an image: PNG for masks and drawings, JPEG for photographs."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    if picture.getcolors(_PNG_COLOURS) is not None:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _style() -> str:
    """The style sheet, with the colour scale of the legend from the same table as the overlays."""
    text = resources.files("gcfast.images").joinpath("html.css").read_text(encoding="utf-8")
    stops = ", ".join("#" + color.tobytes().hex() for color in _ANCHORS[::3])
    return text.replace("COLOUR_SCALE", f"linear-gradient(90deg, {stops})")


def _check_image(image: NDArray[np.uint8], name: str) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"`{name}` must be a uint8 array, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"`{name}` must have shape [H, W, 3], got {list(image.shape)}")


def _check_heat(heat: NDArray[Any]) -> None:
    if not isinstance(heat, np.ndarray) or not np.issubdtype(heat.dtype, np.floating):
        kind = heat.dtype if isinstance(heat, np.ndarray) else type(heat).__name__
        raise TypeError(f"`heat` must be a floating-point array, got {kind}")
    if heat.ndim != 2:
        raise ValueError(f"`heat` must have shape [H, W], got {list(heat.shape)}")
    # Written so that NaN fails too; the slack is for maps rounded in half precision.
    if heat.size and not (heat.min() >= -1e-3 and heat.max() <= 1 + 1e-3):
        raise ValueError(f"`heat` must be in [0, 1], got {heat.min():.4g} to {heat.max():.4g}")


_LEGEND = (
    '<p class="legend"><span>cold</span><span class="bar" role="img" '
    'aria-label="colour scale from cold (black) over purple and orange to hot (pale yellow)">'
    "</span><span>hot</span></p>\n"
)
