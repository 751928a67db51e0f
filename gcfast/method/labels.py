"""Labels as people have them (numbers or names) and as the tables hold them.

Classes are int64. Objectives over ranked pairs (``Objective.real_labels``) have real numbers, which
are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Labels:
    """Numbers for labels that come one after another, all numbers or all names.

    Numbers are kept as they are; names become 0, 1, … in the order in which they first came.

    Args:
        names: names that came before, by number.
        seen: numbers that came before.

    Attributes:
        names: the names by number; empty where labels are numbers.
    """

    def __init__(self, names: Iterable[str] = (), seen: Iterable[int] = ()) -> None:
        self.names: list[str] = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._seen = set(seen)
        self._kind: type | None = None
        if self._seen or self.names:
            self._kind = str if self.names else int

    @staticmethod
    def listed(labels: Any, count: int) -> list[int] | list[str]:
        """Labels from a tensor, an array or a sequence, as a list of ints or of strings.

        Raises:
            TypeError: labels that are neither whole numbers nor strings.
            ValueError: another number of them than images; -1.
        """
        if isinstance(labels, Tensor) and (labels.is_floating_point() or labels.is_complex()):
            raise TypeError(f"`labels` must be whole numbers or strings, got {labels.dtype}")
        values = _elements(labels, count)
        named = [isinstance(v, str) for v in values]
        if all(named):
            return [str(v) for v in values]
        if any(named):
            raise TypeError(
                f"`labels` must be whole numbers or strings, all of one kind, got "
                f"{values[named.index(False)]!r} beside {values[named.index(True)]!r}"
            )
        out: list[int] = []
        for value in values:
            item = value.item() if hasattr(value, "item") else value
            if isinstance(item, bool) or not isinstance(item, int):
                raise TypeError(
                    f"`labels` must be whole numbers or strings, all of one kind, got {value!r}"
                )
            if item == -1:
                raise ValueError(
                    "`labels` must not be -1, which stands for no label: leave such images out"
                )
            out.append(item)
        return out

    def add(self, labels: list[int] | list[str]) -> Tensor:
        """The numbers of further labels, [B] int64.

        Raises:
            TypeError: names after numbers, or numbers after names.
        """
        numbers = []
        for label in labels:
            if self._kind is None:
                self._kind = type(label)
            if type(label) is not self._kind:
                raise TypeError(
                    "`labels` must be all numbers or all names, got both: "
                    f"{label!r} after {self._kind.__name__} labels"
                )
            if isinstance(label, str):
                if label not in self._numbers:
                    self._numbers[label] = len(self.names)
                    self.names.append(label)
                label = self._numbers[label]
            numbers.append(label)
        self._seen.update(numbers)
        return torch.tensor(numbers, dtype=torch.int64)

    def distinct(self) -> int:
        """How many different labels there are."""
        return len(self._seen)

    def require_two(self) -> None:
        """Raise ValueError where a build has no two classes."""
        if self.distinct() < 2:
            raise ValueError(
                "`loader` must give at least two classes, to tell one from the others; got one"
            )


class Values:
    """Real-valued labels that come one after another; as :class:`Labels`, without names."""

    def __init__(self, seen: Iterable[float] = ()) -> None:
        self.names: list[str] = []
        self._seen = set(seen)

    @staticmethod
    def listed(labels: Any, count: int) -> list[float]:
        """Labels from a tensor, an array or a sequence, as a list of finite numbers.

        Raises:
            TypeError: labels that are not numbers.
            ValueError: NaN or infinity; another number of them than images.
        """
        out: list[float] = []
        for value in _elements(labels, count):
            item = value.item() if hasattr(value, "item") else value
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise TypeError(f"`labels` must be numbers for a RankLoss, got {value!r}")
            if not math.isfinite(item):
                raise ValueError(f"`labels` must be finite for a RankLoss, got {item}")
            out.append(float(item))
        return out

    def add(self, labels: list[float]) -> Tensor:
        """Further labels as they are stored, [B] float64."""
        self._seen.update(labels)
        return torch.tensor(labels, dtype=torch.float64)

    def require_two(self) -> None:
        """Raise ValueError where a build has nothing to compare."""
        if len(self._seen) < 2:
            raise ValueError(
                "`loader` must give at least two different labels, since a RankLoss compares "
                "them; got one"
            )


def label_name(label: float, names: Sequence[str]) -> str:
    """Return the name of a label, or the number where labels have no names; "" where it is none."""
    if isinstance(label, float):
        return "" if math.isnan(label) else f"{label:.12g}"
    if label == -1:
        return ""
    return names[label] if names else str(label)


def column(
    real_labels: bool, names: Iterable[str] = (), seen: Iterable[Any] = ()
) -> Labels | Values:
    """Labels of the kind that an objective has, after ``names`` and ``seen``, which came before."""
    return Values(seen) if real_labels else Labels(names, seen)


def _elements(labels: Any, count: int) -> Sequence[Any]:
    """The elements, in number as there are images."""
    if isinstance(labels, str) or not (isinstance(labels, Iterable) or hasattr(labels, "tolist")):
        raise TypeError(f"`labels` must be one label an image, got {labels!r}")
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else 1
        raise ValueError(f"`labels` must have B = {count} elements, got {got}")
    return values


def numbers_like(
    column: Tensor, names: list[str], labels: Any, count: int, *, real_labels: bool
) -> Tensor:
    """Labels of ``count`` images as the database's column has them, [B] of its dtype.

    Raises:
        TypeError, ValueError: as :meth:`Labels.listed`, :meth:`Values.listed`, and numbers_for.
        ValueError: the objective is over real labels and the column holds classes, or the reverse.
    """
    if column.is_floating_point() != real_labels:
        kinds = ("classes", "real numbers")
        raise ValueError(
            f"`objective` must be one over {kinds[column.is_floating_point()]}, which the "
            f"database's labels are, got one over {kinds[real_labels]}"
        )
    if real_labels:
        return torch.tensor(Values.listed(labels, count), dtype=torch.float64)
    return numbers_for(Labels.listed(labels, count), names)


def numbers_for(labels: list[int] | list[str], names: list[str]) -> Tensor:
    """Labels as a database with these names numbers them, [B] int64.

    Raises:
        ValueError: a name that the database does not have, or names where it has numbers.
    """
    if not labels or isinstance(labels[0], int):
        return torch.tensor(labels, dtype=torch.int64)
    known = {name: number for number, name in enumerate(names)}
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ValueError(f"`labels` must be classes of the database, got {unknown[0]!r}")
    return torch.tensor([known[str(label)] for label in labels], dtype=torch.int64)
