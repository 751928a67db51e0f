"""How many actors a cluster has room for, next to what reads."""

import pytest

from gcfast.ray.cluster import fitted


@pytest.mark.parametrize(
    ("have", "asked", "pool"),
    [
        ((1, 0), (None, None, None), (1, 0, 0)),  # an actor that takes no CPU from the readers
        ((2, 0), (None, None, None), (1, 1, 0)),
        ((16, 0), (None, None, None), (15, 1, 0)),
        ((16, 0), (None, 4, None), (3, 4, 0)),
        ((2, 0), (2, 0.5, None), (2, 0.5, 0)),
        ((16, 2), (None, None, None), (2, 1, 1)),
        ((16, 2), (None, None, 0.25), (8, 1, 0.25)),
        ((4, 8), (None, None, None), (3, 1, 1)),
        ((1, 1), (None, None, None), (1, 0, 1)),
        ((1, 0), (3, 0, None), (3, 0, 0)),
    ],
)
def test_a_cpu_is_left_to_readers(have, asked, pool):
    assert fitted(*have, *asked) == pool


@pytest.mark.parametrize(
    ("have", "asked", "words"),
    [
        (
            (2, 0),
            (2, None, None),
            "`actors` must be at most 1 of 1 CPUs and 0 GPUs, got 2",
        ),
        ((8, 2), (3, None, None), "`actors` must be at most 2 of 1 CPUs and 1 GPUs, got 3"),
        ((2, 0), (None, 2, None), "`cpus` and `gpus` must leave room for an actor, got 2 and 0"),
        ((2, 0), (None, None, 1), "`cpus` and `gpus` must leave room for an actor, got 1 and 1"),
        ((2, 0), (None, -1, None), "`cpus` must be a number of at least 0, got -1"),
        ((2, 0), (0, None, None), "`actors` must be"),
    ],
)
def test_more_than_there_is(have, asked, words):
    with pytest.raises(ValueError, match=words):
        fitted(*have, *asked)
