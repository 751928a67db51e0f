"""Readers of published layouts, on small copies that the tests make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gcfast.evaluation.datasets import (
    AnnotationError,
    ScoredLoader,
    labelled_loader,
    open_dataset,
    read_cub,
)
from gcfast.evaluation.datasets.coco import decode_segmentation, decompress_counts, fill_polygon
from gcfast.images.folder import Preprocessing

VIEW = Preprocessing(size=16)
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Ani")


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """White on black, half open."""
    out = np.zeros((height, width), np.uint8)
    out[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(out)


def cub(root: Path, *, masks: bool = True) -> Path:
    """Four species of two pictures, 64 x 32, each bird at (24, 8) to (40, 24)."""
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
    for at, bird in enumerate(BIRDS, start=1):
        lines["classes"].append(f"{at} {bird}")
        (top / "images" / bird).mkdir(parents=True)
        (root / "segmentations" / bird).mkdir(parents=True)
        for i in range(2):
            number += 1
            name = f"{bird}/Bird_{i:04d}_{number}"
            picture = rectangle(64, 32, (24, 8, 40, 24)).convert("RGB")
            picture.save(top / "images" / f"{name}.jpg", quality=95)
            if masks:
                rectangle(64, 32, (24, 8, 40, 24)).save(root / "segmentations" / f"{name}.png")
            lines["images"].append(f"{number} {name}.jpg")
            lines["image_class_labels"].append(f"{number} {at}")
            lines["bounding_boxes"].append(f"{number} 24.0 8.0 16.0 16.0")
            lines["train_test_split"].append(f"{number} {1 - i}")
    for name, content in lines.items():
        (top / f"{name}.txt").write_text("\n".join(content) + "\n")
    if not masks:
        for folder in (root / "segmentations").iterdir():
            folder.rmdir()
        (root / "segmentations").rmdir()
    return root


def batch_of(dataset: Any, preprocessing: Preprocessing = VIEW) -> Any:
    (batch,) = list(ScoredLoader(dataset, preprocessing))
    return batch


def test_cub_splits_by_species(tmp_path: Path) -> None:
    cub(tmp_path)
    train, test = (open_dataset(f"cub:{tmp_path}", half) for half in ("train", "test"))
    assert train.class_names == list(BIRDS[:2])
    assert test.class_names == list(BIRDS[2:])
    assert [s.id for s in test.samples][:1] == [f"{BIRDS[2]}/Bird_0000_5.jpg"]
    assert (test.has_masks, test.skipped, test.single) == (True, [], [])
    inner = open_dataset(f"cub:{tmp_path / 'CUB_200_2011'}")
    assert [s.id for s in inner.samples] == [s.id for s in test.samples]
    seen = read_cub(tmp_path, "train", zero_shot=False)
    assert len(seen.samples) == 4
    assert seen.class_names == list(BIRDS)
    assert seen.single == list(BIRDS)


def test_boxes_and_masks_come_in_the_networks_view(tmp_path: Path) -> None:
    test = open_dataset(f"cub:{cub(tmp_path)}")
    images, truth = batch_of(test)
    assert images.shape == (4, 3, 16, 16)
    # The crop is (16, 0) to (48, 32), at half size: the bird is at (4, 4) to (12, 12).
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[4:12, 4:12] = True
    assert [b.tolist() for b in truth.boxes] == [[[4, 4, 12, 12]]] * 4
    assert torch.equal(truth.box_mask, wanted.expand(4, -1, -1))
    assert torch.equal(truth.masks, wanted.expand(4, -1, -1))
    assert truth.labels == [BIRDS[2]] * 2 + [BIRDS[3]] * 2
    # Where the picture is bright is where the mask is.
    assert images[:, 0][truth.masks].min() > images[:, 0][~truth.masks].max()
    _, truth = batch_of(test, Preprocessing(size=16, resize="stretch"))
    assert truth.boxes[0].tolist() == [[6, 4, 10, 12]]
    assert truth.masks[0].nonzero().amin(0).tolist() == [4, 6]


def test_cub_without_segmentations_has_boxes_alone(tmp_path: Path) -> None:
    test = open_dataset(f"cub:{cub(tmp_path, masks=False)}")
    assert not test.has_masks
    assert batch_of(test)[1].masks is None


def test_training_images_are_a_builds_loader(tmp_path: Path) -> None:
    train = open_dataset(f"cub:{cub(tmp_path)}", "train")
    ((images, labels, ids),) = list(labelled_loader(train, VIEW))
    assert images.shape == (4, 3, 16, 16)
    assert labels == [BIRDS[0]] * 2 + [BIRDS[1]] * 2
    assert ids == [s.id for s in train.samples]


@pytest.mark.parametrize("name", ["bounding_boxes.txt", "classes.txt", "train_test_split.txt"])
def test_missing_annotation_files_are_named(tmp_path: Path, name: str) -> None:
    (cub(tmp_path) / "CUB_200_2011" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        open_dataset(f"cub:{tmp_path}")


def test_cub_counts_what_it_skips(tmp_path: Path) -> None:
    root = cub(tmp_path)
    boxes = root / "CUB_200_2011" / "bounding_boxes.txt"
    boxes.write_text("".join(boxes.read_text().splitlines(keepends=True)[:-1]))  # no 8
    folder = root / "segmentations"
    names = [s.id for s in open_dataset(f"cub:{root}").samples]
    rectangle(32, 64, (0, 0, 9, 9)).save(folder / names[0].replace(".jpg", ".png"))
    rectangle(64, 32, (0, 0, 0, 0)).save(folder / names[1].replace(".jpg", ".png"))
    test = open_dataset(f"cub:{root}")
    loader = ScoredLoader(test, VIEW)
    ((images, _),) = list(loader)
    assert len(images) == 1
    assert [reason for _, reason in loader.skipped] == [
        "no box in bounding_boxes.txt",
        "the mask has 32 x 64 pixels, the picture 64 x 32",
        "the mask is empty",
    ]
    (folder / names[2].replace(".jpg", ".png")).unlink()
    test = open_dataset(f"cub:{root}")
    assert (names[2], "no file in segmentations/") in test.skipped
    with pytest.raises(AnnotationError, match="none of the images of CUB-200-2011 can be used"):
        list(ScoredLoader(test, VIEW))
    with pytest.raises(AnnotationError, match=r"cannot use .*: the mask has 32 x 64 pixels"):
        list(ScoredLoader(test, VIEW, strict=True))


def test_an_object_outside_the_view_and_a_damaged_picture(tmp_path: Path) -> None:
    root = cub(tmp_path)
    test = open_dataset(f"cub:{root}")
    rectangle(64, 32, (0, 0, 9, 9)).save(
        root / "segmentations" / test.samples[0].id.replace(".jpg", ".png")
    )
    test.samples[1].path.write_bytes(b"no picture")
    loader = ScoredLoader(test, VIEW)
    list(loader)
    reasons = dict(loader.skipped)
    assert reasons[test.samples[0].id] == "nothing of the mask is in the network's view"
    assert reasons[test.samples[1].id].startswith("unreadable, UnidentifiedImageError")


def test_cub_lines_that_are_not_as_published(tmp_path: Path) -> None:
    top = cub(tmp_path) / "CUB_200_2011"
    before = (top / "bounding_boxes.txt").read_text()
    for text, words in (
        ("1 2 3\n", "must hold a number and 4 values a line, got '1 2 3' in line 1"),
        (before + "1 0 0 1 1\n", "must hold each number once, 1 comes again in line 9"),
        (before.replace("24.0", "left"), "must give x y width .*, got left 8.0 16.0 16.0"),
        (before.replace("24.0", "nan"), "must give x y width .*, got nan 8.0 16.0 16.0"),
        (before.replace("16.0 16.0", "16.0 0"), "height above 0, got 24.0 8.0 16.0 0"),
    ):
        (top / "bounding_boxes.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            open_dataset(f"cub:{tmp_path}", "train")
    (top / "bounding_boxes.txt").write_text(before)
    (top / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(ValueError, match="must know every image, got none for 2"):
        open_dataset(f"cub:{tmp_path}")


# COCO


def compressed(counts: list[int]) -> str:
    """COCO's compressed string, written from its description."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + (digit | 32 if more else digit))
            if not more:
                break
    return text


def runs(mask: np.ndarray) -> list[int]:
    """Run lengths column by column, from outside on."""
    flat = mask.T.ravel()
    counts, value = [0], False
    for pixel in flat:
        if bool(pixel) != value:
            counts.append(0)
            value = bool(pixel)
        counts[-1] += 1
    return counts


def test_all_three_encodings_decode_alike() -> None:
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:9] = True
    polygon = [[3, 2, 9, 2, 9, 5, 3, 5]]
    size = [9, 12]
    for one in (
        polygon,
        {"size": size, "counts": runs(mask)},
        {"size": size, "counts": compressed(runs(mask))},
    ):
        assert np.array_equal(decode_segmentation(one, 9, 12), mask)


def test_compressed_counts() -> None:
    counts = [0, 5, 700, 3, 40_000, 1, 2, 90_000]
    assert decompress_counts(compressed(counts)) == counts
    # Two by hand: 6 is one digit; 33 = 1 + 1 * 32 is two, the first with the bit that goes on.
    assert decompress_counts("6Q1") == [6, 33]
    with pytest.raises(ValueError, match="must end with a whole number, got 'Q'"):
        decompress_counts("Q")
    with pytest.raises(ValueError, match="characters from '0' to 'o', got '!'"):
        decompress_counts("!")


def test_compressed_counts_of_a_real_mask_are_pycocotools() -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = np.random.default_rng(0).random((37, 41)) > 0.7
    text = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert text == compressed(runs(mask))
    assert np.array_equal(decode_segmentation({"size": [37, 41], "counts": text}, 37, 41), mask)


def test_polygons_against_point_in_polygon() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :50] + 0.5
    for points in (rng.random((7, 2)) * (60, 50) - 5, np.array([[5, 5], [45, 9], [20, 35.0]])):
        inside = np.zeros((40, 50), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, 1, 0), strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        assert np.array_equal(fill_polygon(points, 40, 50), inside)


def coco(root: Path, annotations: list[dict[str, Any]]) -> Path:
    """Three images of 32 x 16 with annotations; ``val2017`` as published."""
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    for number in (7, 8, 9):
        Image.new("RGB", (32, 16), (9, 99, 9)).save(root / "val2017" / f"{number:012d}.jpg")
    content = {
        "info": {},
        "licenses": [],
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 16, "width": 32} for i in (7, 8, 9)
        ],
        "annotations": annotations,
        "categories": [{"id": 16, "name": "bird"}, {"id": 17, "name": "cat"}],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def instance(image: int, box: tuple[int, int, int, int], **changes: Any) -> dict[str, Any]:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    one = {"image_id": image, "category_id": 16, "bbox": list(box), "iscrowd": 0}
    return {**one, "segmentation": [polygon], **changes}


def test_coco_birds(tmp_path: Path) -> None:
    crowd = np.zeros((16, 32), bool)
    crowd[0:4, 20:24] = True
    coco(
        tmp_path,
        [
            instance(7, (8, 4, 4, 4)),
            instance(7, (16, 4, 4, 8)),
            instance(
                7,
                (20, 0, 4, 4),
                iscrowd=1,
                segmentation={"size": [16, 32], "counts": runs(crowd)},
            ),
            instance(8, (0, 0, 9, 9), category_id=17),
            instance(
                9, (20, 0, 4, 4), iscrowd=1, segmentation={"size": [16, 32], "counts": runs(crowd)}
            ),
        ],
    )
    test = open_dataset(f"coco:{tmp_path}")
    assert test.name == "COCO val2017, bird"
    assert [s.id for s in test.samples] == ["000000000007.jpg"]
    assert test.skipped == [("000000000009.jpg", "a crowd only, no box")]
    _, truth = batch_of(test, Preprocessing(size=16))  # the crop is (8, 0) to (24, 16)
    assert truth.boxes[0].tolist() == [[0, 4, 4, 8], [8, 4, 12, 12]]
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[4:8, 0:4] = wanted[4:12, 8:12] = True
    assert torch.equal(truth.box_mask[0], wanted)
    wanted[0:4, 12:16] = True  # the crowd is of the object, but has no box
    assert torch.equal(truth.masks[0], wanted)


def test_coco_refuses_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks annotations/instances_val2017\.json or"):
        open_dataset(f"coco:{tmp_path}")
    coco(tmp_path, [instance(7, (8, 4, 4, 4), segmentation={"size": [9, 9], "counts": [81]})])
    loader = ScoredLoader(open_dataset(f"coco:{tmp_path}"), VIEW)
    with pytest.raises(
        AnnotationError, match=r"size \[9, 9\], the image is listed with \[16, 32\]"
    ):
        list(loader)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 17, "name": "cat"}]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`category` must be one of cat, got 'bird'"):
        open_dataset(f"coco:{tmp_path}")
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold images, annotations and categories"):
        open_dataset(f"coco:{tmp_path}")
    for bad, words in (
        ([[1, 2, 3, 4]], "a polygon must have three points"),
        (3, "must be polygons or size and counts: 3"),
        ({"size": [2, 2], "counts": [1, 2]}, "counts must add up to 4, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_segmentation(bad, 2, 2)


def test_coco_skips_pictures_whose_instances_are_incomplete(tmp_path: Path) -> None:
    """A bird that the mask or the boxes do not know would make good heat look misplaced."""
    whole = (8, 4, 4, 4)
    coco(
        tmp_path,
        [
            instance(7, whole),
            instance(7, (16, 4, 0, 8)),
            instance(8, whole),
            instance(8, (16, 4, 4, 8), segmentation=[]),
            instance(9, whole),
            instance(9, (20, 0, 4, 4), bbox=["a", 0, 1, 1]),
        ],
    )
    test = open_dataset(f"coco:{tmp_path}")
    assert test.samples == []
    assert test.skipped == [
        ("000000000007.jpg", "an instance without a box"),
        ("000000000008.jpg", "an instance without a segmentation"),
        ("000000000009.jpg", "an instance without a box"),
    ]


@pytest.mark.parametrize(
    ("part", "key"), [("images", "height"), ("images", "id"), ("annotations", "image_id")]
)
def test_coco_records_that_lack_a_key(tmp_path: Path, part: str, key: str) -> None:
    file = coco(tmp_path, [instance(7, (8, 4, 4, 4))]) / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    del content[part][0][key]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"must hold images, annotations and categ.*'{key}'"):
        open_dataset(f"coco:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": {"id": 8}}, "must list each image once, 8 comes 2 times"),
        ({"images": {"file_name": "000000000008.jpg"}}, "must list each image once, 0+8.jpg comes"),
        ({"images": {"file_name": 3}}, "a file_name that is no text"),
        ({"annotations": {"image_id": [7]}}, "must hold images, annotations .*unhashable"),
    ],
    ids=repr,
)
def test_coco_images_that_are_not_told_apart(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = coco(tmp_path, [instance(7, (8, 4, 4, 4))]) / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for part, values in change.items():
        content[part][0] |= values
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        open_dataset(f"coco:{tmp_path}")


# Folders


def test_tables_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    cub(tmp_path / "birds")
    table = next((tmp_path / "birds").rglob("classes.txt"))
    table.write_bytes(table.read_bytes() + b"9 Caf\xe9\n")
    with pytest.raises(ValueError, match=r"classes\.txt must be UTF-8 text"):
        open_dataset(f"cub:{tmp_path / 'birds'}")
    (tmp_path / "own").mkdir()
    (folder(tmp_path / "own") / "boxes.csv").write_bytes(b"path,x0,y0,x1,y1\na/\xe9.jpg,1,1,2,2\n")
    with pytest.raises(ValueError, match=r"boxes\.csv must be UTF-8 text"):
        open_dataset(f"folder:{tmp_path / 'own'}")


def test_two_pictures_of_one_mask_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    with Image.open(tmp_path / "images" / "a" / "1.jpg") as picture:
        picture.save(tmp_path / "images" / "a" / "1.png")
    (tmp_path / "masks" / "a").mkdir(parents=True)
    rectangle(16, 16, (2, 3, 9, 11)).save(tmp_path / "masks" / "a" / "1.png")
    with pytest.raises(ValueError, match=r"masks/a/1\.png would be of a/1\.jpg and of a/1\.png"):
        open_dataset(f"folder:{tmp_path}")


def folder(root: Path) -> Path:
    for name in ("a/1", "a/2", "b/3"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        rectangle(16, 16, (2, 3, 9, 11)).convert("RGB").save(root / "images" / f"{name}.jpg")
    return root


def test_folder_with_masks(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in ("a/1", "b/3"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        rectangle(16, 16, (2, 3, 9, 11)).save(tmp_path / "masks" / f"{name}.png")
    test = open_dataset(f"folder:{tmp_path}")
    assert test.skipped == [("a/2.jpg", "no mask")]
    assert test.single == ["a", "b"]
    _, truth = batch_of(test)
    assert truth.boxes[0].tolist() == [[2, 3, 9, 11]]  # the mask's extent
    assert int(truth.masks[0].sum()) == 7 * 8


def test_a_mask_of_ones_is_not_called_empty(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in ("a/1", "a/2", "b/3"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        mask = rectangle(16, 16, (2, 3, 9, 11))
        mask = mask.point(lambda v: v // 255) if name == "a/1" else mask
        mask.save(tmp_path / "masks" / f"{name}.png")
    loader = ScoredLoader(open_dataset(f"folder:{tmp_path}"), VIEW)
    assert [len(images) for images, _ in loader] == [2]
    reason = "the mask has no value of at least 128, its highest is 1"
    assert loader.skipped == [("a/1.jpg", reason)]


def test_folder_with_boxes(tmp_path: Path) -> None:
    folder(tmp_path)
    lines = "path,x0,y0,x1,y1\na/1.jpg,2,3,9,11\na/1.jpg,12,0,15.6,4\nb/3.jpg,0,0,16,16\n"
    (tmp_path / "boxes.csv").write_text(lines)
    test = open_dataset(f"folder:{tmp_path}")
    assert test.skipped == [("a/2.jpg", "no box")]
    _, truth = batch_of(test)
    assert truth.masks is None
    assert truth.boxes[0].tolist() == [[2, 3, 9, 11], [12, 0, 16, 4]]


def test_folder_refuses_in_words(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold masks/ or boxes.csv to score against"):
        open_dataset(f"folder:{tmp_path}")
    boxes = tmp_path / "boxes.csv"
    for text, error, words in (
        ("path,x0\n", ValueError, r"must have the columns path, x0, y0, x1, y1, lacks \['y0'"),
        (
            "path,x0,y0,x1,y1\na/1.jpg,5,5,5,9\n",
            ValueError,
            "x0 < x1 and y0 < y1 in pixels, line 2",
        ),
        ("path,x0,y0,x1,y1\na/1.jpg,5,5,nan,9\n", ValueError, "line 2 gives 5, 5, nan, 9"),
        ("path,x0,y0,x1,y1\nc.jpg,1,1,2,2\n", FileNotFoundError, "1 are missing: c.jpg"),
    ):
        boxes.write_text(text)
        with pytest.raises(error, match=words):
            open_dataset(f"folder:{tmp_path}")
    boxes.write_text("x0,y0,x1,y1,path\n1,1,2,2\n")
    with pytest.raises(ValueError, match="must name a picture in each line, line 2 names none"):
        open_dataset(f"folder:{tmp_path}")


def test_another_kind_of_data_is_refused(tmp_path: Path) -> None:
    for spec in ("birds", "voc:x", "cub:"):
        with pytest.raises(ValueError, match="`data` must be cub:ROOT, coco:ROOT or folder:ROOT"):
            open_dataset(spec)
    with pytest.raises(FileNotFoundError, match="`data` must name a folder"):
        open_dataset(f"cub:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="`half` must be 'train' or 'test', got 'both'"):
        open_dataset(f"cub:{tmp_path}", "both")
