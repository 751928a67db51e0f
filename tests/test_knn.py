"""ops.knn: exact search against brute force in float64."""

import math

import pytest
import torch
from helpers import guarded, strided

from gcfast import ops, reference


def _brute_force(queries, table, metric):
    if metric == "l2":
        return (queries.double()[:, None] - table.double()).square().sum(-1)
    return queries.double() @ table.double().T


def _check(queries, table, k, metric, tolerance):
    """Right distances in order; rows may differ from brute force only among equals."""
    truth = _brute_force(queries, table, metric)
    distances, rows = ops.knn(queries, table, k, metric=metric)
    found = min(k, len(table))
    assert (rows[:, :found] >= 0).all()
    assert (rows[:, found:] == -1).all()
    sign = 1 if metric == "l2" else -1
    wanted = (sign * truth).sort(1).values[:, :found] * sign
    torch.testing.assert_close(distances[:, :found].double(), wanted, atol=tolerance, rtol=1e-5)
    gathered = truth.gather(1, rows[:, :found])
    torch.testing.assert_close(gathered, wanted, atol=tolerance, rtol=1e-5)
    assert all(len(set(r)) == found for r in rows[:, :found].tolist())


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (5, 101, 17, 3), (3, 40, 8, 32), (2, 3, 4, 7), (0, 5, 3, 2)], ids=str
)
def test_matches_brute_force(shape, dtype, metric):
    B, N, D, k = shape
    _check(guarded((B, D), dtype), guarded((N, D), dtype), k, metric, 1e-5)


def test_many_tiles_give_the_same_answer(monkeypatch):
    queries, table = torch.randn(7, 16), torch.randn(211, 16)
    wanted = ops.knn(queries, table, 5)
    monkeypatch.setattr(reference, "KNN_TILE_BYTES", 8 * 7 * 20)  # 20 rows a tile
    got = ops.knn(queries, table, 5)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])


def test_equal_rows_go_to_the_lower_id_and_have_distance_zero():
    table = torch.nn.functional.normalize(torch.randn(60, 32), dim=1)
    table[50] = table[41] = table[7]
    distances, rows = ops.knn(table[[7]], table, 4)
    assert rows[0, :3].tolist() == [7, 41, 50]
    assert distances[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert distances[0, 3] > 0


def test_neighbours_closer_than_the_rounding_of_the_dot_product():
    # At norm 100 |q|^2 + |t|^2 - 2<q,t> is off by about 1e-3, the differences are 1e-4 and less.
    query = torch.full((1, 4), 50.0)
    table = query + torch.tensor([3e-2, 1e-2, 2e-2])[:, None]
    distances, rows = ops.knn(query, table, 3)
    assert rows[0].tolist() == [1, 2, 0]
    wanted = (query.double() - table.double()).square().sum(1)[[1, 2, 0]]
    torch.testing.assert_close(distances[0].double(), wanted)


def test_squares_and_strides():
    queries, table = torch.randn(3, 6), torch.randn(20, 6)
    wanted = ops.knn(queries, table, 2)
    got = ops.knn(strided(queries), strided(table), 2, squares=table.square().sum(1))
    assert torch.equal(got[1], wanted[1])


def test_autocast_does_not_reach_the_distances():
    queries, table = torch.randn(4, 32), torch.randn(50, 32)
    wanted = ops.knn(queries, table, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.knn(queries, table, 3)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_empty_table():
    distances, rows = ops.knn(torch.randn(2, 3), torch.empty(0, 3), 2)
    assert rows.tolist() == [[-1, -1], [-1, -1]]
    assert distances.tolist() == [[math.inf] * 2] * 2


def test_by_hand():
    table = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    distances, rows = ops.knn(torch.tensor([[0.0, 1.0]]), table, 3)
    assert rows.tolist() == [[0, 2, 1]]
    assert distances.tolist() == [[1.0, 2.0, 18.0]]
    products, rows = ops.knn(torch.tensor([[0.0, 1.0]]), table, 3, metric="ip")
    assert rows.tolist() == [[1, 0, 2]]
    assert products.tolist() == [[4.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"queries": torch.ones(3)}, ValueError, r"`queries` must have shape \[B, D\], got \[3\]"),
        ({"table": torch.ones(4, 2)}, ValueError, r"\[N, D\] with D = 3, got \[4, 2\]"),
        ({"k": 0}, ValueError, "`k` must be at least 1"),
        ({"metric": "cosine"}, ValueError, "`metric` must be one of 'l2', 'ip', got 'cosine'"),
        ({"squares": torch.ones(3)}, ValueError, r"`squares` must have shape \[N\] with N = 4"),
        ({"table": torch.ones(4, 3, device="meta")}, ValueError, "device of `queries`, cpu"),
    ],
    ids=["rank", "width", "k", "metric", "squares", "device"],
)
def test_bad_input(change, error, words):
    arguments = {"queries": torch.ones(2, 3), "table": torch.ones(4, 3), "k": 1, **change}
    with pytest.raises(error, match=words):
        ops.knn(arguments.pop("queries"), arguments.pop("table"), arguments.pop("k"), **arguments)
