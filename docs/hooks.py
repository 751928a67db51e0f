"""Formulas and drawings, made while the site is built, so that a page loads nothing from elsewhere.

Formulas become MathML, which browsers draw themselves. A ``rooms`` block becomes the table of
imports between the packages, as tests/test_rooms.py finds it; a ``flow`` block, with lines "what
happens | where", becomes a row of boxes.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOTS = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "bench/RESULTS.md",
}
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>([\w.]+)</code>")
BLOCK = re.compile(r"^```(rooms|flow)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CELL, LABEL = 26, 110  # pixels: of the table of imports
WIDTH, HEIGHT, GAP = 340, 46, 22  # of a box


class Declarations(griffe.Extension):
    """Show what an operation returns, where its declaration says ``Outputs[...]``."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        """See griffe.Extension."""
        if isinstance(func.returns, griffe.ExprSubscript) and str(func.returns.left) == "Outputs":
            func.returns = func.returns.slice


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the picture of bench/RESULTS.md, which is a page."""
    for picture in sorted((ROOT / "bench" / "results").glob("*.png")):
        name = f"results/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Take the pages of the repository's root from there, and draw the blocks that are pictures."""
    root = ROOTS.get(page.file.src_uri)
    if root is not None:
        markdown = (ROOT / root).read_text().replace("](docs/", "](")
    return BLOCK.sub(lambda m: {"rooms": _rooms, "flow": _flow}[m[1]](m[2]), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Turn formulas into MathML, and the roles of docstrings, such as :class:, into links."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]).strip(), display=display))

    def linked(match: re.Match[str]) -> str:
        name = match[1] if match[1].startswith("gcfast") else f"gcfast.{match[1]}"
        return f'<autoref identifier="{name}" optional><code>{match[1]}</code></autoref>'

    return ROLE.sub(linked, MATH.sub(drawn, content))


def _svg(width: int, height: int, parts: list[str], title: str) -> str:
    return (
        f'<div><svg class="drawn" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg></div>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" {more}>{html.escape(text)}</text>'


def _rooms(_: str) -> str:
    """A dot where the package of a line imports that of a column; both go from top to bottom."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_rooms import ORDER, imports

    found = {(one.importer, one.imported) for one in imports(ROOT)}
    used = [room for room in ORDER if any(room in pair for pair in found)]
    parts = []
    for i, room in enumerate(used):
        at = LABEL + CELL * i + CELL / 2
        name = room or "gcfast"
        parts.append(_text(LABEL - 8, at + 4, name, "end"))
        parts.append(_text(at, LABEL - 8, name, more=f'transform="rotate(-60 {at} {LABEL - 8})"'))
        parts.append(f'<path class="rule" d="M{LABEL} {at}H{LABEL + CELL * len(used)}"/>')
        for j, other in enumerate(used):
            if (room, other) in found:
                x = LABEL + CELL * j + CELL / 2
                parts.append(f'<circle class="dot" cx="{x}" cy="{at}" r="6"/>')
    side = LABEL + CELL * len(used) + 60
    return _svg(side, side - 50, parts, "Imports between the packages: only rightwards, so down")


def _flow(text: str) -> str:
    """Boxes one below the other, with arrows between them and the place of each at its right."""
    steps = [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]
    parts = []
    for i, (what, where) in enumerate(steps):
        y = i * (HEIGHT + GAP) + 1
        if i:
            parts.append(
                f'<path class="arrow" d="M{WIDTH / 2} {y - GAP}v{GAP - 4}m-4 -5l4 5l4 -5"/>'
            )
        parts.append(f'<rect class="box" x="1" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        parts.append(_text(WIDTH / 2, y + HEIGHT / 2 + 5, what, "middle"))
        parts.append(_text(WIDTH + 16, y + HEIGHT / 2 + 5, where, "code"))
    return _svg(WIDTH * 2 + 40, len(steps) * (HEIGHT + GAP), parts, "Steps, one after the other")
