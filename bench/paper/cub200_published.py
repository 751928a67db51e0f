"""What has been published about the experiments that `cub200.py` repeats.

Only figures whose source could be read when this was written are given. The numbers of the paper's
own Table 1, of its Figure 7, of its localisation accuracy and of its database of 50 centres could
not be, so they are absent (None) rather than quoted from memory; put in here, they are printed
beside ours.
"""

from __future__ import annotations

from typing import NamedTuple

PAPER = "Chen et al., WACV 2020, arXiv:2001.06538"


class Published(NamedTuple):
    """One figure, as a share of 1; None where its source could not be read."""

    row: str  # of our table
    column: str
    value: float | None
    source: str


FIGURES = (
    *(
        Published(f"{method}, against, {kind}", column, None, f"{PAPER}, Table 1")
        for method in ("Grad-CAM", "Grad-CAM++")
        for kind in ("one triplet", "all channels", "top-50")
        for column in ("box", "mask")
    ),
    Published("localisation", "best accuracy at IoU 0.5", None, f"{PAPER}"),
    Published("50 k-means centres", "mask", None, f"{PAPER}"),
    Published(
        "recall@1", "unseen species", 0.64,
        "about; README of the authors' MXNet example for Wu et al., ICCV 2017",
    ),
)  # fmt: skip


def published(row: str, column: str) -> Published | None:
    """The entry of a row and column, if there is one."""
    return next((f for f in FIGURES if (f.row, f.column) == (row, column)), None)
