"""The demonstration: what the drawn pictures promise, and the network that ships."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import gcfast
from gcfast.demo.birds import draw_bird
from gcfast.demo.network import WEIGHTS, BirdNet, load_network
from gcfast.demo.page import close_up, comment, outlined
from gcfast.demo.run import Score, draw_pictures, run_demo, scored
from gcfast.demo.species import PARTS, SPECIES, TRAINING_LABELS, UNSEEN_LABELS
from gcfast.evaluation.table import quality_table
from gcfast.images.overlay import overlay


def _labels_of(part: str) -> list[int]:
    return [label for label, species in enumerate(SPECIES) if species.part == part]


def test_species_split_every_family_in_two():
    assert len(SPECIES) >= 24
    assert len({species.name for species in SPECIES}) == len(SPECIES)
    assert sorted((*TRAINING_LABELS, *UNSEEN_LABELS)) == list(range(len(SPECIES)))
    for half in (TRAINING_LABELS, UNSEEN_LABELS):
        assert {SPECIES[label].part for label in half} == set(PARTS)


def test_the_same_arguments_draw_the_same_picture():
    first = draw_bird(3, seed=5, index=7)
    again = draw_bird(3, seed=5, index=7)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.part, again.part)
    other = draw_bird(3, seed=5, index=8)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, draw_bird(3, seed=6, index=7).image)


@pytest.mark.parametrize("size", [64, 97, 144])
def test_masks_lie_where_they_should(size):
    for index in range(12):
        label = index * 5 % len(SPECIES)
        picture = draw_bird(label, seed=1, index=index, size=size)
        assert picture.image.shape == (size, size, 3)
        assert picture.image.dtype == np.uint8
        assert picture.bird.shape == picture.part.shape == (size, size)
        assert picture.bird.dtype == picture.part.dtype == np.bool_
        assert picture.label == label
        assert picture.part.any(), SPECIES[label].name
        assert not (picture.part & ~picture.bird).any(), "the part is some of the bird"
        assert picture.part.sum() < 0.5 * picture.bird.sum()
        x0, y0, x1, y1 = picture.box
        assert picture.bird[y0:y1, x0:x1].sum() == picture.bird.sum()
        assert picture.bird[y0:y1, [x0, x1 - 1]].any(axis=0).all(), "the box touches the bird"
        assert picture.bird[[y0, y1 - 1], x0:x1].any(axis=1).all()
        # The whole bird is in the picture: nothing of it is on the rim.
        assert 0 < x0 < x1 < size
        assert 0 < y0 < y1 < size


@pytest.mark.parametrize("part", PARTS)
def test_species_of_a_family_differ_in_the_part_alone(part):
    for index in range(2):
        pictures = [draw_bird(label, seed=2, index=index) for label in _labels_of(part)]
        first = pictures[0]
        for other in pictures[1:]:
            assert np.array_equal(first.part, other.part)
            assert np.array_equal(first.bird, other.bird)
            differs = (first.image != other.image).any(axis=2)
            assert not (differs & ~first.part).any()
            # Nearly all of it: a grown pixel at the rim of the part may round to the same colour.
            assert (differs & first.part).sum() > 0.6 * first.part.sum()


def test_species_of_two_families_differ_in_the_two_parts_alone():
    for index, (one, other) in enumerate([(0, 8), (4, 20), (11, 25), (53, 2)]):
        a, b = (draw_bird(label, seed=3, index=index) for label in (one, other))
        differs = (a.image != b.image).any(axis=2)
        assert not (differs & ~(a.part | b.part)).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"label": len(SPECIES), "seed": 0, "index": 0}, "`label` must be in"),
        ({"label": 0, "seed": -1, "index": 0}, "`seed` and `index` must not be negative"),
        ({"label": 0, "seed": 0, "index": 0, "size": 63}, "`size` must be at least 64"),
    ],
)
def test_arguments_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        draw_bird(arguments.pop("label"), **arguments)


def test_the_network_that_ships():
    assert WEIGHTS.stat().st_size <= 2_000_000
    network = load_network()
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    images = torch.rand(2, 3, 144, 144, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeddings = network(images)
        maps = network.features(images)
    assert embeddings.shape == (2, 64)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert maps.shape == (2, 128, 36, 36)
    assert (maps >= 0).all()


def test_the_network_knows_unseen_species():
    """Recall at 1 among four pictures of each unseen species; chance is 0.03, .42 was seen."""
    labels = [label for label in UNSEEN_LABELS for _ in range(4)]
    images = np.stack([draw_bird(y, seed=4, index=i).image for i, y in enumerate(labels)])
    with torch.inference_mode():
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        embeddings = load_network()(batch)
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    nearest = torch.tensor(labels)[similarity.argmax(dim=1)]
    assert (nearest == torch.tensor(labels)).float().mean() > 0.25


@pytest.fixture(scope="module")
def small_table():
    """The quality table of 162 rows and 81 unseen pictures, of a seed that nothing else uses."""
    train, unseen = draw_pictures(seed=11, training_each=6, unseen_each=3)
    explainer = gcfast.Explainer(load_network(), layer="features", seed=0)
    return quality_table(explainer, train, list(scored(unseen.pictures)), Score())


def test_the_maps_single_out_the_part(small_table):
    """On 648 rows and 216 pictures .416 was seen, .267 for a random row and .385 for channels."""
    means = dict(small_table.rows)
    ours = means["Grad-CAM, for, top-50"]["part"]
    assert ours > 0.25
    assert ours > 10 * means["uniform"]["part"]
    assert ours > 1.2 * means["random neighbor"]["part"]
    assert ours > means["random channels"]["part"]


def test_the_maps_find_the_bird(small_table):
    means = dict(small_table.rows)
    for control in ("uniform", "channel sum", "random channels", "random neighbor"):
        assert means["Grad-CAM, for, top-50"]["mask"] > means[control]["mask"], control


def test_a_network_starts_from_its_seed():
    torch.manual_seed(0)
    first = BirdNet().state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(first[name], value) for name, value in BirdNet().state_dict().items())


def test_the_outline_goes_round_the_part():
    large = np.full((80, 80, 3), 128, dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:20, 12:24] = True
    lined = outlined(large, mask)
    assert (large == 128).all(), "the picture itself is left as it was"
    changed = (lined != 128).any(axis=2)
    inside = mask.repeat(2, axis=0).repeat(2, axis=1)
    assert not changed[22:38, 26:46].any(), "nothing is drawn over the part"
    assert not changed[:14].any()
    assert not changed[46:].any()
    assert (lined[changed & ~inside] == 255).any()
    # A walk from the part in any direction meets the line.
    assert all(line.any() for line in (changed[:20, 36], changed[40:, 36], changed[30, :24]))
    assert not (outlined(large, np.zeros((40, 40), dtype=bool)) != 128).any()


def test_the_close_up_is_of_the_hottest_place():
    picture = dataclasses.replace(draw_bird(0, seed=5, index=7), part=np.zeros((144, 144), bool))
    heat = torch.zeros(144, 144)
    heat[60, 70] = 1.0
    crop = np.asarray(
        Image.fromarray(picture.image[36:84, 46:94]).resize((288, 288), Image.Resampling.LANCZOS)
    )
    shown = close_up(picture, heat).astype(int)
    at = slice(6 * 24, 6 * 25)  # the hot pixel, six times as large
    assert (shown[at, at, 0] - shown[at, at, 2]).mean() > 60, "is yellow"
    cold = np.abs(shown - overlay(crop, np.zeros((288, 288)), dim=0.7)).max(2)
    cold[6 * 23 : 6 * 26, 6 * 23 : 6 * 26] = 0
    assert cold.max() <= 1, "is the dim picture elsewhere"
    corner = torch.zeros(144, 144)
    corner[143, 0] = 1.0
    assert close_up(picture, corner).shape == (288, 288, 3)


def test_a_comment_says_how_a_map_failed():
    picture = draw_bird(_labels_of("bill")[0], seed=5, index=7)
    near = draw_bird(_labels_of("tail")[0], seed=5, index=8)
    bird = picture.bird & ~picture.part

    def said(*places, near=near):
        heat = sum(torch.from_numpy(place / place.sum()) for place in places)
        return comment(picture, heat / heat.max(), near, [0.25, 0.75])

    mean = "All 2 unseen birds told by their bill: 50% on average."
    assert said(picture.part) == f"Found. {mean}"
    assert said(bird) == (
        "Missed: the hottest place is elsewhere on the bird. The nearest row is told by its tail, "
        f"another part: a proxy of the wrong kind. {mean}"
    )
    assert "not on the bird" in said(~picture.bird)
    assert "by its bill. All" in said(~picture.bird, near=picture)
    half = said(picture.part, bird, ~picture.bird)
    assert half.startswith("Found in part: the hottest place is on the bill, but much of the heat")


def test_the_whole_demonstration_in_small(tmp_path):
    lines: list[str] = []
    out = tmp_path / "made" / "here"
    run_demo(out, training_each=3, unseen_each=1, speed_rounds=1, echo=lines.append)
    text = "\n".join(lines)
    for words in (
        "box",
        "mask",
        "part",
        "uniform",
        "EmbeddingCAM",
        "channel sum, refined",
        "a second",
    ):
        assert words in text
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 8 * len(PARTS)
    assert page.count("<details>") == len(PARTS)
    assert page.count("Found") + page.count("Missed: ") == len(PARTS)
    assert "http" not in page.split("<body>")[1]


def test_the_demonstration_refuses_too_few_pictures(tmp_path):
    with pytest.raises(ValueError, match="`training_each` must be at least 2, got 1"):
        run_demo(tmp_path, training_each=1)
    with pytest.raises(ValueError, match="`unseen_each` must be at least 1, got 0"):
        run_demo(tmp_path, unseen_each=0)
    with pytest.raises(ValueError, match="`speed_rounds` must be at least 1, got 0"):
        run_demo(tmp_path, speed_rounds=0)
