"""The paper's experiments on a small copy of CUB-200-2011, and on the demonstration's birds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cub200
import numpy as np
import pytest
import torch
from cub200_data import Drawn, cached_name
from cub200_network import (
    Crops,
    Embedder,
    Recipe,
    Tiny,
    draws,
    make_network,
    restore,
    save,
    train,
)
from cub200_published import FIGURES, published
from PIL import Image

import gcfast
from gcfast.demo import species
from gcfast.errors import GcfastError
from gcfast.evaluation.datasets import Sample, labelled_loader, read_cub
from gcfast.images.preprocessing import Preprocessing

SPECIES, EACH = 6, 5
NAMES = [f"{i:03d}.Species_{i}" for i in range(1, SPECIES + 1)]


def picture(species: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A blot of the species' colour on noise, 60 x 48, and its box."""
    image = rng.integers(90, 140, (48, 60, 3)).astype(np.uint8)
    x, y = (int(v) for v in rng.integers(8, 24, 2))
    colour = [(250, 40, 40), (40, 250, 40), (40, 40, 250), (250, 250, 40), (40, 250, 250),
              (250, 40, 250)][species]  # fmt: skip
    image[y : y + 16, x : x + 20] = colour
    return image, (x, y, x + 20, y + 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of CUB-200-2011 with its segmentations; one picture has no box."""
    root = tmp_path_factory.mktemp("cub")
    top, rng = root / "CUB_200_2011", np.random.default_rng(0)
    files = ["images", "image_class_labels", "classes", "bounding_boxes", "train_test_split"]
    lines: dict[str, list[str]] = {name: [] for name in files}
    number = 0
    for at, name in enumerate(NAMES):
        lines["classes"].append(f"{at + 1} {name}")
        (top / "images" / name).mkdir(parents=True)
        (root / "segmentations" / name).mkdir(parents=True)
        for i in range(EACH):
            number += 1
            image, box = picture(at, rng)
            file = f"{name}/Bird_{i:04d}_{number}"
            Image.fromarray(image).save(top / "images" / f"{file}.jpg", quality=95)
            mask = np.zeros((48, 60), np.uint8)
            mask[box[1] : box[3], box[0] : box[2]] = 255
            Image.fromarray(mask).save(root / "segmentations" / f"{file}.png")
            lines["images"].append(f"{number} {file}.jpg")
            lines["image_class_labels"].append(f"{number} {at + 1}")
            lines["train_test_split"].append(f"{number} {i % 2}")
            if number != SPECIES * EACH:
                lines["bounding_boxes"].append(
                    f"{number} {box[0]}.0 {box[1]}.0 {box[2] - box[0]}.0 {box[3] - box[1]}.0"
                )
    for name, content in lines.items():
        (top / f"{name}.txt").write_text("\n".join(content) + "\n")
    return root


ARGUMENTS = ["--backbone", "tiny", "--size", "32", "--epochs", "2", "--steps", "3",
             "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.mark.slow
def test_a_small_cub_from_training_to_tables_twice(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--root", str(root), "--cache", str(tmp_path / "cache"), *ARGUMENTS]
    cub200.main([*where, "--out", str(tmp_path / "one")])
    first = capsys.readouterr().out
    assert "margin loss, distance-weighted sampling: 2 epochs of 3 batches" in first
    assert "train: 15 images of 3 species; the published split has 5864" in first
    assert "test: 15 images of 3 species; the published split has 5924" in first
    assert "images that could not be used: 1" in first
    (sweep,) = [line for line in first.splitlines() if line.startswith("mask, against")]
    saved = json.loads((tmp_path / "one" / "cub200.json").read_text())
    figures = {(f["row"], f["column"]): f["value"] for f in saved["figures"]}
    # M = 1, 2, 5, 10, 20, 50 and all 64.
    means = [float(value) for value in sweep.split()[2:]]
    assert len(means) == 7
    assert means[5] == pytest.approx(figures["Grad-CAM, against, top-50", "mask"], abs=6e-4)
    assert means[6] == pytest.approx(figures["Grad-CAM, against, all channels", "mask"], abs=6e-4)
    assert "Bird_0004_30.jpg: no box in bounding_boxes.txt" in first
    cub200.main([*where, "--out", str(tmp_path / "two")])
    assert "weights: " in capsys.readouterr().out
    for name in ("cub200.txt", "table.csv", "sweeps.csv", "localisation.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    assert saved["images"] == 14
    assert saved["rows"] == 15
    for row in ("Grad-CAM, against, one triplet", "Grad-CAM++, against, top-50", "uniform"):
        for column in ("box", "mask"):
            assert 0 <= figures[row, column] <= 1
    # The network's view is the middle square, 48 of the 60 pixels, of which the blot has 20 x 16.
    assert figures["uniform", "box"] == pytest.approx(20 * 16 / 48**2, rel=0.12)
    assert (tmp_path / "one" / "localisation.png").stat().st_size > 1000

    database = gcfast.Database.open(tmp_path / "one" / "paper.gcfast")
    settings = database.manifest["settings"]
    assert settings["evidence"] == "against"
    assert (settings["triplets"], settings["channels"]) == (50, 50)
    assert settings["objective"]["name"] == "TripletLoss"
    assert database.class_names == NAMES[:3]
    # It is the one that `build` makes.
    network, layer, _ = make_network("tiny", None, 0)
    restore(network, next((tmp_path / "cache").iterdir()))
    loader = labelled_loader(read_cub(root, "train"), Preprocessing(size=32), batch_size=32)
    built = gcfast.Explainer(network, layer, **(gcfast.PAPER | {"seed": 0})).build(loader)
    for name in ("channels", "weights", "embeddings", "offsets", "triplet_counts"):
        assert torch.equal(getattr(built, name), getattr(database, name))


def test_another_training_is_another_file_in_the_cache(root: Path) -> None:
    """Weights of another size, recipe, origin or set of pictures must not be taken for these."""
    samples = read_cub(root, "train").samples
    recipe = Recipe(epochs=2, steps=3)
    common = ("torchvision/resnet50, ImageNet weights", recipe, 224, 0, samples)
    names = {cached_name(*common)}
    for at, other in enumerate(
        ("timm/resnet50, w.pth", replace(recipe, margin=0.3), 128, 1, samples[1:])
    ):
        names.add(cached_name(*common[:at], other, *common[at + 1 :]))  # type: ignore[arg-type]
    assert len(names) == 6
    assert cached_name(*common) in names
    assert all(name.endswith(".safetensors") and "/" not in name for name in names)


def test_the_network_is_trained_and_comes_back(root: Path, tmp_path: Path) -> None:
    samples = read_cub(root, "train").samples
    preprocessing = Preprocessing(size=32)

    def trained(seed: int) -> Embedder:
        network, layer, _ = make_network("tiny", None, 0)
        assert layer == "backbone.maps"
        recipe = Recipe(epochs=2, steps=4, rate=1e-2)
        train(network, samples, preprocessing, recipe, device=torch.device("cpu"), seed=seed)
        return network

    one, again, other = trained(0), trained(0), trained(1)
    fresh, _, _ = make_network("tiny", None, 0)
    weights = [n.project.weight for n in (one, again, other, fresh)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert not one.training
    save(one, tmp_path / "w.safetensors")
    restore(fresh, tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), one(images))


def test_training_pulls_a_species_together(root: Path) -> None:
    samples = read_cub(root, "train").samples
    preprocessing = Preprocessing(size=32)
    network, _, _ = make_network("tiny", None, 0)
    views = torch.from_numpy(np.stack([preprocessing.view(s.path) for s in samples]))
    inputs = preprocessing.normalize(views)
    labels = [s.label for s in samples]
    same = torch.tensor([[a == b for b in labels] for a in labels])

    def gap() -> float:
        with torch.inference_mode():
            f = torch.nn.functional.normalize(network.eval()(inputs), dim=1)
        distances = (2 - 2 * f @ f.T).clamp(min=0)
        return float(distances[~same].mean() - distances[same].mean())

    before = gap()
    recipe = Recipe(epochs=2, steps=20, classes=3, rate=3e-3, beta_rate=0.01)
    train(network, samples, preprocessing, recipe, device=torch.device("cpu"), seed=0)
    assert gap() > before + 0.3


def test_batches_hold_some_pictures_of_some_classes() -> None:
    numbers = torch.tensor([0] * 6 + [1] * 2 + [2] * 7 + [3] * 5)
    recipe = Recipe(epochs=2, steps=5, classes=3, pictures=5)
    batches = list(draws(numbers, recipe, torch.Generator().manual_seed(0)))
    assert len(batches) == 10
    keys = [key for batch in batches for key in batch]
    assert [draw for draw, _ in keys] == list(range(150))
    for batch in batches:
        classes = numbers[[index for _, index in batch]]
        assert sorted(classes.unique(return_counts=True)[1].tolist()) == [5, 5, 5]
        big = [index for _, index in batch if int(numbers[index]) != 1]
        assert len(set(big)) == len(big)


def test_crops_are_a_function_of_the_draw(tmp_path: Path) -> None:
    grid = np.zeros((100, 200, 3), np.uint8)
    grid[..., 0] = np.arange(200)
    grid[..., 1] = np.arange(100)[:, None]
    Image.fromarray(grid).save(tmp_path / "a.png")
    crops = Crops([Sample(tmp_path / "a.png", "a", "x")], 32, 50, seed=0)
    seen = {crops[draw, 0].tobytes() for draw in range(8)}
    assert len(seen) == 8
    assert np.array_equal(crops[3, 0], crops[3, 0])
    for draw in range(8):
        view = crops[draw, 0].astype(int)
        assert view.shape == (32, 32, 3)
        # At half the size, so that a pixel of the view is two of the picture, and never stretched.
        assert abs(abs(view[16, 31, 0] - view[16, 0, 0]) - 62) <= 2
        assert abs(view[31, 16, 1] - view[0, 16, 1] - 62) <= 2


def test_drawn_pictures_come_with_their_truth() -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    masks = np.zeros((3, 8, 8), bool)
    masks[:, 2:4, 1:7] = True
    boxes = np.array([[1, 2, 7, 4]] * 3)
    common = (images, masks, boxes, ["a", "b", "a"], lambda x: torch.from_numpy(x))
    ((inputs, truth),) = Drawn(*common, truth=True)
    assert inputs.shape == (3, 8, 8, 3)
    assert truth.labels == ["a", "b", "a"]
    assert torch.equal(truth.box_mask, torch.from_numpy(masks))
    assert [b.tolist() for b in truth.boxes] == [[[1, 2, 7, 4]]] * 3
    ((_, labels, ids),) = Drawn(*common, truth=False)
    assert (labels, ids) == (["a", "b", "a"], ["a#0", "b#1", "a#2"])


def test_published_figures_have_a_source_and_none_is_made_up() -> None:
    assert len({(f.row, f.column) for f in FIGURES}) == len(FIGURES)
    assert all(f.source for f in FIGURES)
    assert all(f.value is None or 0 < f.value < 1 for f in FIGURES)
    entry = published("Grad-CAM, against, top-50", "mask")
    assert entry is not None
    assert "Table 1" in entry.source
    assert published("uniform", "box") is None
    lines = cub200.comparison_lines({("recall@1", "unseen species"): 0.5}, True)
    assert lines[1].split()[-3:] != lines[0].split()[-3:]
    assert "0.640" in lines[1]
    assert "0.640" not in cub200.comparison_lines({("recall@1", "unseen species"): 0.5}, False)[1]


def test_what_cannot_be_had_is_said(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ([], ["--data", "cub"], ["--data", "demo", "--root", "x"]):
        with pytest.raises(SystemExit):
            cub200.main(arguments)
        assert "--root is where CUB-200-2011 is" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"lacks images\.txt"):
        cub200.main(["--root", str(tmp_path), *ARGUMENTS])
    missing = str(tmp_path / "no.safetensors")
    with pytest.raises(SystemExit, match=r"`--weights` must exist, got .*no\.safetensors"):
        cub200.main(["--root", str(root), "--weights", missing, *ARGUMENTS])

    def none(spec: str, weights: object) -> None:
        raise GcfastError(f"{spec} is not here, {weights}")

    monkeypatch.setattr("cub200_network.load_model", none)
    with pytest.raises(GcfastError, match=r"no ResNet-50 .* --imagenet FILE .*timm/resnet50: timm"):
        make_network("auto", None, 0)


def test_a_tiny_backbone_is_the_closed_form() -> None:
    explainer = gcfast.Explainer(Embedder(Tiny(), 64, None).eval(), "backbone.maps")
    database = explainer.build([(torch.randn(6, 3, 32, 32), [0, 0, 1, 1, 2, 2])])
    assert database.manifest["closed_form"]


def test_the_same_script_on_drawn_birds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("TRAINING_LABELS", 4), ("UNSEEN_LABELS", 3)):
        monkeypatch.setattr(species, name, getattr(species, name)[:count])
    cub200.main(["--data", "demo", "--quick", "--threads", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "demonstration, unseen species" in printed
    saved = json.loads((tmp_path / "cub200.json").read_text())
    assert (saved["rows"], saved["images"]) == (16, 6)
    figures = {(f["row"], f["column"]): f["value"] for f in saved["figures"]}
    assert figures["Grad-CAM, for, top-50", "box"] > figures["uniform", "box"]
    assert "50 k-means centres: not measured, the database has fewer rows" in printed
    # Nothing was published about these pictures.
    ours = [line for line in printed.splitlines() if line.startswith("recall@1")]
    assert ours[0].split()[-1] == "-"


def test_without_faiss_everything_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network may have been trained for hours when the sweep over centres comes."""

    def compress(*_: object) -> None:
        raise gcfast.MissingExtraError("compress needs FAISS")

    monkeypatch.setattr("gcfast.cli.evaluate.find_spec", lambda _: None)
    monkeypatch.setattr(gcfast.Database, "compress", compress)
    for name, count in (("TRAINING_LABELS", 4), ("UNSEEN_LABELS", 3)):
        monkeypatch.setattr(species, name, getattr(species, name)[:count])
    cub200.main(["--data", "demo", "--quick", "--threads", "1", "--out", str(tmp_path)])
    assert "50 k-means centres: not measured, FAISS is not installed" in capsys.readouterr().out
    assert not (tmp_path / "centers.png").exists()
