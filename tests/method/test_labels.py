"""Labels as people have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gcfast.method.labels import Labels, numbers_for


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 3],
        (3, 1, 3),
        torch.tensor([3, 1, 3]),
        torch.tensor([3, 1, 3], dtype=torch.uint8),
        np.array([3, 1, 3]),
        [torch.tensor(3), torch.tensor(1), torch.tensor(3)],
        [np.int64(3), np.int32(1), 3],
        range(3, 0, -1),
    ],
    ids=["list", "tuple", "tensor", "uint8", "array", "0-d tensors", "numpy ints", "range"],
)
def test_numbers_of_every_kind(labels: Any) -> None:
    listed = Labels.listed(labels, 3)
    assert listed == ([3, 2, 1] if isinstance(labels, range) else [3, 1, 3])
    assert all(type(label) is int for label in listed)


@pytest.mark.parametrize(
    "labels", [["a", "b"], ("a", "b"), np.array(["a", "b"])], ids=["list", "tuple", "array"]
)
def test_names_of_every_kind(labels: Any) -> None:
    assert Labels.listed(labels, 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([0.5, 1.0]), TypeError, "whole numbers or strings, got torch.float32"),
        (np.array([0.5, 1.0]), TypeError, "all of one kind, got 0.5"),
        ([True, False], TypeError, "all of one kind, got True"),
        ([1, "a"], TypeError, "all of one kind, got 1 beside 'a'"),
        (["a", None], TypeError, "all of one kind, got None beside 'a'"),
        ([None, None], TypeError, "all of one kind, got None"),
        (torch.tensor([[0], [1]]), TypeError, r"all of one kind, got \[0\]"),
        ("ab", TypeError, "one label an image, got 'ab'"),
        (7, TypeError, "one label an image, got 7"),
        (None, TypeError, "one label an image, got None"),
        (torch.tensor(7), ValueError, "have B = 2 elements, got 1"),
        ([1, 2, 3], ValueError, "have B = 2 elements, got 3"),
    ],
    ids=str,
)
def test_what_is_no_label_is_refused(labels: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"`labels` must .*{words}"):
        Labels.listed(labels, 2)


def test_names_are_numbered_as_they_come() -> None:
    column = Labels()
    assert column.add(["wren", "robin"]).tolist() == [0, 1]
    assert column.add(["robin", "tit"]).tolist() == [1, 2]
    assert column.names == ["wren", "robin", "tit"]
    assert column.distinct() == 3


def test_numbers_stay_as_they_are() -> None:
    column = Labels()
    assert column.add([7, -2, 7]).tolist() == [7, -2, 7]
    assert column.names == []
    assert column.distinct() == 2


def test_a_column_goes_on_from_what_came_before() -> None:
    named = Labels(["wren", "robin"], [0, 1])
    assert named.add(["tit", "robin"]).tolist() == [2, 1]
    assert named.distinct() == 3
    with pytest.raises(TypeError, match="got both: 5 after str labels"):
        named.add([5])
    numbered = Labels([], [4])
    with pytest.raises(TypeError, match="got both: 'a' after int labels"):
        numbered.add(["a"])


@pytest.mark.parametrize(("first", "then"), [([1], ["a"]), (["a"], [1])], ids=["names", "numbers"])
def test_both_kinds_are_refused(first: Any, then: Any) -> None:
    column = Labels()
    column.add(first)
    with pytest.raises(TypeError, match="all numbers or all names, got both"):
        column.add(then)


def test_labels_as_a_database_numbers_them() -> None:
    assert numbers_for(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    assert numbers_for([5, 1], []).tolist() == [5, 1]
    assert numbers_for([], ["a"]).tolist() == []
    with pytest.raises(ValueError, match="classes of the database, got 'c'"):
        numbers_for(["a", "c"], ["a", "b"])
    with pytest.raises(ValueError, match="classes of the database, got 'a'"):
        numbers_for(["a"], [])


def test_minus_one_stands_for_no_label():
    with pytest.raises(ValueError, match="`labels` must not be -1, which stands for no label"):
        Labels.listed([0, -1], 2)
    assert Labels.listed([0, -2], 2) == [0, -2]
