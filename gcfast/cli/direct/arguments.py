"""The arguments of ``gcfast explain`` and ``gcfast pair``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gcfast.cli.arguments import (
    _add_from_database,
    _add_lent,
    _add_model,
    _add_moved,
    _add_spec,
    _add_view,
    _command,
)
from gcfast.cli.on_ray import add_ray_maps


def add_explain(commands: Any) -> None:
    """Add ``gcfast explain``."""
    explain = _command(commands, "explain", "explain:explain_files", "heat maps of any pictures")
    explain.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures or folders")
    _add_from_database(explain, refine="auto", required=False)
    _add_moved(explain)
    explain.add_argument(
        "--text",
        metavar="TEXT",
        help="explain what speaks for a text, with a model of images and texts (hf/NAME); "
        "no database needed",
    )
    explain.add_argument(
        "--neutral",
        nargs="*",
        metavar="TEXT",
        help='texts whose mean is taken out of --text, if any; default: texts such as "a photo"',
    )
    _add_lent(explain)
    explain.add_argument(
        "--requery",
        action="store_true",
        help="search again by each map's hot pixels, and go over to a class that is nearer to them",
    )
    _add_overlays(explain)
    explain.add_argument(
        "--page-rows", type=int, default=200, metavar="N", help="pictures shown on index.html"
    )
    explain.add_argument(
        "--linked",
        type=int,
        default=20,
        metavar="N",
        help="pictures of these whose places are linked with their neighbor's; seconds each behind "
        "large transformers",
    )
    _add_alone(explain)
    _add_model(explain)
    add_ray_maps(explain)


def add_pair(commands: Any) -> None:
    """Add ``gcfast pair``."""
    pair = _command(commands, "pair", "direct.pair:explain_files", "why two pictures are close")
    pair.add_argument("query", type=Path, metavar="A", help="a picture")
    pair.add_argument("match", type=Path, metavar="B", help="another one")
    _add_from_database(pair, refine="auto", required=False)
    pair.add_argument(
        "--unlike",
        metavar="C",
        help="what to tell the pair from: a picture, mean for what all of the database's share, or "
        "none; default: mean with a database, none without",
    )
    pair.add_argument(
        "--no-places",
        action="store_true",
        help="do not link the places of the two, which takes seconds behind large transformers",
    )
    _add_overlays(pair)
    _add_alone(pair)
    _add_spec(pair, "model and machine")
    pair.set_defaults(images=None)  # neighbors' pictures are not shown


def _add_overlays(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alpha", type=float, default=0.8, help="opacity of the hottest heat")
    parser.add_argument(
        "--dim",
        type=float,
        default=0.5,
        help="share of its color, and half of it of its light, that a picture loses below its heat",
    )
    parser.add_argument(
        "--overlays",
        choices=["picture", "view"],
        default="picture",
        help="draw maps on the whole picture, what the network did not see dimmed, or on its view",
    )


def _add_alone(parser: argparse.ArgumentParser) -> None:
    _add_view(parser, "preprocessing without a database (default: what the model's library says)")
    alone = parser.add_argument_group("layer without a database")
    alone.add_argument("--layer", metavar="NAME", help="dotted name; default: the last spatial one")
    alone.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="the layer gives tokens, the first N of which are not image patches",
    )
