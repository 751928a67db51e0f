"""The page that the demonstration writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

import gcfast
from gcfast import ops
from gcfast.demo.birds import SIZE, Picture, as_batch
from gcfast.demo.network import BirdNet
from gcfast.demo.species import SPECIES
from gcfast.images.html import Panel, ReportRow, write_report
from gcfast.images.overlay import overlay
from gcfast.metrics import mask_score

_TITLE = "Which part tells this bird apart?"
_LEAD = """\
All these birds are drawn, and the species differ only in the color of one part: a crown, a bill, \
a wing bar. A network learned half of the species. Every bird explained here is of the other half: \
its part has a color that the network never saw there. Plumage, pose, light and place vary, and \
berries and flowers have the same colors.

A map takes one forward pass. The bird is embedded, its nearest row in the database is found, and \
the channel weights of that row are applied to the bird's own feature maps. There is no label, no \
second picture and no backward pass.

The white outline is the answer: the part that tells the species. Neither the network nor the map \
was given its position: the network learned only from names, part and color, of birds that are \
otherwise alike. The pictures are the first of each family, not chosen by their result.
"""
_CAPTION = (
    "Share of the heat inside the bird's box, inside its outline (mask), and inside the part that "
    "tells its species (part); means over all unseen pictures. The first four rows are controls, "
    "the fifth is another method; the default is Grad-CAM, for, top-50."
)
_ZOOM = 2  # or the browser enlarges the picture and blurs it
_CLOSE_UP = 48  # pixels a side


def write_page(
    path: Path,
    *,
    network: BirdNet,
    explainer: gcfast.Explainer,
    against: gcfast.Explainer,
    rows: Sequence[Picture],
    shown: Sequence[Picture],
    table: Sequence[Sequence[str]],
    facts: Sequence[tuple[str, str]],
    seed: int,
) -> None:
    """Write the page.

    Args:
        path: the file.
        network: what is explained.
        explainer: with its database; evidence for.
        against: the same with evidence against.
        rows: the pictures of the database, in its rows' order.
        shown: pictures to explain, two rows of the page each.
        table: cells of the quality table, the header first.
        facts: (name, value) pairs for the tiles.
        seed: of the random rows that one of the controls takes its weights from.
    """
    images = as_batch(shown)
    why = explainer.explain_batch(images, details=True)
    near = [rows[row] for row in why.neighbors[:, 0].tolist()]
    against_maps = against.explain_batch(images)
    random_maps, sums = _control_maps(network, explainer, images, seed)

    def report_rows() -> Iterator[ReportRow]:
        for i, picture in enumerate(shown):
            part = _part(picture)
            yield ReportRow(
                title=_words(picture).capitalize(),
                panels=[
                    Panel(outlined(_enlarged(picture.image), picture.part), "unseen bird"),
                    _heated(picture, why.maps[i], "its heat map"),
                    Panel(close_up(picture, why.maps[i]), "where the map is hottest, enlarged"),
                    Panel(
                        outlined(_enlarged(near[i].image), near[i].part),
                        f"lent the weights: {_words(near[i])}",
                    ),
                ],
                notes=f"{_share(why.maps[i], picture.part):.0%} of the heat is on the {part}, "
                f"which is {picture.part.mean():.1%} of the picture",
            )
        for i, picture in enumerate(shown):
            yield ReportRow(
                title=f"{_words(picture).capitalize()}, next to other maps",
                panels=[
                    _heated(picture, why.maps[i], "evidence for the match, as above"),
                    _heated(picture, against_maps[i], "evidence against it"),
                    _heated(picture, random_maps[i], "control: weights of a random row"),
                    _heated(picture, sums[i], "control: all channels summed"),
                ],
            )

    write_report(
        path, title=_TITLE, lead=_LEAD, rows=report_rows(), table=table, table_caption=_CAPTION,
        facts=facts, table_last=True,
    )  # fmt: skip


def _control_maps(
    network: BirdNet, explainer: gcfast.Explainer, images: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make maps [B, S, S] with the weights of a random row, and of all channels alike."""
    database = explainer.database
    assert database is not None, "the page is written from a database"
    with torch.inference_mode():
        activations = network.feature_maps(images)
    B, C = activations.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(database), (B, 1), generator=generator)
    size = (images.shape[2], images.shape[3])
    return (
        ops.sparse_cam(activations, drawn, database.channels, database.weights, size=size),
        ops.sparse_cam(
            activations,
            torch.zeros(B, 1, dtype=torch.int64),
            torch.arange(C)[None],
            torch.ones(1, C),
            size=size,
        ),
    )


def _part(picture: Picture) -> str:
    return SPECIES[picture.label].part.replace("-", " ")


def _words(picture: Picture) -> str:
    return f"{SPECIES[picture.label].look} {_part(picture)}"


def _share(heat: torch.Tensor, part: np.ndarray) -> float:
    return float(mask_score(heat[None], torch.from_numpy(part)[None]))


def _enlarged(image: np.ndarray, zoom: int = _ZOOM) -> np.ndarray:
    size = (zoom * image.shape[1], zoom * image.shape[0])
    large: np.ndarray = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return large


def outlined(large: np.ndarray, mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Draw a white line with a dark rim around mask [h, w] on ``large``, a multiple of its size."""
    size = (large.shape[1], large.shape[0])
    zoom = large.shape[1] // mask.shape[1]
    # Blurred and cut again, so that the line is smooth.
    cover = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    inside = cover.filter(ImageFilter.GaussianBlur(0.6 * zoom)).point(lambda v: 255 * (v > 100))
    rings = [np.asarray(inside) > 0]
    for grow in (1, 1 + width, 2 + width):
        rings.append(np.asarray(inside.filter(ImageFilter.MaxFilter(2 * grow + 1))) > 0)
    lined = large.copy()
    lined[rings[3] & ~rings[0]] = (20, 20, 24)
    lined[rings[2] & ~rings[1]] = (255, 255, 255)
    return lined


def _heated(picture: Picture, heat: torch.Tensor, caption: str) -> Panel:
    large = _enlarged(picture.image)
    size = (large.shape[1], large.shape[0])
    values = heat.float().cpu().numpy()
    fine = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
    # Heat is on a few places of strong color: it is visible on a dim, gray picture.
    gray = 0.6 * large.mean(axis=2, keepdims=True).repeat(3, axis=2)
    shown = overlay(gray.astype(np.uint8), fine.clip(0, 1), alpha=0.95)
    return Panel(outlined(shown, picture.part), caption)


def close_up(picture: Picture, heat: torch.Tensor) -> np.ndarray:
    """Cut out the square around the hottest pixel of the map, as large as the other panels."""
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    y0, x0 = (min(max(v - _CLOSE_UP // 2, 0), len(heat) - _CLOSE_UP) for v in (y, x))
    cut = (slice(y0, y0 + _CLOSE_UP), slice(x0, x0 + _CLOSE_UP))
    zoom = _ZOOM * SIZE // _CLOSE_UP
    return outlined(_enlarged(picture.image[cut], zoom), picture.part[cut], width=2)
