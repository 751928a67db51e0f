"""ops.knn: exact search against brute force in float64."""

import math
from unittest.mock import Mock

import pytest
import torch
from helpers import guarded, strided

from gcfast import ops, reference
from gcfast.kernels.knn import launch_knn
from gcfast.kernels.launch import knn_config
from gcfast.kernels.search.group_bounds import launch_group_bounds
from gcfast.kernels.search.row_squares import row_squares


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
    config = knn_config(1, 4, 2, 1, 1)
    table = buffer.as_strided((1, 2), (2**30 // config.block_n, 1))
    distances, rows = launch_knn(buffer[:1], table, 1)
    assert rows.tolist() == [[0]]
    assert distances.tolist() == [[0.0]]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("splits", [1, 2, 5, 6])
@pytest.mark.parametrize("B", [1, 3])
def test_any_number_of_programs_gives_the_same_answer(B, splits, metric, device):
    queries, table = torch.randn(B, 16, device=device), torch.randn(331, 16, device=device)
    table[300] = table[4]
    queries[0] = table[4]
    config = knn_config(B, 331, 16, 3, 5)
    assert config.splits == 6  # a tile of 64 rows each
    config = config._replace(splits=splits)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
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


def _exact(queries, table, k, metric="l2"):
    """The k lowest by (distance rounded to float32, id), NaN after infinity."""
    left = queries.double()[:, None]
    if metric == "l2":
        distances = (left - table.double()).square().sum(-1).float()
    else:
        distances = (left * table.double()).sum(-1).float()
    distances = distances.cpu()
    distances[distances.isnan()] = math.nan  # of one sign, for the sort
    ordered = (distances if metric == "l2" else -distances).sort(dim=1, stable=True)
    return (ordered.values if metric == "l2" else -ordered.values)[:, :k], ordered.indices[:, :k]


def _check_exactly(queries, table, k, metric="l2", *, reference_agrees=True, **config):
    """Equal to what float64 says; where their rounding allows it, to the reference as well."""
    choice = knn_config(len(queries), len(table), queries.shape[1], k, 2)._replace(**config)
    distances, rows = launch_knn(queries, table, k, metric=metric, config=choice)
    wanted = _exact(queries, table, k, metric)
    assert rows.tolist() == wanted[1].tolist()
    torch.testing.assert_close(distances.cpu(), wanted[0], rtol=2e-7, atol=0, equal_nan=True)
    if reference_agrees:
        on_cpu = reference.knn(queries.cpu(), table.cpu(), k, metric=metric)
        assert torch.equal(rows.cpu(), on_cpu[1])


def _unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


METRICS = pytest.mark.parametrize("metric", ["l2", "ip"])
BATCHES = pytest.mark.parametrize("B", [2, 17])


@METRICS
@BATCHES
def test_distances_that_differ_by_less_than_a_products_error(B, metric, device):
    queries, table = _unit(B, 24), _unit(300, 24)
    # 40 rows a query that differ by 2e-5 in distance, a hundredth of the error; five queries.
    for i in range(min(B, 5)):
        steps = 1 + 1e-5 * torch.randperm(40)
        side = torch.nn.functional.normalize(torch.randn(24), dim=0)
        if metric == "l2":
            table[i * 40 : i * 40 + 40] = queries[i] + 0.3 * steps[:, None] * side
        else:
            table[i * 40 : i * 40 + 40] = 2 * steps[:, None] * queries[i]
    _check_exactly(queries.to(device), table.to(device), 7, metric)


@pytest.mark.parametrize(("slices", "allowed"), [(0, 2**30), (3, 100)])
def test_neighbours_that_share_a_class(slices, allowed, device):
    # Two programs, so each place of every second tile of 64 rows is of one class.
    queries, table = _unit(3, 24), _unit(700, 24)
    table[3::128] = queries[0] + 0.01 * torch.randn(6, 24)
    table[11::128] = queries[0] + 0.01 * torch.randn(6, 24)  # of the same groups
    table[64::64] = queries[1] + 0.01 * torch.randn(10, 24)
    queries, table = queries.to(device), table.to(device)
    _check_exactly(queries, table, 9, splits=2, slices=slices, allowed=allowed)


@METRICS
@BATCHES
def test_copies_of_rows(B, metric, device):
    table = _unit(3, 20).repeat(60, 1)
    table[100:] += 0.2 * torch.randn(80, 20)
    queries = torch.cat([table[:2], _unit(B - 2, 20)])
    _check_exactly(queries.to(device), table.to(device), 32, metric)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@METRICS
@pytest.mark.parametrize("scale", [1e-25, 1e-14, 1e-6, 1e6, 1e17, 1e19])
def test_norms_far_from_one(scale, metric, device):
    queries, table = scale * _unit(3, 20), scale * _unit(80, 20)
    # In float32 all of these products, or squares, are 0 or infinite.
    is_lost = scale in (1e-25, 1e19)
    _check_exactly(queries.to(device), table.to(device), 4, metric, reference_agrees=not is_lost)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@METRICS
def test_norms_far_from_each_other(metric, device):
    queries = _unit(5, 20) * torch.exp(4 * torch.randn(5, 1))
    table = _unit(150, 20) * torch.exp(4 * torch.randn(150, 1))
    _check_exactly(queries.to(device), table.to(device), 5, metric)
    queries[3], table[7] = 0, 0
    _check_exactly(queries.to(device), table.to(device), 5, metric)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@METRICS
@pytest.mark.parametrize(("slices", "allowed"), [(0, 2**30), (3, 0)])
@pytest.mark.parametrize("k", [3, 32])
def test_nan_and_infinity_among_the_rows(k, slices, allowed, metric, device):
    queries, table = _unit(5, 20), _unit(150, 20)
    table[5], table[7, 2], table[90, 3] = math.nan, math.inf, -math.inf
    queries[1, 4], queries[2, 2] = math.nan, math.inf
    _check_exactly(
        queries.to(device), table.to(device), k, metric,
        reference_agrees=False, slices=slices, allowed=allowed,
    )  # fmt: skip


@METRICS
@pytest.mark.parametrize(("B", "k"), [(2, 9), (11, 2)])
def test_the_exhaustive_pass_gives_the_same(k, B, metric, device):
    queries, table = _unit(B, 40), _unit(300, 40)
    table[200:260] = table[3]
    queries[1] = table[3]
    # Nothing may be measured after the first groups, so every query is left to the last pass.
    _check_exactly(queries.to(device), table.to(device), k, metric, slices=4, allowed=0, programs=3)


@METRICS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@BATCHES
def test_bounds_are_below_every_score_of_their_class(B, dtype, metric, device):
    """The proof's claim, on the hardware that multiplies: rounding, sums and classes."""
    N, D, splits = 704, 48, 3
    queries = (_unit(B, D) * torch.exp(torch.randn(B, 1))).to(device)
    table = (_unit(N, D) * torch.exp(torch.randn(N, 1))).to(device, dtype)
    config = knn_config(B, N, D, 1, 2)._replace(splits=splits)
    is_l2 = metric == "l2"
    found = launch_group_bounds(queries, table, row_squares(table), is_l2=is_l2, config=config)
    products = (queries.double() @ table.double().T).cpu()
    squares, lengths = table.double().square().sum(1).cpu(), queries.double().norm(dim=1).cpu()
    scores = squares - 2 * products if is_l2 else -products
    bounds, others = found.bounds.double().cpu(), found.others.double().cpu()
    unit = found.units.double().cpu()
    assert ((unit <= lengths.max()) & (lengths.max() <= 2 * unit)).all()
    error = 2**-11 + 2**-20 + 2**-22 * D
    shrunk, part = 1.0, 2**-25 * D**0.5 * lengths * unit
    if is_l2:
        shrunk = 1 - error - 2**-23 * D - 2**-20
        part = 2 * part + (error + 2**-20) * lengths**2
    bounds, others = shrunk * bounds - part[:, None], shrunk * others - part[:, None]

    # Sixteen rows of a tile make four groups, of which g has the rows 2 g and 2 g + 8 and the next.
    tiles, places = torch.arange(N) // config.block_n, torch.arange(N) % config.block_n
    groups = places // 16 * 4 + places % 8 // 2
    width = config.block_n // 4
    classes = tiles % splits * width + groups  # [N]
    is_first = found.groups.cpu()[:, classes] == tiles * width + groups  # [B, N]
    assert (scores >= bounds[:, classes]).all()
    assert (is_first | (scores >= others[:, classes])).all()
    # And not far below: by all the errors of both sides.
    most = 3 * (error + 2**-20) * (lengths[:, None] ** 2 + squares) + 2**-20
    for c in range(splits * width):
        inside = classes == c
        lowest = torch.where(inside & is_first, scores, math.inf)
        lowest, row = lowest.min(1)
        assert (lowest - bounds[:, c] <= most.gather(1, row[:, None])[:, 0]).all()
        rest = torch.where(inside & ~is_first, scores, math.inf).min(1)
        near = rest.values - others[:, c] <= most.gather(1, rest.indices[:, None])[:, 0]
        assert (near | (others[:, c] == math.inf)).all()


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
