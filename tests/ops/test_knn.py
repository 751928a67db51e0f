"""ops.knn: exact search against brute force in float64."""

import math
from unittest.mock import Mock

import pytest
import torch
from helpers import guarded, strided

from gcfast import ops, reference
from gcfast.kernels.knn import launch_knn
from gcfast.kernels.launch import knn_config


def _brute_force(queries, table, metric):
    if metric == "l2":
        return (queries.double()[:, None] - table.double()).square().sum(-1)
    return queries.double() @ table.double().T


def _check(queries, table, k, metric, tolerance, backend):
    """Right distances in order; rows may differ from brute force only among equals."""
    truth = _brute_force(queries, table, metric)
    distances, rows = ops.knn(queries, table, k, metric=metric, backend=backend)
    found = min(k, len(table))
    assert (rows[:, :found] >= 0).all()
    assert (rows[:, found:] == -1).all()
    sign = 1 if metric == "l2" else -1
    wanted = (sign * truth).sort(1).values[:, :found] * sign
    torch.testing.assert_close(distances[:, :found].double(), wanted, atol=tolerance, rtol=1e-5)
    gathered = truth.gather(1, rows[:, :found])
    torch.testing.assert_close(gathered, wanted, atol=tolerance, rtol=1e-5)
    assert all(len(set(r)) == found for r in rows[:, :found].tolist())


BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@BACKENDS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (5, 101, 17, 3), (3, 40, 8, 32), (2, 3, 4, 7), (0, 5, 3, 2)], ids=str
)
def test_matches_brute_force(shape, dtype, metric, backend, device):
    B, N, D, k = shape
    queries, table = guarded((B, D), dtype).to(device), guarded((N, D), dtype).to(device)
    _check(queries, table, k, metric, 1e-5, backend)


@BACKENDS
@pytest.mark.parametrize("tile_rows", [1000, 20])
def test_of_many_equal_rows_the_lowest_are_taken(tile_rows, backend, device, monkeypatch):
    monkeypatch.setattr(reference, "KNN_TILE_BYTES", 8 * 2 * tile_rows)
    table = torch.randn(1, 4).expand(60, 4).clone()
    table[::7] += 1
    queries = table[[1, 0]].to(device)
    _, rows = ops.knn(queries, table.to(device), 5, backend=backend)
    near = [[i for i in range(60) if i % 7], [i for i in range(60) if i % 7 == 0]]
    assert rows.tolist() == [near[0][:5], near[1][:5]]


def test_many_tiles_give_the_same_answer(monkeypatch):
    queries, table = torch.randn(7, 16), torch.randn(211, 16)
    wanted = ops.knn(queries, table, 5)
    monkeypatch.setattr(reference, "KNN_TILE_BYTES", 8 * 7 * 20)  # 20 rows a tile
    got = ops.knn(queries, table, 5)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])


@BACKENDS
@pytest.mark.parametrize("copies", [1, 3], ids=["one query", "three"])
def test_equal_rows_go_to_the_lower_id_and_have_distance_zero(backend, copies, device):
    table = torch.nn.functional.normalize(torch.randn(60, 32), dim=1).to(device)
    table[50] = table[41] = table[7]
    distances, rows = ops.knn(table[[7] * copies], table, 4, backend=backend)
    assert rows[0, :3].tolist() == [7, 41, 50]
    assert distances[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert distances[0, 3] > 0


@BACKENDS
@pytest.mark.parametrize("copies", [1, 3], ids=["one query", "three"])
def test_neighbours_closer_than_the_rounding_of_the_dot_product(backend, copies, device):
    # At norm 100 |q|^2 + |t|^2 - 2<q,t> is off by about 1e-3, the differences are 1e-4 and less.
    query = torch.full((1, 4), 50.0, device=device)
    table = query + torch.tensor([3e-2, 1e-2, 2e-2], device=device)[:, None]
    distances, rows = ops.knn(query.expand(copies, 4), table, 3, backend=backend)
    assert rows[0].tolist() == [1, 2, 0]
    wanted = (query.double() - table.double()).square().sum(1)[[1, 2, 0]]
    torch.testing.assert_close(distances[0].double(), wanted)


@BACKENDS
@pytest.mark.parametrize("B", [1, 3])
def test_squares_and_strides(B, backend, device):
    queries, table = torch.randn(B, 6, device=device), torch.randn(20, 6, device=device)
    wanted = ops.knn(queries, table, 2)
    squares = table.square().sum(1).double()
    got = ops.knn(strided(queries), strided(table), 2, squares=squares.float(), backend=backend)
    assert torch.equal(got[1], wanted[1])
    got = ops.knn(queries.T.contiguous().T, table.T.contiguous().T, 2, backend=backend)
    assert torch.equal(got[1], wanted[1])
    got = ops.knn(queries, table.half(), 2, squares=squares.half(), backend=backend)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-2, rtol=1e-2)


def test_one_row_that_stands_for_all_of_a_table_too_large_to_hold(device):
    # Stride 0: 3 x 2^30 elements that lie in one place, whose offsets do not fit into 32 bits.
    row = torch.randn(1, 3, device=device)
    queries = torch.randn(1, 3, device=device)
    distances, rows = launch_knn(queries, row.expand(2**30, 3)[-20:], 2)
    assert rows.tolist() == [[0, 1]]
    torch.testing.assert_close(distances, (queries - row).square().sum().expand(1, 2))


def test_columns_too_far_apart_for_32_bits_are_copied(device):
    # Only the strides are so large; nothing of the size of their product exists.
    buffer = torch.randn(4, 2, device=device)
    config = knn_config(1, 4, 1, torch.float32, torch.float32, 1)
    table = buffer.as_strided((1, 2), (2**30 // config.block_n, 1))
    distances, rows = launch_knn(buffer[:1], table, 1)
    assert rows.tolist() == [[0]]
    assert distances.tolist() == [[0.0]]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("processors", [1, 5, 40])
@pytest.mark.parametrize("B", [1, 3])
def test_any_number_of_stretches_gives_the_same_answer(B, processors, metric, device):
    queries, table = torch.randn(B, 16, device=device), torch.randn(331, 16, device=device)
    table[300] = table[4]
    queries[0] = table[4]
    config = knn_config(B, 331, 3, torch.float32, torch.float32, processors)
    assert config.splits == {1: 3, 5: 6, 40: 6}[processors]
    assert config.rows_per_split * config.splits >= 331
    got = launch_knn(queries, table, 3, metric=metric, config=config)
    wanted = reference.knn(queries, table, 3, metric=metric)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])


def test_more_equal_rows_than_candidates_go_to_the_lowest_ids(device):
    table = torch.ones(200, 5, device=device)
    table[150:] = 0.5  # nearer, and later than a tile of others
    distances, rows = ops.knn(torch.zeros(3, 5, device=device), table, 6, backend="triton")
    assert rows.tolist() == [[150, 151, 152, 153, 154, 155]] * 3
    assert distances.tolist() == [[1.25] * 6] * 3


def test_orthogonal_rows_tie_whatever_the_sign_of_their_zero(device):
    table = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], device=device)
    for copies in (1, 3):
        queries = torch.tensor([[1.0, 0.0]] * copies, device=device)
        products, rows = ops.knn(queries, table, 4, metric="ip", backend="triton")
        assert rows[0].tolist() == [0, 1, 3, 2]
        assert [math.copysign(1, p) for p in products[0].tolist()] == [1, 1, 1, -1]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("B", [2, 4])
def test_nan_and_infinite_queries_get_rows_that_exist_and_leave_others_alone(B, device):
    queries, table = torch.randn(B, 7, device=device), torch.randn(70, 7, device=device)
    queries[0, 3] = math.nan
    distances, rows = ops.knn(queries, table, 5, backend="triton")
    assert distances[0].isnan().all()
    assert rows[0].tolist() == [0, 1, 2, 3, 4]
    wanted = reference.knn(queries[1:], table, 5)
    assert torch.equal(rows[1:], wanted[1])
    table[2, 0], queries[0, 3] = math.nan, math.inf
    distances, rows = ops.knn(queries, table, 5, backend="triton")
    assert sorted(rows[0].tolist())[-1] < 70
    assert (distances[0] == math.inf).all()
    assert not (rows[1:] == 2).any()


def test_beyond_the_kernel_the_reference_runs(monkeypatch, device):
    ran = Mock(side_effect=reference.knn)
    monkeypatch.setattr(reference, "knn", ran)
    table = torch.randn(40, 3, device=device)
    assert ops.knn(table[:1], table, 33, backend="triton")[1].shape == (1, 33)
    wide = torch.randn(3, 2049, device=device)
    assert ops.knn(wide, wide, 1, backend="triton")[1].tolist() == [[0], [1], [2]]
    assert ran.call_count == 2
    ops.knn(table[:1], table, 32, backend="triton")
    assert ran.call_count == 2


def test_autocast_does_not_reach_the_distances():
    queries, table = torch.randn(4, 32), torch.randn(50, 32)
    wanted = ops.knn(queries, table, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.knn(queries, table, 3)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@BACKENDS
@pytest.mark.parametrize("B", [2, 3])
def test_empty_table(B, backend, device):
    queries, table = torch.randn(B, 3, device=device), torch.empty(0, 3, device=device)
    distances, rows = ops.knn(queries, table, 2, backend=backend)
    assert rows.tolist() == [[-1, -1]] * B
    assert distances.tolist() == [[math.inf] * 2] * B


@BACKENDS
def test_by_hand(backend, device):
    table = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], device=device)
    query = torch.tensor([[0.0, 1.0]], device=device)
    distances, rows = ops.knn(query, table, 3, backend=backend)
    assert rows.tolist() == [[0, 2, 1]]
    assert distances.tolist() == [[1.0, 2.0, 18.0]]
    products, rows = ops.knn(query, table, 3, metric="ip", backend=backend)
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
