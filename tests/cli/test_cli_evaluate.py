"""The command `gcfast evaluate`, on birds of the tests' own drawing in CUB's layout."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_case import fails, run
from PIL import Image

import gcfast
from gcfast.cli import main
from gcfast.cli.evaluate import compressor
from gcfast.evaluation.measure import CHANNEL_COUNTS, LOCALISED
from gcfast.evaluation.table import MAIN_ROW
from gcfast.metrics import mask_score

pytest.importorskip("scipy", reason="SciPy (gcfast's extra evaluate) is not installed")
pytest.importorskip("matplotlib", reason="matplotlib (gcfast's extra plots) is not installed")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 60, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(60, 6)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net()
"""
SPECIES, EACH = 6, 5
MODEL = ("--model", "evaluate_net:build", "--workers", "0")


def draw_cub(root: Path) -> None:
    """Six species of five pictures, a coloured square each, with all of CUB's files."""
    rng = np.random.default_rng(0)
    top = root / "CUB_200_2011"
    lines: dict[str, list[str]] = {
        name: []
        for name in (
            "images",
            "image_class_labels",
            "classes",
            "bounding_boxes",
            "train_test_split",
        )
    }
    number = 0
    for species in range(1, SPECIES + 1):
        bird = f"{species:03d}.Bird"
        lines["classes"].append(f"{species} {bird}")
        (top / "images" / bird).mkdir(parents=True)
        (top / "segmentations" / bird).mkdir(parents=True)
        color = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230)])[(species - 1) % 3]
        for i in range(EACH):
            number += 1
            picture = rng.integers(60, 120, (32, 32, 3)).astype(np.uint8)
            x, y = rng.integers(0, 18, 2).tolist()
            picture[y : y + 14, x : x + 12] = color // (1 + (species - 1) // 3)
            mask = np.zeros((32, 32), np.uint8)
            mask[y : y + 14, x : x + 12] = 255
            Image.fromarray(picture).save(top / "images" / bird / f"{i}.png")
            Image.fromarray(mask).save(top / "segmentations" / bird / f"{i}.png")
            lines["images"].append(f"{number} {bird}/{i}.png")
            lines["image_class_labels"].append(f"{number} {species}")
            lines["bounding_boxes"].append(f"{number} {x}.0 {y}.0 12.0 14.0")
            lines["train_test_split"].append(f"{number} {i % 2}")
    for name, content in lines.items():
        (top / f"{name}.txt").write_text("\n".join(content) + "\n")
    train = [f"{s:03d}.Bird/{i}.png,{s:03d}.Bird" for s in range(1, 4) for i in range(EACH)]
    (root / "train.csv").write_text("path,label\n" + "\n".join(train) + "\n")


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    (root / "evaluate_net.py").write_text(NET)
    draw_cub(root)
    before = os.getcwd()
    os.chdir(root)
    try:
        build = ["--images", "CUB_200_2011/images", "--labels", "train.csv", "--out", "db"]
        assert main(["build", *build, *MODEL, "--size", "32"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(prepared_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared_root)
    return prepared_root


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_measured_and_drawn(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, text, err = run(
        capsys, "evaluate", "--database", "db", "--data", "cub:.", "--train", "cub:.",
        "--out", out, *MODEL,
    )  # fmt: skip
    assert status == 0, err
    assert "CUB-200-2011, 15 images" in text
    first, second = text.split("beyond the paper")
    assert len([line for line in first.splitlines() if line.startswith("Grad-CAM")]) == 12
    assert [line.split("  ")[0] for line in second.splitlines() if line.startswith("class")] == [
        "class proxy",
        "class proxy, refined",
        *(line for line in second.splitlines() if " less " in line),
    ]
    table = read(out / "table.csv")
    assert len(table) == 17 * 2 * 2
    rows = {(r["row"], r["center"], r["column"]): r for r in table}
    uniform = rows["uniform", "0", "mask"]
    assert float(uniform["mean"]) == pytest.approx(12 * 14 / 32**2, abs=1e-6)
    assert float(uniform["deviation"]) == pytest.approx(0, abs=1e-6)

    # The main row by the long way: the maps themselves, at full size.
    explainer = gcfast.load("db", main_network(here))
    masks, images = [], []
    for species in range(4, 7):
        for i in range(EACH):
            name = f"{species:03d}.Bird/{i}.png"
            top = here / "CUB_200_2011"
            masks.append(np.asarray(Image.open(top / "segmentations" / name)) > 0)
            images.append(np.asarray(Image.open(top / "images" / name)))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    for center in (0.0, 1.0):
        maps = explainer.explain_batch((batch - mean) / std, center=center)
        wanted = mask_score(maps, torch.from_numpy(np.stack(masks)))
        one = rows["Grad-CAM, for, top-50", f"{center:g}", "mask"]
        assert float(one["mean"]) == pytest.approx(float(wanted.mean()), abs=1e-5)
        assert float(one["deviation"]) == pytest.approx(float(wanted.std()), abs=1e-5)
        assert float(one["low"]) < float(one["mean"]) < float(one["high"])

    sweeps = {(r["row"], r["center"], r["column"]): r["mean"] for r in read(out / "sweeps.csv")}
    kept = [m for m in CHANNEL_COUNTS if m < 60] + [60]
    assert {name for name, _, _ in sweeps} >= {f"M={m}, for" for m in kept}
    # Where a sweep meets the table they agree.
    for a, b in (("M=50, for", "top-50"), ("T=50", "top-50"), ("M=60, for", "all channels")):
        main_row = rows[f"Grad-CAM, for, {b}", "0", "mask"]["mean"]
        assert float(sweeps[a, "0", "mask"]) == pytest.approx(float(main_row), abs=2e-6)
    beyond = {(r["row"], r["column"]): r["mean"] for r in read(out / "beyond.csv")}
    centered = rows["Grad-CAM, for, top-50", "1", "mask"]["mean"]
    assert beyond["Grad-CAM, for, top-50, center=1", "mask"] == centered
    assert len(beyond) == (14 + 2) * 4  # box, mask, AP, IoU of seven rows twice, and two gains
    # The test classes are not the database's.
    assert read(out / "reliability.csv") == []
    assert not (out / "reliability.png").exists()
    localised = read(out / "localisation.csv")
    assert len(localised) == (len(LOCALISED) + 1) * (9 + 1)
    assert all(0 <= float(r["mean"]) <= 1 for r in localised)
    fidelity = read(out / "fidelity.csv")
    assert len(fidelity) == 15
    assert max(float(r["cosine"]) for r in fidelity) <= 1
    drawn = ["channels.png", "top-channels.png", "triplets.png", "localisation.png", "fidelity.png"]
    drawn += ["examples.png", "pairs.png"]
    if compressor() is not None:
        drawn.append("centers.png")
    for name in drawn:
        with Image.open(out / name) as figure:
            assert figure.width > 500
            assert len(np.unique(np.asarray(figure.convert("L")))) > 8
        assert str(out / name) in text
    assert read(out / "skipped.csv") == []

    # Seeded throughout: a second run writes the same numbers. The database knows its pictures.
    again = tmp_path / "again"
    arguments = ("--database", "db", "--data", "cub:.", "--out", again, "--thorough")
    assert run(capsys, "evaluate", *arguments, *MODEL)[0] == 0
    for name in ("table.csv", "sweeps.csv", "fidelity.csv", "beyond.csv"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    # `--thorough` adds to what is there.
    thorough = read(again / "localisation.csv")
    assert all(row in thorough for row in localised)
    assert len(thorough) == (17 + 1) * (9 + 1) + len(LOCALISED) + 1
    text, more = ((path / "table.txt").read_text() for path in (out, again))
    assert more.startswith(text.rstrip())
    main = [line for line in more.splitlines() if line.startswith("MaxBoxAccV2, Grad-CAM, for")]
    (row,) = (r for r in thorough if r["measure"] == "MaxBoxAccV2" and r["row"] == MAIN_ROW)
    assert main[0] == (
        f"MaxBoxAccV2, {MAIN_ROW}: {float(row['mean']):.3f} "
        f"[{float(row['low']):.3f}, {float(row['high']):.3f}]"
    )
    assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main_network(root: Path) -> torch.nn.Module:
    space: dict[str, object] = {}
    exec((root / "evaluate_net.py").read_text(), space)
    return space["build"]()  # type: ignore[operator, no-any-return]


def test_a_transform_does_not_say_where_annotations_are(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "db", tmp_path / "db")
    manifest = tmp_path / "db" / "manifest.json"
    kept = json.loads(manifest.read_text())
    kept["preprocessing"]["transform"] = "package.views:middle"
    manifest.write_text(json.dumps(kept))
    arguments = ("--database", tmp_path / "db", "--data", "cub:.", "--out", tmp_path / "out")
    line = fails(capsys, "evaluate", *arguments, *MODEL)
    assert "must not be built with --transform package.views:middle: it does not say which" in line


def test_what_is_skipped_is_listed(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "folder"
    for name in ("a/0", "a/1", "b/0"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture = here / "CUB_200_2011" / "images" / "004.Bird" / "0.png"
        (root / "images" / f"{name}.png").write_bytes(picture.read_bytes())
    (root / "images" / "a" / "1.png").write_bytes(b"no picture")
    (root / "boxes.csv").write_text(
        "path,x0,y0,x1,y1\na/0.png,0,0,9,9\na/1.png,0,0,9,9\nb/0.png,1,1,8,8\n"
    )
    arguments = ("--database", "db", "--data", f"folder:{root}", "--out", tmp_path / "out")
    status, _, err = run(capsys, "evaluate", *arguments, *MODEL)
    assert status == 0
    assert "images, skipped: 1" in err
    assert "a/1.png: unreadable" in err
    assert "classes of one image, without triplets of their own: 1, b\n" in err
    assert [r["image"] for r in read(tmp_path / "out" / "skipped.csv")] == ["a/1.png"]
    assert {r["column"] for r in read(tmp_path / "out" / "table.csv")} == {"box"}
    assert "cannot use a/1.png" in fails(
        capsys, "evaluate", *arguments, *MODEL, "--force", "--strict"
    )


@pytest.mark.usefixtures("here")
def test_training_pictures_that_the_reader_leaves_out_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader's reason stands before the error that the missing row ends in."""
    draw_cub(tmp_path)
    boxes = tmp_path / "CUB_200_2011" / "bounding_boxes.txt"
    boxes.write_text("".join(boxes.read_text().splitlines(keepends=True)[1:]))
    status, _, err = run(
        capsys, "evaluate", "--database", "db", "--data", "cub:.", "--train", f"cub:{tmp_path}",
        "--out", tmp_path / "out", *MODEL,
    )  # fmt: skip
    assert status == 2
    assert "training pictures, left out: 1\n  001.Bird/0.png: no box in bounding_boxes.txt" in err
    assert "`--train` must give the 15 pictures" in err


def test_other_training_pictures_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("evaluate", "--database", "db", "--data", "cub:.", *MODEL, "--out", tmp_path / "o")
    root = tmp_path / "other"
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture = here / "CUB_200_2011" / "images" / f"00{1 + (name < 'b')}.Bird" / "0.png"
        (root / "images" / f"{name}.png").write_bytes(picture.read_bytes())
    lines = [f"{n}.png,0,0,9,9" for n in ("a/0", "a/1", "b/0", "b/1")]
    (root / "boxes.csv").write_text("path,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    line = fails(capsys, *arguments, "--train", f"folder:{root}")
    assert "`--train` must give the 15 pictures" in line
    assert "row 0 is a/0.png, in the database 001.Bird/0.png" in line

    moved = tmp_path / "moved"
    for bird in ("001.Bird", "002.Bird", "003.Bird"):
        (moved / bird).mkdir(parents=True)
        for i in range(EACH):
            other = here / "CUB_200_2011" / "images" / "004.Bird" / f"{i}.png"
            (moved / bird / f"{i}.png").write_bytes(other.read_bytes())
    line = fails(capsys, *arguments, "--images", moved)
    assert "`--images` must give the pictures that the database was built from: the emb" in line
    line = fails(capsys, *arguments, "--images", tmp_path)
    assert "`--images` must be where the database's pictures are, 15 of 15 are missing" in line


def test_bad_options_are_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("evaluate", "--database", "db", *MODEL)
    line = fails(capsys, *common, "--data", "birds", "--out", tmp_path / "o")
    assert "`--data` must be cub:ROOT, coco:ROOT or folder:ROOT, got 'birds'" in line
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    line = fails(capsys, *common, "--data", "cub:.", "--out", tmp_path / "o")
    assert "`--out` must be a new or empty folder" in line
    line = fails(capsys, *common, "--data", f"coco:{here}", "--out", tmp_path / "p")
    assert "lacks annotations/instances_val2017.json" in line
