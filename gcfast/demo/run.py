"""The demonstration behind ``gcfast demo``: draw, build, explain, measure, and write the page.

Nothing is downloaded and nothing is tuned: the network ships with gcfast, the settings are
``gcfast.BEST`` and the defaults, and the pictures shown are the first of each family, not chosen by
their result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import gcfast
from gcfast._progress import tracked
from gcfast.demo.birds import Picture, as_batch, draw_bird
from gcfast.demo.network import BirdNet, load_network
from gcfast.demo.page import control_maps, write_page
from gcfast.demo.species import PARTS, SPECIES, TRAINING_LABELS, UNSEEN_LABELS
from gcfast.evaluation.table import MAIN_ROW, QualityTable, quality_table
from gcfast.metrics import RegionSums, box_masks, region_sums

BEST_ROW = "class proxy, refined"
SUM_ROW, RANDOM_ROW = "channel sum, refined", "random neighbor, refined"
_LAYER = "features"
_BATCH = 54
_SPEED_BATCH = 32


@dataclass(frozen=True)
class Speed:
    """Medians of paired runs on one batch.

    Attributes:
        images_per_second: of ``explain_batch``.
        to_forward: its time divided by that of ``model(x)`` as a user writes it.
        to_channels_last: its time divided by that of the forward pass with channels-last input.
    """

    images_per_second: float
    to_forward: float
    to_channels_last: float


def _batches(pictures: Sequence[Picture]) -> Iterator[Sequence[Picture]]:
    for first in range(0, len(pictures), _BATCH):
        yield pictures[first : first + _BATCH]


class Pictures:
    """Drawn pictures as a loader, any number of passes: (images [B, 3, S, S], names, ids)."""

    def __init__(self, pictures: Sequence[Picture], ids: Sequence[str]) -> None:
        self.pictures = pictures
        self.ids = ids

    def __len__(self) -> int:
        return -(-len(self.pictures) // _BATCH)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str], list[str]]]:
        ids = iter(self.ids)
        for part in _batches(self.pictures):
            names = [SPECIES[picture.label].name for picture in part]
            yield as_batch(part), names, list(islice(ids, len(part)))


@dataclass(frozen=True)
class Truth:
    """The regions that the maps of a batch are scored on."""

    boxes: torch.Tensor  # [B, 4]
    birds: torch.Tensor  # [B, S, S] bool
    parts: torch.Tensor  # [B, S, S] bool


def run_demo(
    out_dir: Path,
    *,
    seed: int = 0,
    progress: bool = False,
    training_each: int = 24,
    unseen_each: int = 8,
    speed_rounds: int = 9,
    echo: Callable[[str], None] = print,
) -> None:
    """Run the whole demonstration; prints its table and writes ``out_dir``/index.html.

    Args:
        out_dir: folder for the page, made if missing.
        seed: of the pictures and of the triplets.
        progress: show progress bars.
        training_each: pictures of each training species, at least 2; the database's rows.
        unseen_each: pictures of each unseen species, at least 1; they are explained and scored.
        speed_rounds: how often each timed call is run, at least 1.
        echo: takes the lines of the report.

    Raises:
        ValueError: too few pictures asked for.
        OSError: the page cannot be written.
    """
    if training_each < 2:
        raise ValueError(f"`training_each` must be at least 2, got {training_each}")
    if unseen_each < 1:
        raise ValueError(f"`unseen_each` must be at least 1, got {unseen_each}")
    if speed_rounds < 1:
        raise ValueError(f"`speed_rounds` must be at least 1, got {speed_rounds}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    network = load_network()
    train, unseen = draw_pictures(seed, training_each, unseen_each, progress=progress)

    explainer = gcfast.Explainer(network, layer=_LAYER, **gcfast.BEST)
    begun = time.perf_counter()
    database = explainer.build(train, progress=progress)
    build_seconds = time.perf_counter() - begun
    transfer = gcfast.Explainer(network, layer=_LAYER, seed=seed)
    transfer.build(train, progress=progress)

    batches = list(scored(unseen.pictures))
    table = quality_table(transfer, train, batches, Score(), seed=seed, progress=progress)
    labels = add_refined_rows(table, explainer, transfer, network, batches, seed)
    same_part = share_of_same_part(database, labels, unseen.pictures)
    speed = measure_speed(explainer, network, unseen.pictures, speed_rounds)
    part_means = {name: means["part"] for name, means in table.rows}
    facts = [
        ("of the heat is on the part that tells the species", f"{part_means[BEST_ROW]:.1%}"),
        ("control: all channels summed, refined as well", f"{part_means[SUM_ROW]:.1%}"),
        ("Grad-CAM, not refined", f"{part_means[MAIN_ROW]:.1%}"),
        ("control: all channels summed, not refined", f"{part_means['channel sum']:.1%}"),
        ("is the part's share of the picture", f"{part_means['uniform']:.1%}"),
        ("pictures in the database, and unseen ones explained",
         f"{len(train.pictures)}, {len(unseen.pictures)}"),
        ("to build it, drawing not counted", f"{build_seconds:.1f} s"),
        ("have a nearest row told by the same part", f"{same_part:.0%}"),
        ("images explained a second", f"{speed.images_per_second:.0f}"),
        ("time against model(x), and channels-last",
         f"{speed.to_forward:.2f}×, {speed.to_channels_last:.2f}×"),
    ]  # fmt: skip
    echo(
        f"Share of the heat inside the box, the outline (mask) and the telling part of "
        f"{len(unseen.pictures)} birds of {len(UNSEEN_LABELS)} unseen species"
    )
    echo("")
    echo(str(table))
    echo("")
    for name, value in facts:
        echo(f"{name}: {value}")
    page = out_dir / "index.html"
    pictures_by_id = dict(zip(train.ids, train.pictures, strict=True))
    write_page(
        page,
        network=network,
        explainer=explainer,
        transfer=transfer,
        rows=[pictures_by_id[row_id] for row_id in database.ids],
        shown=_first_of_each_part(unseen.pictures),
        families=_by_part(unseen.pictures, table.scores[BEST_ROW]["part"].tolist()),
        table=table.cells(),
        facts=facts,
        seed=seed,
    )
    echo(f"page: {page} ({time.perf_counter() - start:.0f} s in all)")


def measure_speed(
    explainer: gcfast.Explainer, network: BirdNet, pictures: Sequence[Picture], rounds: int
) -> Speed:
    """Time ``explain_batch`` and the two forward passes, alternating, on one batch."""
    images = as_batch([pictures[i % len(pictures)] for i in range(_SPEED_BATCH)])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    runs: list[Callable[[], object]] = [
        lambda: explainer.explain_batch(images),
        lambda: network(images),
        lambda: network(channels_last),
    ]
    times: list[list[float]] = []
    with torch.inference_mode():
        for run in runs:
            run()
        for turn in range(rounds):
            taken = [0.0] * len(runs)
            # Each takes every place in the order equally often, so that clock drift cancels.
            for place in range(len(runs)):
                which = (place + turn) % len(runs)
                begun = time.perf_counter()
                runs[which]()
                taken[which] = time.perf_counter() - begun
            times.append(taken)
    return Speed(
        images_per_second=_SPEED_BATCH / statistics.median(t[0] for t in times),
        to_forward=statistics.median(t[0] / t[1] for t in times),
        to_channels_last=statistics.median(t[0] / t[2] for t in times),
    )


def draw_pictures(
    seed: int, training_each: int, unseen_each: int, *, progress: bool = False
) -> tuple[Pictures, Pictures]:
    """Draw the pictures of the database and the unseen ones, as loaders."""
    train = _draw(TRAINING_LABELS, training_each, seed, 0, "drawing training birds", progress)
    # Another stream of the seed: no unseen picture shares its scene with a training one.
    unseen = _draw(UNSEEN_LABELS, unseen_each, seed, 1, "drawing unseen birds", progress)
    return train, unseen


def _draw(
    labels: Sequence[int], each: int, seed: int, stream: int, words: str, progress: bool
) -> Pictures:
    tasks = [(label, i) for label in labels for i in range(each)]
    pictures, ids = [], []
    for label, i in tracked(tasks, words, "pictures", show=progress):
        index = (label * each + i) * 2 + stream
        pictures.append(draw_bird(label, seed=seed, index=index))
        ids.append(f"{SPECIES[label].name}/{i:03d}")
    return Pictures(pictures, ids)


def scored(pictures: Sequence[Picture]) -> Iterator[tuple[torch.Tensor, Truth]]:
    """Iterate over batches of pictures with their truth, for ``quality_table``."""
    for part in _batches(pictures):
        truth = Truth(
            boxes=torch.tensor([picture.box for picture in part]),
            birds=torch.from_numpy(np.stack([picture.bird for picture in part])),
            parts=torch.from_numpy(np.stack([picture.part for picture in part])),
        )
        yield as_batch(part), truth


class Score:
    """Score the share of the heat inside the box, the bird and the telling part."""

    def regions(self, truth: Truth) -> torch.Tensor:
        """Return masks [B, 3, S, S] bool: box, bird, part."""
        boxes = box_masks(truth.boxes, *truth.birds.shape[1:])
        return torch.stack([boxes, truth.birds, truth.parts], 1)

    def scores(
        self, sums: RegionSums, _truth: Truth, _neighbor_labels: list[str]
    ) -> dict[str, torch.Tensor]:
        """Return the shares by name, [B, V] each."""
        return dict(zip(("box", "mask", "part"), sums.shares().unbind(2), strict=True))


def add_refined_rows(
    table: QualityTable,
    explainer: gcfast.Explainer,
    transfer: gcfast.Explainer,
    network: BirdNet,
    batches: Sequence[tuple[torch.Tensor, Truth]],
    seed: int,
) -> list[int]:
    """Add the rows beyond the paper to a table of the same batches.

    Returns:
        The label in the database of each image's nearest row.
    """
    refined = gcfast.Explainer(
        network, layer=_LAYER, database=transfer.database, refine="auto", seed=seed
    )
    labels: list[int] = []
    parts: dict[str, list[torch.Tensor]] = {}
    for images, truth in batches:
        why = explainer.explain_batch(images, details=True)
        labels += why.labels[:, 0].tolist()
        # Each batch draws other rows.
        summed, random = control_maps(network, transfer, images, seed + len(labels))
        rows = {
            BEST_ROW: why.maps,
            f"{MAIN_ROW}, refined": refined.explain_batch(images),
            SUM_ROW: summed,
            RANDOM_ROW: random,
        }
        for name, maps in rows.items():
            sums = region_sums(maps[:, None], Score().regions(truth))
            parts.setdefault(name, []).append(sums.shares()[:, 0])
    for name, shares in parts.items():
        columns = torch.cat(shares).unbind(1)
        table.scores[name] = dict(zip(table.columns, columns, strict=True))
    return labels


def share_of_same_part(
    database: gcfast.Database, labels: Sequence[int], unseen: Sequence[Picture]
) -> float:
    """Return how often the nearest row, of which ``labels`` are, is told by the same part."""
    part_of = {species.name: species.part for species in SPECIES}
    near = [part_of[database.label_name(label)] for label in labels]
    same = [a == SPECIES[b.label].part for a, b in zip(near, unseen, strict=True)]
    return sum(same) / len(same)


def _by_part(pictures: Sequence[Picture], values: Sequence[float]) -> dict[str, list[float]]:
    """Group values of pictures by the part that tells each."""
    groups: dict[str, list[float]] = {}
    for picture, value in zip(pictures, values, strict=True):
        groups.setdefault(SPECIES[picture.label].part, []).append(value)
    return groups


def _first_of_each_part(pictures: Sequence[Picture]) -> list[Picture]:
    """Return the first picture of each family, in order: not chosen by its result."""
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(SPECIES[picture.label].part, picture)
    return [first[part] for part in PARTS]
