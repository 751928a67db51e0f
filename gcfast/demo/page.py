"""The page that the demonstration writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

A map takes one forward pass. The bird is embedded, its nearest row in the database is found, what \
sets that row's class apart weighs the bird's own feature maps, and an earlier layer makes the map \
finer. There is no label, no second picture and no backward pass. The white outline is the answer, \
the part that tells the species; neither the network nor the map was given its position. The \
pictures are the first of each family, not chosen by their result.

Mind the control. The channels of this network fire on little but such parts, so that their plain \
sum, which knows no neighbor, finds the part as well, and refined better. Which of two things a \
match rests on it cannot tell; a picture of one bird does not ask.
"""
_CAPTION = (
    "Share of the heat inside the bird's box, inside its outline (mask), and inside the part that "
    "tells its species (part); means over all unseen pictures. The first four rows are controls, "
    "the fifth is another method; the default is Grad-CAM, for, top-50. The last are beyond the "
    "paper: above, the pictures show class proxy, refined."
)
_ZOOM = 2  # or the browser enlarges the picture and blurs it
_CLOSE_UP = 48  # pixels a side
_FOUND, _PARTLY = 0.5, 0.2  # shares of the heat on the part, which is a hundredth of the picture
_DIM = 0.7  # what pictures lose below their heat, which is on a few places of strong color


def write_page(
    path: Path,
    *,
    network: BirdNet,
    explainer: gcfast.Explainer,
    transfer: gcfast.Explainer,
    rows: Sequence[Picture],
    shown: Sequence[Picture],
    families: Mapping[str, Sequence[float]],
    table: Sequence[Sequence[str]],
    facts: Sequence[tuple[str, str]],
    seed: int,
) -> None:
    """Write the page.

    Args:
        path: the file.
        network: what is explained.
        explainer: with its database; its maps are shown.
        transfer: with Grad-CAM's database, whose maps are shown on demand.
        rows: the pictures of the database, in its rows' order.
        shown: pictures to explain, a row of the page each.
        families: part → its share of the heat, of every unseen picture that it tells.
        table: cells of the quality table, the header first.
        facts: (name, value) pairs for the tiles.
        seed: of the random rows that one of the controls takes its weights from.
    """
    images = as_batch(shown)
    why = explainer.explain_batch(images, details=True)
    near = [rows[row] for row in why.neighbors[:, 0].tolist()]
    near_maps = explainer.explain_batch(as_batch(near))
    plain_maps = transfer.explain_batch(images)
    summed, random = control_maps(network, transfer, images, seed)

    def report_rows() -> Iterator[ReportRow]:
        for i, picture in enumerate(shown):
            heat = why.maps[i]
            yield ReportRow(
                title=_words(picture).capitalize(),
                notes=f"{_share(heat, picture.part):.0%} of the heat is on the {_part(picture)}, "
                f"which is {picture.part.mean():.1%} of the picture",
                panels=[
                    Panel(outlined(_enlarged(picture.image), picture.part), "unseen bird"),
                    _heated(picture, heat, "its heat map"),
                    Panel(close_up(picture, heat), "where it is hottest, enlarged"),
                    _heated(near[i], near_maps[i], f"the nearest, {_words(near[i])}, and its heat"),
                ],
                comment=comment(picture, heat, near[i], families[SPECIES[picture.label].part]),
                more=[
                    _heated(picture, plain_maps[i], "Grad-CAM, not refined"),
                    _heated(picture, summed[i], "control: all channels summed, refined"),
                    _heated(picture, random[i], "control: weights of a random row, refined"),
                    Panel(outlined(_enlarged(near[i].image), near[i].part), "the nearest"),
                ],
                more_label="Other maps of this bird",
            )

    write_report(
        path, title=_TITLE, lead=_LEAD, rows=report_rows(), table=table, table_caption=_CAPTION,
        facts=facts, table_last=True,
    )  # fmt: skip


def control_maps(
    network: BirdNet, transfer: gcfast.Explainer, images: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make refined maps [B, S/2, S/2] of all channels alike, and with the weights of a random row.

    Args:
        network: gives the feature maps.
        transfer: with the database that the weights are taken from.
        images: [B, 3, S, S].
        seed: of the rows that are drawn.
    """
    database = transfer.database
    assert database is not None, "the weights are a database's"
    with torch.inference_mode():
        finer, maps = network.outputs(images)
        B, C, H, W = maps.shape
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(database), (B, 1), generator=generator)
        summed = ops.dense_cam(maps, maps.new_ones(B, C), size=(H, W))
        random = ops.sparse_cam(maps, drawn, database.channels, database.weights, size=(H, W))
        return ops.refine(summed, finer), ops.refine(random, finer)


def comment(picture: Picture, heat: torch.Tensor, near: Picture, family: Sequence[float]) -> str:
    """Say whether a map [S, S] found the part, how it failed if not, and how others fare.

    Args:
        picture: what is explained.
        heat: its map.
        near: the picture of its nearest row.
        family: shares of the heat on the part, of the unseen birds that it tells.
    """
    part = _part(picture)
    mean = sum(family) / len(family)
    others = f"All {len(family)} unseen birds told by their {part}: {mean:.0%} on average."
    if (share := _share(heat, picture.part)) >= _FOUND:
        return f"Found. {others}"
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    if picture.part[y, x]:
        where = f"the hottest place is on the {part}, but much of the heat is beside it"
    elif picture.bird[y, x]:
        where = "the hottest place is elsewhere on the bird"
    else:
        where = "the hottest place is not on the bird, among things in the colors of parts"
    told = f"The nearest row is told by its {_part(near)}"
    told += "." if _part(near) == part else ", another part: a proxy of the wrong kind."
    return f"{'Found in part' if share >= _PARTLY else 'Missed'}: {where}. {told} {others}"


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
    return Panel(outlined(_lit(large, heat.float().cpu().numpy()), picture.part), caption)


def _lit(large: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a map of any size over a picture, dim and nearly gray so that the heat stands out."""
    size = (large.shape[1], large.shape[0])
    fine = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    return overlay(large, np.sqrt(fine), alpha=1.0, dim=_DIM)


def close_up(picture: Picture, heat: torch.Tensor) -> np.ndarray:
    """Cut out the square around the hottest pixel of the map, as large as the other panels."""
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    y0, x0 = (min(max(v - _CLOSE_UP // 2, 0), len(heat) - _CLOSE_UP) for v in (y, x))
    cut = (slice(y0, y0 + _CLOSE_UP), slice(x0, x0 + _CLOSE_UP))
    zoom = _ZOOM * SIZE // _CLOSE_UP
    large = _lit(_enlarged(picture.image[cut], zoom), heat.float().cpu().numpy()[cut])
    return outlined(large, picture.part[cut], width=2)
