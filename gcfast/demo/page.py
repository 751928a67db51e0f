"""The page that the demonstration writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gcfast
from gcfast.demo.birds import Picture
from gcfast.demo.species import SPECIES
from gcfast.report import Panel, ReportRow, overlay, write_report

_TITLE = "What a network saw in birds it had never met"
_LEAD = """\
All these birds are drawn, and all are alike but for one part: a crown, a bill, a wing bar. The \
network learned to tell half of the species; every bird explained here is of the other half. \
Plumage, pose, light and place vary, and berries and flowers carry the same colours as the parts.

A map takes one forward pass. The bird is embedded, its nearest row in the database is found, and \
the channel weights of that row are laid on the bird's own feature maps. No label, no second \
picture and no backward pass take part. The pictures are the first of each family, not the best.
"""
_CAPTION = (
    "Share of the heat inside the bird's box, inside its outline (mask), and inside the part that "
    "tells its species (part); means over all unseen pictures. The first four rows are controls, "
    "the fifth is a rival; the default is Grad-CAM, for, top-50."
)


def write_page(
    path: Path,
    *,
    explainer: gcfast.Explainer,
    against: gcfast.Explainer,
    rows: Sequence[Picture],
    shown: Sequence[Picture],
    table: Sequence[Sequence[str]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the page.

    Args:
        path: the file.
        explainer: with its database; evidence for.
        against: the same with evidence against.
        rows: the pictures of the database, in its rows' order.
        shown: pictures to explain, one row of the page each.
        table: cells of the quality table, the header first.
        facts: (name, value) pairs for the tiles.
    """
    images = torch.stack([_tensor(picture) for picture in shown])
    why = explainer.explain_batch(images, details=True)
    near = [rows[row] for row in why.neighbors[:, 0].tolist()]
    near_maps = explainer.explain_batch(torch.stack([_tensor(picture) for picture in near]))
    against_maps = against.explain_batch(images)
    centred_maps = explainer.explain_batch(images, center=1.0)

    def report_rows() -> Iterator[ReportRow]:
        for i, picture in enumerate(shown):
            yield ReportRow(
                title=_words(picture),
                panels=[
                    Panel(_enlarged(picture.image), "unseen bird"),
                    _heated(picture, why.maps[i], "its heat map"),
                    Panel(_enlarged(near[i].image), f"lent the weights: {_words(near[i])}"),
                    _heated(near[i], near_maps[i], "the same weights on that bird"),
                ],
                notes=f"squared distance {why.distances[i, 0].item():.3f}",
            )
        for i, picture in enumerate(shown):
            yield ReportRow(
                title=f"{_words(picture)}: for, against, centred",
                panels=[
                    _heated(picture, why.maps[i], "evidence for the match"),
                    _heated(picture, against_maps[i], "evidence against it"),
                    _heated(picture, centred_maps[i], "for, less the usual response"),
                    Panel(_outlined(picture), "the part that tells"),
                ],
            )

    write_report(
        path, title=_TITLE, lead=_LEAD, rows=report_rows(), table=table, table_caption=_CAPTION,
        facts=facts,
    )  # fmt: skip


def _words(picture: Picture) -> str:
    species = SPECIES[picture.label]
    return f"{species.look} {species.part.replace('-', ' ')}"


def _tensor(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(picture.image).permute(2, 0, 1).float().div(255).contiguous()


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Twice the size, so that a screen does not blur it by its own means."""
    size = (2 * image.shape[1], 2 * image.shape[0])
    large: np.ndarray = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return large


def _heated(picture: Picture, heat: torch.Tensor, caption: str) -> Panel:
    large = _enlarged(picture.image)
    size = (large.shape[1], large.shape[0])
    values = heat.float().cpu().numpy()
    fine = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
    return Panel(overlay(large, fine.clip(0, 1)), caption)


def _outlined(picture: Picture) -> np.ndarray:
    """The picture with all but the part faded to grey."""
    grey = picture.image.mean(axis=2, keepdims=True) * 0.45 + 90
    faded = np.where(picture.part[..., None], picture.image, grey)
    return _enlarged(faded.astype(np.uint8))
