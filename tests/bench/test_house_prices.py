"""The house price application: tiles, reader, network, tables, end to end in small."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import house_maps
import house_prices
import numpy as np
import pytest
import torch
from house_data import COLUMNS, generate, read_houses
from house_maps import Sales, Weights, databases, explainer, score_table, scores, strongest
from house_network import RankSiamese, features_of, pair_accuracy
from house_table import table, within
from house_tiles import PARTS, Lot, draw_tile
from PIL import Image

torch.set_num_threads(1)


def lot(**changes: object) -> Lot:
    values = {"kind": "detached", "footprint": 150.0, "storeys": 1, "pool": False, "trees": 0,
              "busy": False}  # fmt: skip
    return Lot(**{**values, **changes})  # type: ignore[arg-type]


def drawn(seed: int = 0, **changes: object) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    image, masks = draw_tile(lot(**changes), 64, np.random.default_rng(seed))
    return image, dict(zip(PARTS, masks, strict=True))


def test_a_tile_shows_what_its_masks_say() -> None:
    image, masks = drawn(pool=True, trees=8, busy=True)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    total = np.stack(list(masks.values())).sum(0)
    assert total.max() == 1, "a pixel shows one part"
    red, green, blue = (image[..., i].astype(float) for i in range(3))
    assert (blue - red)[masks["pool"]].mean() > 40
    assert (green - blue)[masks["trees"]].mean() > 10
    assert np.abs(red - blue)[masks["busy road"]].mean() < 25
    # 150 square metres of 48 x 48, less what crowns hide.
    assert 0.045 < masks["roof"].mean() < 0.068
    assert 0.25 < masks["busy road"].mean() < 0.35


def test_parts_that_a_lot_lacks_have_no_mask() -> None:
    _, masks = drawn()
    assert masks["roof"].any()
    assert not any(masks[part].any() for part in ("pool", "trees", "busy road"))
    assert drawn(footprint=80.0)[1]["roof"].sum() < 0.7 * masks["roof"].sum()
    one, again, other = drawn(3)[0], drawn(3)[0], drawn(4)[0]
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("houses")
    generate(where, count=40, pixels=32, seed=0)
    return where


def test_houses_are_read_in_the_order_of_their_sale(folder: Path) -> None:
    houses = read_houses(folder / "tiles", folder / "sales.csv", folder / "masks")
    assert len(houses) == houses.report.rows - len(houses.report.skipped)
    assert houses.train == round(0.6 * len(houses))
    assert houses.masks is not None
    assert houses.masks.shape == (len(houses), 4, 32, 32)
    assert houses.images.shape == (len(houses), 32, 32, 3)
    _, masks = draw_tile(lot(), 32, np.random.default_rng(0))
    assert houses.masks.dtype == masks.dtype == np.bool_
    with (folder / "sales.csv").open() as file:
        dates = {row["tile"]: row["date"] for row in csv.DictReader(file)}
    listed = [dates[tile] for tile in houses.ids]
    assert listed == sorted(listed)


def spoiled(folder: Path, tmp_path: Path, changes: dict[int, dict[str, str]]) -> Path:
    """A copy of the sales with some cells changed, and none missing otherwise."""
    with (folder / "sales.csv").open() as file:
        rows = list(csv.DictReader(file))
    good = {"bedrooms": "3", "bathrooms": "2", "type": "semi", "area": "120", "latitude": "43.7"}
    for i, row in enumerate(rows):
        row.update(good)
        row["price"] = str(500_000 + 1000 * i)
        row.update(changes.get(i, {}))
    path = tmp_path / "sales.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_noisy_rows_are_counted_imputed_and_listed(folder: Path, tmp_path: Path) -> None:
    sales = spoiled(
        folder,
        tmp_path,
        {
            0: {"price": ""},
            1: {"price": "-5"},
            2: {"price": "inf"},
            3: {"date": "30/04/2019"},
            4: {"tile": "none.png"},
            8: {"price": "1"},
            9: {"price": "99000000"},
            5: {"bedrooms": "99"},
            6: {"area": ""},
            7: {"type": " "},
            39: {"bathrooms": "two", "latitude": "120"},
        },
    )
    houses = read_houses(folder / "tiles", sales)
    assert len(houses) == 33
    assert houses.masks is None
    assert houses.report.skipped == [
        "line 2: no usable price, ''",
        "line 3: no usable price, '-5'",
        "line 4: no usable price, 'inf'",
        "line 5: no usable date, '30/04/2019'",
        "line 6: no readable tile, 'none.png'",
        "line 10: impossible price, '1'",
        "line 11: impossible price, '99000000'",
    ]
    assert sorted(houses.report.imputed) == [
        "00005.png: bedrooms, '99' became 3",
        "00006.png: area, '' became 120",
        "00007.png: type, ' ' became semi",
        "00039.png: bathrooms, 'two' became 2",
        "00039.png: latitude, '120' became 43.7",
    ]
    last = houses.ids.index("00039.png")
    assert houses.numbers["bathrooms"][last] == 2
    text = "\n".join(houses.report.lines(limit=2))
    assert "40 rows read, 7 left out, 5 values imputed" in text
    assert "left out: no usable price, 3" in text
    assert "left out: impossible price, 2" in text
    assert "… and 5 more" in text


def test_a_mask_of_another_size_is_named(folder: Path, tmp_path: Path) -> None:
    """Stretched over its tile it would lie beside what it marks."""
    masks = tmp_path / "masks"
    shutil.copytree(folder / "masks", masks)
    with Image.open(masks / "00003.png") as one:
        part = one.crop((0, 0, 20, 24))
    part.save(masks / "00003.png")
    with pytest.raises(
        ValueError,
        match=r"sizes of their tiles, 1 have others: 00003\.png has 20 x 24, its tile 32 x 32",
    ):
        read_houses(folder / "tiles", folder / "sales.csv", masks)


def test_what_is_imputed_comes_from_the_training_rows(folder: Path, tmp_path: Path) -> None:
    later = {i: {"area": "4000", "type": "castle"} for i in range(24, 40)}
    sales = spoiled(folder, tmp_path, {**later, 3: {"area": "", "type": ""}})
    houses = read_houses(folder / "tiles", sales)
    assert houses.numbers["area"][3] == 120
    assert houses.kind[3] == "semi"


def test_what_cannot_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`tiles` must exist, got .*nowhere"):
        read_houses(tmp_path / "nowhere", folder / "sales.csv")
    with pytest.raises(FileNotFoundError, match="`csv` must exist"):
        read_houses(folder / "tiles", tmp_path / "no.csv")
    (tmp_path / "bad.csv").write_text("tile,price\n1.png,3\n")
    with pytest.raises(
        ValueError, match=r"`csv` must have the columns tile, date.* lacks date, la"
    ):
        read_houses(folder / "tiles", tmp_path / "bad.csv")
    sales = spoiled(folder, tmp_path, {i: {"price": "0"} for i in range(31)})
    with pytest.raises(ValueError, match=r"at least ten usable rows, .* has 9: line 2: no usable"):
        read_houses(folder / "tiles", sales)
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match=r"`masks` must have a picture for each tile, .* missing"):
        read_houses(folder / "tiles", folder / "sales.csv", tmp_path / "masks")


def test_tiles_of_another_size_are_brought_to_the_first_ones(folder: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for i, path in enumerate(sorted((folder / "tiles").iterdir())):
        with Image.open(path) as image:
            (image if i % 2 == 0 else image.resize((50, 40))).save(tiles / path.name)
    houses = read_houses(tiles, spoiled(folder, tmp_path, {}))
    assert houses.images.shape == (40, 32, 32, 3)


def test_the_pairs_that_are_ordered_right() -> None:
    network = RankSiamese().eval()
    with torch.no_grad():
        network.rank.weight.copy_(torch.tensor([[0.0] * 4, [1.0, 0, 0, 0]]))
        network.rank.bias.zero_()
    features = np.zeros((4, 4), np.float32)
    features[:, 0] = [1, 2, 3, 4]
    # Of the six pairs one has equal prices and does not count, one is ordered wrong.
    assert pair_accuracy(network, features, np.array([1.0, 2.0, 2.0, 1.5])) == 3 / 5
    images = np.zeros((3, 32, 32, 3), np.uint8)
    assert features_of(network.branch, images).shape == (3, 4)


def test_features_that_know_the_price_help(tmp_path: Path) -> None:
    where = tmp_path / "many"
    generate(where, count=120, pixels=16, seed=1)
    houses = read_houses(where / "tiles", where / "sales.csv")
    knows = np.log(houses.price)[:, None].repeat(4, 1).astype(np.float32)
    lines = table(houses, knows, seed=0)
    assert [line.name for line in lines][0::5] == ["none", "all"]
    assert all(line.with_features > 0.6 for line in lines)
    assert lines[0].gain > 0.3
    assert lines[0].low <= lines[0].gain <= lines[0].high
    median = np.full(len(houses) - houses.train, np.median(houses.price[: houses.train]))
    assert lines[0].without == within(houses, median).mean()


def test_scores_of_maps_by_hand() -> None:
    masks = {name: torch.zeros(2, 8, 8, dtype=torch.bool) for name in
             ("drivers", "raises", "pool", "busy road")}  # fmt: skip
    masks["raises"][:, :2] = True
    masks["busy road"][0, 6:] = True
    masks["drivers"] = masks["raises"] | masks["busy road"]
    maps = torch.zeros(2, 8, 8)
    maps[:, 0, :3] = 1
    maps[:, 7, 0] = 1
    got = scores(maps, masks)
    assert got["drivers"].tolist() == [1.0, 0.75]
    assert got["raises"].tolist() == [0.75, 0.75]
    assert got["share"][0].item() == 0.75
    assert got["pool"].isnan().all()
    assert got["busy road"].isnan().tolist() == [False, True]
    assert got["share"].isnan().tolist() == [False, True]
    assert scores(torch.zeros(2, 8, 8), masks)["share"][0].item() == 0.5


@pytest.mark.slow
def test_the_whole_application_in_small_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house_prices, "QUICK", {"count": 50, "pixels": 32, "epochs": 1})
    for name in ("one", "two"):
        house_prices.main(["--quick", "--out", str(tmp_path / name), "--seed", "3"])
    printed = capsys.readouterr().out
    assert "rows read" in printed
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("house_prices.txt", "house_prices.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    saved = json.loads((one / "house_prices.json").read_text())
    assert list(saved["prices"]) == [
        "none", "G", "G, Bed, Bath", "G, Bed, Bath, T", "G, A", "all",
    ]  # fmt: skip
    rows = list(saved["maps"])
    assert rows[:3] == ["uniform", "channel sum", "random channels"]
    assert {"all pairs, top-50", "lower pairs, top-50", "higher pairs, random neighbor"} < set(rows)
    assert all(0 <= v <= 1 for row in saved["maps"].values() for v in row.values())
    with Image.open(one / "house_prices.png") as picture:
        assert picture.size[0] > 1000


def test_maps_are_scored_alike_in_batches_of_any_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    houses = read_houses(folder / "tiles", folder / "sales.csv", folder / "masks")
    network = RankSiamese().eval()
    tables = databases(network, houses, 0)
    found = []
    for size in (128, 5):
        monkeypatch.setattr(house_maps, "BATCH", size)
        found.append(score_table(network, houses, tables, seed=3, center=0.0))
    assert len(houses) - houses.train > 5
    for name, columns in found[0].items():
        for column, values in columns.items():
            torch.testing.assert_close(
                found[1][name][column], values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
            )


def test_houses_without_masks_and_wrong_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    house_prices.main(
        ["--tiles", str(folder / "tiles"), "--csv", str(folder / "sales.csv"),
         "--epochs", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    assert "no masks: maps are not scored" in capsys.readouterr().out
    saved = json.loads((tmp_path / "house_prices.json").read_text())
    assert "maps" not in saved
    # In full, where the printed list stops after ten.
    report = read_houses(folder / "tiles", folder / "sales.csv").report
    assert (saved["run"]["imputed"], saved["run"]["left_out"]) == (report.imputed, report.skipped)
    for arguments in (["--tiles", "x"], ["--masks", "x"]):
        with pytest.raises(SystemExit):
            house_prices.main(arguments)
    assert "--tiles and --csv go together" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="`tiles` must exist"):
        house_prices.main(["--tiles", str(tmp_path / "no"), "--csv", str(folder / "sales.csv")])


def test_the_top_of_a_database_of_all_channels_is_the_database_of_the_top(folder: Path) -> None:
    houses = read_houses(folder / "tiles", folder / "sales.csv")
    network = RankSiamese().eval()
    top = strongest(explainer(network, "lower", 0, channels="all").build(Sales(houses)), 50)
    wanted = explainer(network, "lower", 0).build(Sales(houses))
    for name in ("channels", "weights", "offsets", "labels", "embeddings"):
        torch.testing.assert_close(getattr(top, name), getattr(wanted, name))
    assert top.manifest == wanted.manifest
    every = explainer(network, "all", 0, channels="all", evidence="for").build(Sales(houses))
    rows = Weights(every.channels, every.weights, every.mean_activation).negated().strongest(50)
    against = explainer(network, "all", 0, evidence="against").build(Sales(houses))
    torch.testing.assert_close(rows.weights, against.weights)
    torch.testing.assert_close(rows.offsets, against.offsets)
