"""Paths and shapes in comments, docstrings and pages: what they name has to exist.

    python .ci/check_text.py [FILE ...]

A path of the repository that is mentioned must be there. A trailing comment with a shape, such as
``# [B, T, C]``, may name the dimension letters of CONTRIBUTING.md and what the file names itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {".py", ".pyi", ".md", ".toml", ".yaml", ".cpp", ".hpp", ".txt"}
# What was, and what names paths of users.
LEFT_OUT = {"CHANGELOG.md", "tests/test_rooms.py"}
FOLDERS = "gcfast|kernels|csrc|tests|bench|docs|examples"
PATH = re.compile(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]*\w(?![\w*-])")
BUILT = ("gcfast/kernels", "bench/.cache", "bench/out")  # by an installation, or by a run
COMMENT = re.compile(r"\S  # (.*)")
SHAPE = re.compile(r"(?<![\w\])])\[([\w*+/ ,-]+)\]")
LETTERS = {"B", "T", "C", "P", "H", "W", "OH", "OW", "M", "K", "N", "D", "Q", "S", "G"}


def missing_paths(text: str) -> list[str]:
    """Paths in a text that neither are in the repository nor are built."""
    found = (match[0] for match in PATH.finditer(text))
    named = (p for p in found if "foo" not in p and not p.startswith(BUILT))
    return [p for p in named if not (ROOT / p).exists()]


def unknown_dimensions(text: str) -> list[str]:
    """Shape comments of Python code with a letter that neither the list nor the file explains."""
    explained = re.sub(r"\[[^\]]*\]", "", text)
    shapes = (shape for comment in COMMENT.findall(text) for shape in SHAPE.findall(comment))
    return [
        f"[{shape}]"
        for shape in shapes
        for letter in re.findall(r"\b[A-Z]{1,2}\b", shape)
        if letter not in LETTERS and not re.search(rf"\b{letter}\b", explained)
    ]


def main(names: list[str]) -> int:
    """Check the named files, or all that git knows, and print what is wrong."""
    if not names:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True)
        names = listed.stdout.decode().splitlines()
    problems = []
    for name in names:
        path = ROOT / name
        if path.suffix not in TEXTS or name in LEFT_OUT or not path.is_file():
            continue
        text = path.read_text()
        problems += [f"{name}: no such path: {missing}" for missing in missing_paths(text)]
        if path.suffix == ".py":
            problems += [f"{name}: unknown dimension in {s}" for s in unknown_dimensions(text)]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
