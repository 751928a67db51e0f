"""The options of ``gcfast build --ray`` and ``gcfast explain --ray``, and what runs them."""

from __future__ import annotations

import argparse

from gcfast.ray.actors import MAPS
from gcfast.ray.write import FORMATS

# Of overlays and the page, which a run on a cluster does not write.
_OF_PAGES = ("alpha", "dim", "overlays", "page_rows", "linked")


def add_ray(command: argparse.ArgumentParser) -> None:
    """Add what both commands have."""
    group = command.add_argument_group("Ray (the extra gcfast[ray])")
    group.add_argument(
        "--ray",
        action="store_true",
        help="work on a Ray cluster, that of RAY_ADDRESS or one of this machine alone; every node "
        "must see the same folders",
    )
    group.add_argument("--ray-address", metavar="ADDRESS", help='of a cluster: "auto", host:port')
    group.add_argument(
        "--actors", type=int, metavar="N", help="networks at work; default: what there is room for"
    )
    group.add_argument("--cpus", type=float, metavar="C", help="of each; default: 1")
    group.add_argument(
        "--gpus", type=float, metavar="G", help="of each, 0.25 is a share; default: 1, if there are"
    )
    group.add_argument(
        "--part-rows",
        type=int,
        metavar="R",
        help="pictures in a file of results, which is what a kill loses at most for each task",
    )


def add_ray_maps(explain: argparse.ArgumentParser) -> None:
    """Add what ``gcfast explain --ray`` writes instead of overlays and a page."""
    add_ray(explain)
    group = explain.add_argument_group("what --ray writes")
    group.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of maps")
    group.add_argument("--maps", choices=sorted(MAPS), default="uint8", help="dtype of maps")
    group.add_argument("--resume", action="store_true", help="leave out what --out has")
    explain.set_defaults(of_pages={name: explain.get_default(name) for name in _OF_PAGES})
