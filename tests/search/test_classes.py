"""The nearest row of a class and of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gcfast.search import classes
from gcfast.search.classes import nearest_by_class


@pytest.mark.parametrize("chunk", [7, 1000])
def test_against_all_distances(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "TABLE_CHUNK", chunk)
    table = F.normalize(torch.randn(50, 8), dim=1)
    labels = torch.randint(4, (50,))
    queries, asked = F.normalize(torch.randn(9, 8), dim=1), torch.randint(4, (9,))
    got = nearest_by_class(queries, table, labels, asked)
    distances = torch.cdist(queries.double(), table.double()).square()
    for i in range(9):
        same = labels == asked[i]
        own = distances[i].masked_fill(~same, torch.inf)
        other = distances[i].masked_fill(same, torch.inf)
        assert got.own_row[i] == own.argmin()
        assert got.other_row[i] == other.argmin()
        assert float(got.own[i]) == pytest.approx(float(own.min()), rel=1e-5)
        assert float(got.other[i]) == pytest.approx(float(other.min()), rel=1e-5)
        wanted = float((other.min() / own.min()).log())
        assert float(got.log_ratio[i]) == pytest.approx(wanted, abs=1e-4)


def test_classes_that_are_not_there() -> None:
    table, labels = torch.eye(3), torch.zeros(3, dtype=torch.int64)
    got = nearest_by_class(torch.eye(3)[:2], table, labels, torch.tensor([0, 5]))
    assert got.own_row.tolist() == [0, -1]
    assert got.other_row.tolist() == [-1, 1]
    assert got.own.tolist() == [0, torch.inf]
    assert got.other.tolist() == [torch.inf, 0]
    assert got.log_ratio.isfinite().all()
    assert got.log_ratio[0] > 50 > -50 > got.log_ratio[1]


def test_a_row_that_was_met_first_wins_a_tie() -> None:
    table = torch.tensor([[1.0, 0.0]] * 4)
    got = nearest_by_class(table[:1], table, torch.tensor([1, 0, 0, 1]), torch.tensor([0]))
    assert (got.own_row.item(), got.other_row.item()) == (1, 0)
    assert got.log_ratio.item() == 0
