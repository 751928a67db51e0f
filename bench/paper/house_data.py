"""Houses that were sold: generated ones, and the reader for anyone's.

On disk: a folder of tiles and a CSV in UTF-8 with the columns

    tile,date,price,latitude,longitude,bedrooms,bathrooms,type,area

`tile` names a picture under the folder, `date` is ISO (2019-04-30), `area` the floor area in square
metres. Masks are optional: pictures of the same names in a second folder whose pixels are 0, or 1 +
the number of a part in house_tiles.PARTS.

Sales data are noisy. A row without a usable price, date or tile cannot take part: it is left out,
counted and listed; so is one whose price is not within a factor of 20 of the median (houses change
hands for 1 between relatives). A missing or impossible attribute is imputed, counted and listed: by
the median of the usable values of the training rows (for `type` by the most frequent one), so that
nothing of the test rows is used.
"""

from __future__ import annotations

import csv
import datetime
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from house_tiles import PARTS, Lot, draw_tile
from numpy.typing import NDArray
from PIL import Image

COLUMNS = (
    "tile", "date", "price", "latitude", "longitude", "bedrooms", "bathrooms", "type", "area",
)  # fmt: skip
# What an attribute can be: [low, high].
POSSIBLE = {
    "latitude": (-90.0, 90.0),
    "longitude": (-180.0, 180.0),
    "bedrooms": (1.0, 20.0),
    "bathrooms": (0.5, 20.0),
    "area": (10.0, 5000.0),
}
PRICE_FACTOR = 20.0  # a price further than this from the median is none
TRAIN_SHARE = 0.6  # by time, as the paper splits its houses
FIRST_DAY = datetime.date(2018, 1, 1)
DAYS = 450


@dataclass
class Report:
    """What the reader left out or filled in."""

    rows: int = 0
    skipped: list[str] = field(default_factory=list)
    imputed: list[str] = field(default_factory=list)

    def lines(self, limit: int = 10) -> list[str]:
        """Counts, then the first of each kind."""
        reasons = Counter(line.split(": ", 1)[1].split(",")[0] for line in self.skipped)
        filled = Counter(line.split(": ", 1)[1].split(",")[0] for line in self.imputed)
        out = [f"{self.rows} rows read, {len(self.skipped)} left out, {len(self.imputed)} values "
               "imputed"]  # fmt: skip
        for name, counts, listed in (("left out", reasons, self.skipped),
                                     ("imputed", filled, self.imputed)):  # fmt: skip
            out += [f"{name}: {reason}, {count}" for reason, count in sorted(counts.items())]
            out += [f"  {line}" for line in listed[:limit]]
            if len(listed) > limit:
                out.append(f"  … and {len(listed) - limit} more")
        return out


@dataclass
class Houses:
    """N houses in the order of their sale.

    Attributes:
        images: uint8 [N, S, S, 3].
        masks: bool [N, 4, S, S] in the order of house_tiles.PARTS; None where there are none.
        price: float64 [N].
        numbers: attribute to float64 [N]: latitude, longitude, bedrooms, bathrooms, area.
        kind: the `type` of each.
        ids: `tile` of each.
        train: how many, from the first on, are for training.
        report: what the reader had to do.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_] | None
    price: NDArray[np.float64]
    numbers: dict[str, NDArray[np.float64]]
    kind: list[str]
    ids: list[str]
    train: int
    report: Report

    def __len__(self) -> int:
        return len(self.price)


def generate(folder: Path, *, count: int, pixels: int, seed: int) -> None:
    """Write `count` made-up sales: tiles, masks and sales.csv, each from `seed` alone.

    The logarithm of a price is a sum. Not to be seen on the tile: the place (a city with a dear
    centre and a dear lake side), bedrooms, bathrooms, the floor area but for the roof, the month,
    and noise. To be seen: a pool adds 0.16, trees 1.6 for each share of the tile that they cover, a
    busy road takes 0.22. The floor area, which adds 0.45 of its logarithm, shows in the roof.
    A few cells of the table are missing or impossible, as in real sales.
    """
    tiles, masks = folder / "tiles", folder / "masks"
    tiles.mkdir(parents=True, exist_ok=True)
    masks.mkdir(exist_ok=True)
    rng = np.random.default_rng([seed, 11])
    days = np.sort(rng.integers(0, DAYS, count))
    rows = []
    for i in range(count):
        row, lot, base = _sale(rng)
        image, shown = draw_tile(lot, pixels, np.random.default_rng([seed, 12, i]))
        cover = dict(zip(PARTS, shown.mean((1, 2)), strict=True))
        seen = 0.16 * lot.pool + 1.6 * cover["trees"] - 0.22 * lot.busy
        price = math.exp(base + seen + 0.002 * days[i] / 30 + rng.normal(0, 0.06))
        name = f"{i:05d}.png"
        Image.fromarray(image).save(tiles / name)
        index = (shown * np.arange(1, len(PARTS) + 1)[:, None, None]).sum(0)
        Image.fromarray(index.astype(np.uint8)).save(masks / name)
        day = FIRST_DAY + datetime.timedelta(days=int(days[i]))
        rows.append({"tile": name, "date": day.isoformat(), "price": f"{price:.0f}", **row})
    for row in rows:
        _spoil(row, rng)
    with (folder / "sales.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _sale(rng: np.random.Generator) -> tuple[dict[str, str], Lot, float]:
    """Attributes of a house, its lot, and the part of its log price that no tile shows."""
    x, y = rng.uniform(-1, 1, 2)
    place = 0.28 * math.exp(-3 * (x * x + y * y)) + 0.16 * math.exp(-8 * (y + 0.8) ** 2) - 0.1 * x
    kind = str(rng.choice(["detached", "semi", "townhouse"], p=[0.5, 0.28, 0.22]))
    area = {"detached": 185, "semi": 135, "townhouse": 112}[kind] * math.exp(rng.normal(0, 0.22))
    storeys = 2 if rng.random() < (0.55 if kind == "detached" else 0.9) else 1
    bedrooms = int(np.clip(round(0.6 + area / 62 + rng.normal(0, 0.6)), 1, 6))
    bathrooms = float(np.clip(round(2 * (0.55 * bedrooms + rng.normal(0.3, 0.45))) / 2, 1, 5))
    green = np.clip(0.42 + 0.5 * place + rng.normal(0, 0.3), 0, 1)
    lot = Lot(
        kind=kind,
        footprint=float(np.clip(1.05 * area / storeys, 45, 230)),
        storeys=storeys,
        pool=bool(rng.random() < (0.38 if kind == "detached" else 0.16)),
        trees=int(rng.poisson(1 + 16 * green)),
        busy=bool(rng.random() < 0.3),
    )
    base = 13.1 + place + 0.035 * bedrooms + 0.06 * bathrooms + 0.45 * math.log(area / 150)
    base += {"detached": 0.1, "semi": 0.0, "townhouse": -0.06}[kind]
    row = {
        "latitude": f"{43.7 + 0.12 * y:.5f}",
        "longitude": f"{-79.4 + 0.17 * x:.5f}",
        "bedrooms": str(bedrooms),
        "bathrooms": f"{bathrooms:g}",
        "type": kind,
        "area": f"{area:.0f}",
    }
    return row, lot, base


def _spoil(row: dict[str, str], rng: np.random.Generator) -> None:
    """Make a few cells missing or impossible: one row in 20 an attribute, one in 200 the price."""
    if rng.random() < 0.05:
        column = str(rng.choice(["bedrooms", "bathrooms", "area", "type", "latitude"]))
        wrong = {"bedrooms": "99", "bathrooms": "-1", "area": "0", "type": "", "latitude": "0x2B"}
        row[column] = "" if rng.random() < 0.6 else wrong[column]
    if rng.random() < 0.005:
        row["price"] = str(rng.choice(["", "0", "1", "n/a"]))


def read_houses(tiles: Path, sales: Path, masks: Path | None = None) -> Houses:
    """Read anyone's houses; the module's docstring says what becomes of noisy rows.

    Args:
        tiles: the folder of tiles. All are brought to the size of the first one.
        sales: the CSV file.
        masks: the folder of masks.

    Raises:
        FileNotFoundError: a folder or the file is not there.
        ValueError: a column is missing, fewer than ten rows are usable, or a mask is missing,
            unreadable or of another size than its tile.
    """
    for path, what in ((tiles, "tiles"), (sales, "csv"), (masks, "masks")):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"`{what}` must exist, got {path}")
    with sales.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"`csv` must have the columns {', '.join(COLUMNS)}; {sales} lacks "
                             f"{', '.join(missing)}")  # fmt: skip
        table = list(reader)
    report = Report(rows=len(table))
    usable: list[tuple[datetime.date, dict[str, str], float, NDArray[np.uint8]]] = []
    side = None
    prices = [_number(row["price"]) for row in table]
    typical = float(np.median([p for p in prices if p > 0] or [1.0]))
    for number, (row, price) in enumerate(zip(table, prices, strict=True), 2):
        where = f"line {number}"
        if not price > 0:
            report.skipped.append(f"{where}: no usable price, {row['price']!r}")
            continue
        if not typical / PRICE_FACTOR <= price <= typical * PRICE_FACTOR:
            report.skipped.append(f"{where}: impossible price, {row['price']!r}")
            continue
        try:
            day = datetime.date.fromisoformat((row["date"] or "").strip())
        except ValueError:
            report.skipped.append(f"{where}: no usable date, {row['date']!r}")
            continue
        image = _picture(tiles / (row["tile"] or ""), "RGB", side)
        if image is None:
            report.skipped.append(f"{where}: no readable tile, {row['tile']!r}")
            continue
        side = image.shape[0]
        usable.append((day, row, price, image))
    if len(usable) < 10:
        raise ValueError(f"`csv` must have at least ten usable rows, {sales} has {len(usable)}: "
                         + "; ".join(report.skipped[:3]))  # fmt: skip
    usable.sort(key=lambda sale: sale[0])  # stable: sales of one day stay in the file's order
    train = round(TRAIN_SHARE * len(usable))
    rows = [sale[1] for sale in usable]
    shown = None
    if masks is not None:
        assert side is not None
        loaded = [_picture(masks / row["tile"], "L", side) for row in rows]
        lost = [row["tile"] for row, mask in zip(rows, loaded, strict=True) if mask is None]
        if lost:
            raise ValueError(f"`masks` must have a picture for each tile, {len(lost)} are missing "
                             f"or unreadable: {', '.join(lost[:3])}")  # fmt: skip
        other = [
            f"{row['tile']} has {a[0]} x {a[1]}, its tile {b[0]} x {b[1]}"
            for row in rows
            if (a := _size(masks / row["tile"])) != (b := _size(tiles / row["tile"]))
        ]
        if other:
            raise ValueError(f"`masks` must have the sizes of their tiles, {len(other)} have "
                             f"others: {'; '.join(other[:3])}")  # fmt: skip
        index = np.stack([mask for mask in loaded if mask is not None])
        shown = index[:, None] == np.arange(1, len(PARTS) + 1)[:, None, None]
    return Houses(
        images=np.stack([sale[3] for sale in usable]),
        masks=shown,
        price=np.array([sale[2] for sale in usable]),
        numbers={name: _imputed(name, rows, train, report) for name in POSSIBLE},
        kind=_imputed_kind(rows, train, report),
        ids=[row["tile"] for row in rows],
        train=train,
        report=report,
    )


def _number(text: str | None) -> float:
    """The finite number that a cell holds, NaN for anything else."""
    try:
        value = float((text or "").strip())
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _imputed(
    name: str, rows: list[dict[str, str]], train: int, report: Report
) -> NDArray[np.float64]:
    low, high = POSSIBLE[name]
    values = np.array([_number(row[name]) for row in rows])
    bad = ~((values >= low) & (values <= high))
    known = values[:train][~bad[:train]]
    fill = float(np.median(known)) if len(known) else (low + high) / 2
    for i in bad.nonzero()[0]:
        report.imputed.append(f"{rows[i]['tile']}: {name}, {rows[i][name]!r} became {fill:g}")
    return np.where(bad, fill, values)


def _imputed_kind(rows: list[dict[str, str]], train: int, report: Report) -> list[str]:
    kinds = [(row["type"] or "").strip() for row in rows]
    counts = Counter(kind for kind in kinds[:train] if kind)
    # Among equally frequent ones the first by name, so that the file's order does not matter.
    fill = min(counts, key=lambda kind: (-counts[kind], kind)) if counts else "unknown"
    for row, kind in zip(rows, kinds, strict=True):
        if not kind:
            report.imputed.append(f"{row['tile']}: type, {row['type']!r} became {fill}")
    return [kind or fill for kind in kinds]


def _picture(path: Path, mode: str, side: int | None) -> NDArray[np.uint8] | None:
    """A square picture, brought to `side`; None where the file is missing or unreadable."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    size = (side, side) if side else (min(picture.size),) * 2
    if picture.size != size:
        nearest = mode == "L"  # the numbers of parts must not be mixed
        picture = picture.resize(
            size, Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
        )
    return np.asarray(picture)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size
