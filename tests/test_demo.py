"""The demonstration: what the drawn pictures promise, and the network that ships."""

from __future__ import annotations

import numpy as np
import pytest

from gcfast.demo.birds import bounding_box, draw_bird
from gcfast.demo.species import PARTS, SPECIES, TRAINING_LABELS, UNSEEN_LABELS


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
    for index in range(18):
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
    for index in range(3):
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


def test_bounding_box_by_hand():
    mask = np.zeros((5, 7), dtype=bool)
    assert bounding_box(mask) == (0, 0, 0, 0)
    mask[2, 3] = mask[3, 5] = True
    assert bounding_box(mask) == (3, 2, 6, 4)


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
