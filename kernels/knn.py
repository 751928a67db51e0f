"""Exact nearest neighbours: bounds from tensor cores, then distances where bounds do not decide.

Three passes, none of which waits for the host, so that a CUDA graph can hold them:

1. :mod:`gcfast.kernels.search.group_bounds` reads the table once. For every query and class of rows
   it leaves the lowest bound of a group of rows, that group, and the lowest bound of all others.
2. :func:`_nearest_kernel`, a program a query. It measures the rows of the groups with the lowest
   bounds by the difference, in float64, until the lowest bound left is above the K-th distance
   found; then every row of each class whose other groups' bound is not above it.
3. :mod:`gcfast.kernels.search.measured_rows`, for tables above ``launch.KNN_SMALL_N`` rows: looks
   at every row for each query that the second pass left, having too much to measure. Where there is
   none, as a rule, it returns at once.

The guarantee: the result is the K lowest by (distance, id), the distance summed in float64 and
rounded to float32, whatever the data. Bounds decide how much is measured and never what is found: a
row that was not measured has a bound, proven in :mod:`gcfast.kernels.search.group_bounds`, above
the K-th distance. NaN and overflow make bounds NaN, which is taken for "below everything". All of
it rests on squared norms that are right, where the caller gives them.

How much is measured: rows whose bound is within the error of the K-th distance, about 4 epsilon,
.002, for unit vectors of 128 elements; and whole classes where two such groups share one, for which
the odds are one to the number of classes, some thousands. Where a whole table lies within the error
the third pass looks at all of it: right, and slow. For 256 queries among 10^6 rows of 128 elements
an H200 took 13 ms where they hardly differ and 35 ms where all are equal, .4 ms as a rule.

What must be moved and done, with s the bytes of an element:
    bytes: N D s from the table, and once more from the L2 cache for every further 256 queries; 4 N
        for the squares; 12 B for every class, written and read; K groups of rows a query.
    operations: 2 B N D in products of float16, and about three a score.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast import reference
from gcfast.kernels.launch import (
    KnnConfig,
    fitting_warps,
    knn_config,
    multiprocessors,
)
from gcfast.kernels.search.group_bounds import (
    LARGE_SQUARE,
    epsilon,
    eta,
    group_rows,
    launch_group_bounds,
    tile_start,
)
from gcfast.kernels.search.measured_rows import (
    INFINITY,
    NAN,
    TINY,
    _exhaustive_kernel,
    distances_of,
    empty_list,
    insert,
    measure,
    store_list,
)
from gcfast.kernels.search.row_squares import row_squares

MAX_K, MAX_D = 32, 2048  # beyond them the reference runs

LARGEST = tl.constexpr(3.4028234663852886e38)
SMALL_SQUARE = tl.constexpr(1e-36)
LARGE_DISTANCE = tl.constexpr(1.7e38)
MEASURED_ROWS, MEASURED_BLOCK_D = 64, 32  # of whole classes


@triton.jit
def _limit(worst, square, unit, D, IS_L2: tl.constexpr):
    """The bound above which no row can be among the K lowest, ``worst`` being the K-th key so far.

    Such a row's distance must be above the K-th even after rounding to float32 (a factor of 1 +
    2^-22). From there to a bound: module group_bounds. Infinite where nothing is known, as for a
    query of which float32 does not hold the square, or for few rows so far.
    """
    distance = distances_of(worst).to(tl.float64)
    limit = distance + tl.abs(distance) * 2.4e-7 + TINY
    limit += tl.sqrt(square * D) * unit * 6e-8
    is_known = (tl.abs(distance) < LARGE_DISTANCE) & (square < LARGE_SQUARE)
    if IS_L2:
        left_out = square * (1.0 - epsilon(D) - 1e-6)
        limit = (limit - left_out) / (1.0 - eta(D))
        # No row with an overflow is so near.
        is_known &= distance < (unit * 30000.0) * (unit * 30000.0)
    else:
        is_known &= square > SMALL_SQUARE
    limit += tl.abs(limit) * 2.4e-7  # for the comparison in float32
    return tl.where(is_known, limit, INFINITY).to(tl.float32)


@triton.jit(do_not_specialize=["N", "K", "splits", "allowed"])
def _nearest_kernel(
    distances_ptr,
    ids_ptr,
    bounds_ptr,
    groups_ptr,
    others_ptr,
    units_ptr,
    pending_ptr,
    queries_ptr,
    table_ptr,
    stride_queries_b,
    stride_queries_d,
    stride_table_n,
    stride_table_d,
    N,
    D,
    K,
    splits,
    allowed,
    IS_L2: tl.constexpr,
    LIST: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_D: tl.constexpr,
    TAKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The K lowest (distance, id) of a query, in order.

    First the groups of the lowest bounds, TAKEN at a time; then all rows, ROWS at a time, of each
    class whose other groups may hold one of the K. A query for which more than about ``allowed``
    rows are left to measure is left to the exhaustive pass, with what was found: pending[0] counts
    those, pending[1:] names them.

    bounds, groups, others: [B, splits * BLOCK_N / 4].  Grid: (B,).
    """
    i_b = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = BLOCK_N // 4
    count = splits * GROUPS
    offs_c = tl.arange(0, BLOCK_C)
    bounds = tl.load(bounds_ptr + i_b * count + offs_c, mask=offs_c < count, other=INFINITY)
    others = tl.load(others_ptr + i_b * count + offs_c, mask=offs_c < count, other=INFINITY)
    query_ptr = queries_ptr + i_b * stride_queries_b
    total = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, D, BLOCK_D):
        offs_d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        query = tl.load(query_ptr + offs_d * stride_queries_d, mask=offs_d < D, other=0.0)
        query = query.to(tl.float64)
        total += query * query
    square = tl.sum(total, axis=0)
    unit = tl.load(units_ptr + i_b).to(tl.float64)
    keys = empty_list(K, LIST)
    if square != square:
        # Every distance is NaN.
        first_ids = tl.arange(0, LIST)
        first_keys = (tl.full((LIST,), NAN, tl.int64) << 32) | first_ids
        keys = tl.where(first_ids < tl.minimum(K, N), first_keys, keys)
        store_list(distances_ptr, ids_ptr, keys, i_b, K, IS_L2, LIST)
        return

    slots = tl.arange(0, TAKEN)
    members = tl.arange(0, 4 * TAKEN)
    # Infinity stands for what is not there or has been measured. As a bound, which groups without
    # a number have, it is below an infinite limit.
    is_class = offs_c < count
    bounds = tl.where(bounds == bounds, tl.minimum(bounds, LARGEST), -INFINITY)
    bounds = tl.where(is_class, bounds, INFINITY)
    others = tl.where(others == others, tl.minimum(others, LARGEST), -INFINITY)
    others = tl.where(is_class, others, INFINITY)
    limit = tl.full((), INFINITY, tl.float32)
    left, seen = 0, 0
    lowest = tl.min(bounds, axis=0)
    while (lowest <= limit) & (lowest < INFINITY) & ((left <= allowed) | (seen < K)):
        chosen = tl.full((TAKEN,), -1, tl.int32)
        for i in range(TAKEN):
            bound, one = tl.min(bounds, axis=0, return_indices=True)
            is_near = (bound <= limit) & (bound < INFINITY)
            chosen = tl.where(slots == tl.where(is_near, i, TAKEN), one, chosen)
            bounds = tl.where(offs_c == tl.where(is_near, one, BLOCK_C), INFINITY, bounds)
        groups = tl.load(groups_ptr + i_b * count + chosen, mask=chosen >= 0, other=-1)
        groups = tl.broadcast_to(groups[:, None], (TAKEN, 4)).reshape(4 * TAKEN)
        place = group_rows(groups % GROUPS, members % 4)
        rows = tile_start(groups // GROUPS, N, BLOCK_N) + tl.minimum(place, N - 1)
        fresh = measure(
            rows,
            groups >= 0,
            query_ptr,
            table_ptr,
            stride_queries_d,
            stride_table_n,
            stride_table_d,
            D,
            IS_L2,
            4 * TAKEN,
            BLOCK_D,
        )
        keys = insert(keys, fresh)
        limit = _limit(tl.max(keys, axis=0), square, unit, D, IS_L2)
        lowest = tl.min(bounds, axis=0)
        seen += TAKEN
        left = 4 * tl.sum(((bounds <= limit) & (bounds < INFINITY)).to(tl.int32), axis=0)

    # Rows of a class, in all of the tiles that its program took.
    each = 4 * tl.cdiv(tl.cdiv(N, BLOCK_N), splits)
    is_open = (others <= limit) & (others < INFINITY)
    left += each * tl.sum(is_open.to(tl.int32), axis=0)
    one = tl.max(tl.where(is_open, offs_c, -1), axis=0)
    while (one >= 0) & (left <= allowed):
        tile = one // GROUPS
        end = 4 * tl.cdiv(tl.cdiv(N, BLOCK_N) - tile, splits)
        for start in range(0, end, ROWS):
            numbers = start + tl.arange(0, ROWS)
            place = group_rows(one % GROUPS, numbers % 4)
            first_rows = tile_start(tile + numbers // 4 * splits, N, BLOCK_N)
            fresh = measure(
                first_rows + tl.minimum(place, N - 1),
                numbers < end,
                query_ptr,
                table_ptr,
                stride_queries_d,
                stride_table_n,
                stride_table_d,
                D,
                IS_L2,
                ROWS,
                ROWS_D,
            )
            keys = insert(keys, fresh)
        others = tl.where(offs_c == one, INFINITY, others)
        limit = _limit(tl.max(keys, axis=0), square, unit, D, IS_L2)
        one = tl.max(tl.where((others <= limit) & (others < INFINITY), offs_c, -1), axis=0)
    store_list(distances_ptr, ids_ptr, keys, i_b, K, IS_L2, LIST)
    if left > allowed:
        number = tl.atomic_add(pending_ptr, 1)
        tl.store(pending_ptr + 1 + number, i_b.to(tl.int32))


def launch_knn(
    queries: Tensor,
    table: Tensor,
    k: int,
    *,
    metric: str = "l2",
    squares: Tensor | None = None,
    config: KnnConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows, as :func:`gcfast.ops.knn`, which checks the arguments.

    Nothing waits for the device and every size follows from the shapes, so the launches can be
    captured in a CUDA graph. A row whose distance is NaN comes after all others, equals by id: a
    NaN query gets NaN distances to the first rows of the table.

    Args:
        queries: [B, D] float32, float16 or bfloat16, any strides.
        table: [N, D] likewise.
        k: K; where it exceeds N the rest is (+inf, -1), for "ip" (-inf, -1).
        metric: "l2" or "ip".
        squares: [N], the rows' squared norms as sums in float32 or float64; computed by one more
            read of the table where they are needed and not given, or given in 16 bits.
        config: instead of the choice of ``launch.py``.
    """
    B, N = len(queries), len(table)
    D, device = queries.shape[1], queries.device
    if k > MAX_K or D > MAX_D:
        return reference.knn(queries, table, k, metric=metric, squares=squares)
    if k > max(N, 1):
        found = launch_knn(queries, table, max(N, 1), metric=metric, squares=squares, config=config)
        return reference.filled_neighbors(*found, k, metric)
    distances = torch.empty((B, k), dtype=torch.float32, device=device)
    ids = torch.empty((B, k), dtype=torch.int64, device=device)
    is_l2 = metric == "l2"
    if B == 0:
        return distances, ids
    if N == 0:
        return distances.fill_(math.inf if is_l2 else -math.inf), ids.fill_(-1)
    if config is None:
        config = knn_config(B, N, D, k, multiprocessors(device))
    # The first pass has 32-bit offsets inside a tile of rows (config.block_n of them).
    if max(config.block_n * table.stride(0), D * table.stride(1)) >= 2**30:
        table = table.contiguous()
    if D * queries.stride(1) >= 2**30:
        queries = queries.contiguous()
    if squares is None or squares.dtype.itemsize < 4:
        squares = row_squares(table)
    with torch.cuda.device_of(table):
        bounds = launch_group_bounds(queries, table, squares.float(), is_l2=is_l2, config=config)
        sizes = (*queries.stride(), *table.stride())
        shared = {
            "IS_L2": is_l2,
            "LIST": config.list,
            "ROWS": MEASURED_ROWS,
            "ROWS_D": MEASURED_BLOCK_D,
            "num_warps": fitting_warps(config.measured_warps),
        }
        _nearest_kernel[(B,)](
            distances, ids, *bounds, queries, table, *sizes, N, D, k, config.splits,
            config.allowed, TAKEN=config.taken, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            BLOCK_D=config.measured_block_d, **shared,
        )  # fmt: skip
        if config.slices:
            _exhaustive_kernel[(config.programs,)](
                distances, ids, bounds.pending, queries, table, *sizes, B, N, D, k,
                SLICES=config.slices, QUERIES=8 if is_l2 else 4, BLOCK_D=16, **shared,
            )  # fmt: skip
    return distances, ids
