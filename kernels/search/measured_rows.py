"""Distances as they are returned, lists of the nearest rows, and a pass that looks at every row.

For `knn`: what is kept of a row is one integer that orders rows by (distance, id).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Distances are held as float32 in the upper half of an int64 and the row's id in the lower:
# integers in the order of (distance, id).
NAN = tl.constexpr(0x7FC00000)  # a quiet NaN, ordered after infinity
EMPTY = tl.constexpr(0x7FFFFFFF)  # of a slot without a row, after every distance
NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LAST_ID = tl.constexpr(0x7FFFFFFF)
ID_MASK = tl.constexpr(0xFFFFFFFF)
INFINITY = tl.constexpr(float("inf"))
TINY = tl.constexpr(1e-33)  # what products and sums may lose below float32's range


@triton.jit
def pack(distances, ids):
    """Integers in the order of (distance, id); -0.0 is 0.0 and every NaN comes after infinity."""
    bits = tl.where(distances == 0, 0.0, distances).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(distances == distances, ordered, NAN)
    return (ordered.to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
def distances_of(keys):
    """The distances that :func:`pack` was given; NaN of empty slots."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def empty_list(K, LIST: tl.constexpr):
    """K slots without a row, above all rows and all different; the rest below everything."""
    slots = tl.arange(0, LIST).to(tl.int64)
    return tl.where(slots < K, (tl.full((LIST,), EMPTY, tl.int64) << 32) | slots, slots - NOTHING)


@triton.jit
def insert(keys, fresh):
    """The lowest of both, each once."""
    worst = tl.max(keys, axis=0)
    lowest = tl.min(fresh, axis=0)
    while lowest < worst:
        is_new = tl.sum((keys == lowest).to(tl.int32), axis=0) == 0
        keys = tl.where(keys == tl.where(is_new, worst, NOTHING), lowest, keys)
        worst = tl.max(keys, axis=0)
        fresh = tl.where(fresh == lowest, NOTHING, fresh)
        lowest = tl.min(fresh, axis=0)
    return keys


@triton.jit
def measure(
    rows,
    mask,
    query_ptr,
    table_ptr,
    stride_queries_d,
    stride_table_n,
    stride_table_d,
    D,
    IS_L2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys [ROWS] of sum_d (t_d - q_d)^2 or -sum_d t_d q_d, summed in float64; NOTHING if masked.

    Rounded to float32, and an inner product of 0 is 0.0 either way.
    """
    total = tl.zeros((ROWS, BLOCK_D), tl.float64)
    places = table_ptr + rows.to(tl.int64) * stride_table_n  # [ROWS]
    for first in range(0, D, BLOCK_D):
        offs_d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        query = tl.load(query_ptr + offs_d * stride_queries_d, mask=mask_d, other=0.0)
        query = query.to(tl.float64)[None, :]
        tile = tl.load(
            places[:, None] + offs_d[None, :] * stride_table_d,
            mask=mask[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float64)  # [ROWS, BLOCK_D]
        if IS_L2:
            left = tile - query
            total += left * left
        else:
            total -= tile * query
    return tl.where(mask, pack(tl.sum(total, axis=1).to(tl.float32), rows), NOTHING)


@triton.jit
def store_list(distances_ptr, ids_ptr, keys, i_b, K, IS_L2: tl.constexpr, LIST: tl.constexpr):
    """The list in order, as distances and ids: where empty +inf (inner products: -inf) and -1."""
    place = tl.sum((keys[None, :] < keys[:, None]).to(tl.int32), axis=1) - (LIST - K)
    is_row = (keys >> 32) != EMPTY
    distances = tl.where(is_row, distances_of(keys), INFINITY)
    if not IS_L2:
        distances = 0.0 - distances  # and not -0.0
    mask = (place >= 0) & (place < K)
    tl.store(distances_ptr + i_b * K + place, distances, mask=mask)
    tl.store(ids_ptr + i_b * K + place, tl.where(is_row, keys & ID_MASK, -1), mask=mask)


@triton.jit
def _kept(distances_ptr, ids_ptr, i_b, K, IS_L2: tl.constexpr, LIST: tl.constexpr):
    """The list of a stored result."""
    slots = tl.arange(0, LIST)
    ids = tl.load(ids_ptr + i_b * K + slots, mask=slots < K, other=-1)
    distances = tl.load(distances_ptr + i_b * K + slots, mask=slots < K, other=0.0)
    if not IS_L2:
        distances = -distances
    return tl.where(ids < 0, empty_list(K, LIST), pack(distances, ids))


@triton.jit(do_not_specialize=["B", "N", "K"])
def _exhaustive_kernel(
    distances_ptr,
    ids_ptr,
    pending_ptr,
    queries_ptr,
    table_ptr,
    stride_queries_b,
    stride_queries_d,
    stride_table_n,
    stride_table_d,
    B,
    N,
    D,
    K,
    IS_L2: tl.constexpr,
    LIST: tl.constexpr,
    SLICES: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Look at every row for the queries that pending names, and join what is found to the results.

    Distances are summed in float32 first; a tile that has one which may be among the K lowest is
    measured. The error of such a sum is below (D + 3) 2^-24 of the sum of its terms' magnitudes.
    A program takes some of the (QUERIES queries, slice of the table). A query's list is changed
    under its lock, and is that of the K lowest whatever the order.

    Grid: any.
    """
    count = tl.load(pending_ptr)
    each = tl.cdiv(N, SLICES)
    slots = tl.arange(0, QUERIES)
    offs_d = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), tl.cdiv(count, QUERIES) * SLICES, tl.num_programs(0)):
        numbers = tl.minimum(item // SLICES * QUERIES + slots, count - 1)
        i_b = tl.load(pending_ptr + 1 + numbers).to(tl.int64)  # [QUERIES]
        queries = (queries_ptr + i_b * stride_queries_b)[:, None]
        # As another program may be writing, the K-th key at most: no id is so large.
        worst = tl.load(distances_ptr + i_b * K + K - 1)
        if not IS_L2:
            worst = -worst
        is_full = tl.load(ids_ptr + i_b * K + K - 1) >= 0
        last_ids = tl.full((QUERIES,), LAST_ID, tl.int32)
        worst = tl.where(is_full, pack(worst, last_ids), NOTHING)
        begin = item % SLICES * each
        end = tl.minimum(begin + each, N)
        for start in range(begin, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            tile = (table_ptr + rows.to(tl.int64) * stride_table_n)[:, None]  # [ROWS, 1]
            total = tl.zeros((QUERIES, ROWS, BLOCK_D), tl.float32)
            magnitude = tl.zeros((QUERIES, ROWS, BLOCK_D), tl.float32)
            for first in range(0, D, BLOCK_D):
                offs = (first + offs_d).to(tl.int64)[None, :]
                query = tl.load(queries + offs * stride_queries_d, mask=offs < D, other=0.0)
                element = tl.load(
                    tile + offs * stride_table_d, mask=(rows < end)[:, None] & (offs < D), other=0.0
                )
                query = query.to(tl.float32)[:, None, :]
                term = element.to(tl.float32)[None, :, :]  # [1, ROWS, BLOCK_D]
                if IS_L2:
                    term -= query
                    total += term * term
                else:
                    term *= query
                    total -= term
                    magnitude += tl.abs(term)
            total = tl.sum(total, axis=2)
            magnitude = total if IS_L2 else tl.sum(magnitude, axis=2)
            distance = distances_of(worst)
            limit = distance + tl.abs(distance) * 2.4e-7 + TINY
            lowest = total - (D + 3) * 6e-8 * magnitude
            # NaN among them is "may be", as an empty slot's distance is.
            may_be = tl.where((rows < end)[None, :] & (lowest > limit[:, None]), 0, 1)
            open_queries = tl.max(may_be, axis=1)  # [QUERIES]
            while tl.max(open_queries, axis=0) > 0:
                slot = tl.max(tl.where(open_queries > 0, slots, -1), axis=0)
                one = tl.max(tl.where(slots == slot, i_b, -1), axis=0)
                fresh = measure(
                    rows,
                    rows < end,
                    queries_ptr + one * stride_queries_b,
                    table_ptr,
                    stride_queries_d,
                    stride_table_n,
                    stride_table_d,
                    D,
                    IS_L2,
                    ROWS,
                    ROWS_D,
                )
                if tl.min(fresh, axis=0) < tl.max(tl.where(slots == slot, worst, -NOTHING), axis=0):
                    lock = pending_ptr + 1 + B + one
                    while tl.atomic_cas(lock, 0, 1) == 1:
                        pass
                    keys = insert(_kept(distances_ptr, ids_ptr, one, K, IS_L2, LIST), fresh)
                    store_list(distances_ptr, ids_ptr, keys, one, K, IS_L2, LIST)
                    tl.debug_barrier()  # every thread has stored
                    tl.atomic_xchg(lock, 0)
                    worst = tl.where(slots == slot, tl.max(keys, axis=0), worst)
                open_queries = tl.where(slots == slot, 0, open_queries)
