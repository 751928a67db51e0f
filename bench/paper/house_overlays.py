"""What the maps of `house_prices.py` look like: one PNG of captioned rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from house_data import Houses
from house_maps import CHANNELS, explainer, strongest
from house_network import RankSiamese, to_input
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import gcfast
from gcfast.images.overlay import overlay

SIDE = 160  # pixels of a tile on the page
HEAD = 14  # of a caption
QUESTIONS = {"all": "all pairs (paper)", "lower": "what adds", "higher": "what takes away"}


def save_overlays(
    network: RankSiamese,
    houses: Houses,
    databases: Mapping[str, gcfast.Database],
    path: Path,
    seed: int,
    count: int = 6,
) -> None:
    """Test houses drawn at random, half from the dearest third, half from the cheapest.

    Each row: the tile, the nearest training house's tile, and a map for each question, each from
    its own nearest row.
    """
    n = houses.train
    rng = np.random.default_rng([seed, 31])
    ranked = n + np.argsort(houses.price[n:])
    third = max(1, len(ranked) // 3)
    chosen = [
        int(i)
        for part in (ranked[-third:], ranked[:third])
        for i in rng.choice(part, min(count, len(part)), replace=False)
    ]
    images = to_input(houses.images[chosen])
    panels: list[list[tuple[NDArray[np.uint8], str]]] = [
        [(houses.images[i], f"sold for {houses.price[i]:,.0f}")] for i in chosen
    ]
    for question, caption in QUESTIONS.items():
        database = strongest(databases[question], CHANNELS)
        one = explainer(network, question, seed, database=database)
        why = one.explain_batch(images, details=True)
        for at, i in enumerate(chosen):
            if question == "all":
                row = int(database.ids[int(why.neighbors[at, 0])])
                price = float(why.labels[at, 0])
                panels[at].append((houses.images[row], f"nearest: {price:,.0f}"))
            panels[at].append((overlay(houses.images[i], why.maps[at].numpy()), caption))
    lines = [np.concatenate([_panel(*panel) for panel in row], axis=1) for row in panels]
    half = len(lines) // 2
    columns = [np.concatenate(part) for part in (lines[:half], lines[half:])]
    gap = np.full((len(columns[0]), 10, 3), 255, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([columns[0], gap, columns[1]], axis=1)).save(path)


def _panel(image: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    page = Image.new("RGB", (SIDE + 2, SIDE + HEAD + 2), "white")
    tile = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    page.paste(tile, (1, HEAD + 1))
    ImageDraw.Draw(page).text((2, 1), caption, fill=(20, 20, 20))
    return np.asarray(page)
