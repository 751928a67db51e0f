"""The arguments of ``gcfast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gcfast.cli.arguments import _add_lent, _add_refine, _add_spec, _command


def add_export(commands: Any) -> None:
    """Add the command to the parser's."""
    export = _command(
        commands,
        "export",
        "export.command:export_database",
        "write network, search and maps as one file, for runtimes without gcfast",
    )
    export.add_argument("--database", type=Path, required=True, metavar="DB")
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="NAME.onnx, or NAME.pt2 for AOTInductor, which takes a C++ compiler and minutes",
    )
    export.add_argument("--force", action="store_true", help="replace an existing file")
    export.add_argument(
        "--tables",
        choices=["inside", "external", "inputs"],
        default="inside",
        help="the database is in the file, in FILE.data, or an input of the graph (.onnx)",
    )
    export.add_argument(
        "--dynamic",
        nargs="*",
        choices=["batch", "height", "width"],
        help="what of the pictures may differ later; default: batch",
    )
    export.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="pictures at once, if not dynamic"
    )
    export.add_argument(
        "--details",
        action="store_true",
        help="also give embeddings, neighbors, distances and labels",
    )
    _add_lent(export, index=False)
    _add_refine(export, "auto")
    export.set_defaults(images=None)

    _add_spec(export, "model")
