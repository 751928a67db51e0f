"""The operations in PyTorch's own: equal to their specification, ties and missing rows included."""

import pytest
import torch

from gcfast import reference
from gcfast.explain.exported import decompositions


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("rows", "k"), [(50, 1), (50, 5), (9, 1), (4, 3), (3, 5)], ids=str)
def test_knn(metric, rows, k):
    queries, table = torch.randn(7, 6), torch.randn(rows, 6)
    wanted = reference.knn(queries, table, k, metric=metric)
    got = decompositions.knn(queries, table, k, metric=metric)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_knn_takes_the_lower_of_many_equal_rows():
    # More of them than candidates that are measured again, and not next to each other.
    row = torch.randn(6)
    table = torch.randn(200, 6)
    equal = torch.arange(199, 20, -7)
    assert len(equal) > 2 * reference.KNN_SPARE
    table[equal] = row
    squares = table.square().sum(1)
    distances, rows = decompositions.knn(row[None], table, 3, squares)
    assert rows.tolist() == [sorted(equal.tolist())[:3]]
    assert distances.tolist() == [[0, 0, 0]]


def test_knn_orders_by_exact_distances():
    # Far from 0, where |t|^2 - 2 <q, t> in float32 is wrong by more than the rows differ in.
    query = torch.full((1, 4), 100.0)
    table = query + torch.tensor([[3e-3], [2e-3], [1e-3], [4e-3]])
    scores = table.square().sum(1) - 2 * (table @ query[0])
    assert scores.argsort().tolist() != [2, 1, 0, 3]
    distances, rows = decompositions.knn(query, table, 4)
    assert rows.tolist() == [[2, 1, 0, 3]]
    assert torch.equal(distances, (table[rows[0]] - query).square().sum(1)[None])


def test_knn_of_a_table_in_float16():
    queries, table = torch.randn(3, 6), torch.randn(40, 6).half()
    got, wanted = decompositions.knn(queries, table, 2), reference.knn(queries, table, 2)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])


def test_refine_is_the_same_in_one_piece():
    maps, finer = torch.rand(3, 4, 4), torch.randn(3, 5, 8, 8)
    torch.testing.assert_close(decompositions.refine(maps, finer), reference.refine(maps, finer))


def test_index_of_rows_alone():
    table, ids = torch.randn(5, 2), torch.tensor([[4, 0, 1]])
    assert torch.equal(decompositions.index(table, [ids]), table[ids])
    for indices in ([None, ids], [ids, ids], [torch.ones(5, dtype=torch.bool)]):
        assert decompositions.index(table, indices) is NotImplemented
