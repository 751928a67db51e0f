"""Exact nearest neighbours: candidates from one pass over the table, then their distances again.

Pass 1 (:func:`_candidates_kernel`) gives every (block of queries, stretch of the table) to a
program, which holds the best ``KEEP`` rows of each query in registers. Pass 2
(:func:`_nearest_kernel`) gives every query to a program, which merges the stretches, measures the
best ``KEEP`` again by the difference and orders them by (distance, id).

What must be moved and done, with s the bytes of an element:
    bytes: ceil(B / BLOCK_B) N D s from the table, of which all but N D s can come from the L2 cache
        since programs of one stretch run side by side; 4 N for the squares; 16 B S KEEP for the
        candidates of S stretches, written and read; B KEEP D s for the second look.
    operations: 2 B N D for the products (3 B N D where differences are squared, B <= 2), a minimum
        over the B N scores, and about KEEP (1 + ln(N / (S KEEP))) insertions a query and stretch.

``tl.dot`` wants 16 queries: for one or two it would do eight times the work that is asked for. Each
of those has its own programs instead, which read rows into registers and square the difference
there: one read of the table (the second query's from the L2 cache) and no norms.
"""

from __future__ import annotations

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
from gcfast.kernels.row_squares import row_squares

MAX_K, MAX_D = 32, 2048  # beyond them the reference runs

# Scores are held as float32 in the upper half of an int64 and the row's id in the lower: integers
# in the order of (score, id). No score that is held reaches infinity, so the upper half of an empty
# slot, infinity's, is above them all.
EMPTY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)  # a quiet NaN, ordered after infinity
LARGEST = tl.constexpr(3.4028234663852886e38)
LAST_ID = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)
FARTHEST = tl.constexpr(0x7FFFFFFF << 32)
ID_MASK = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _pack(scores, ids):
    """Integers in the order of (score, id); -0.0 is 0.0 and every NaN comes after infinity."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(scores == scores, ordered, NAN)
    return (ordered.to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
def _scores(keys):
    """The scores that :func:`_pack` was given."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _empty_slots(KEEP: tl.constexpr):
    """Keys that stand for no row: above those of rows, and all different.

    So exactly one slot of a query is ever its worst.
    """
    slots = tl.arange(0, KEEP) ^ LAST_ID
    return (tl.full((KEEP,), EMPTY, tl.int64) << 32) | slots.to(tl.int64)


@triton.jit(do_not_specialize=["B", "is_l2"])  # B: or every other batch is compiled for anew
def _candidates_kernel(
    keys_ptr,
    queries_ptr,
    table_ptr,
    squares_ptr,
    stride_queries_b,
    stride_queries_d,
    stride_table_n,
    stride_table_d,
    stride_squares_n,
    B,
    N,
    D,
    rows_per_split,
    is_l2,
    IS_DOT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """keys[b, s] = the KEEP lowest (score, id) of query b among the rows of stretch s.

    The score is |t|^2 - 2 <q, t> (IS_DOT) or |t - q|^2 where is_l2, else -<q, t>. NaN and what
    overflows is scored as the largest finite number, so that every row can be a candidate.

    A tile's scores join the KEEP best by taking out its minimum for as long as some query's is
    below the worst that it holds: rare once a few tiles have been seen, and no sort.

    Grid: (ceil(B / BLOCK_B), splits).
    """
    i_b, i_s = tl.program_id(0), tl.program_id(1)
    offs_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    # 64 bits to the block's first row, 32 from there on: the launcher sees that they suffice.
    queries_ptr += tl.cast(i_b, tl.int64) * BLOCK_B * stride_queries_b
    queries = queries_ptr + tl.arange(0, BLOCK_B) * stride_queries_b  # [BLOCK_B]

    keys = tl.zeros((BLOCK_B, KEEP), tl.int64) + _empty_slots(KEEP)[None, :]
    worst_key = tl.max(keys, axis=1)  # [BLOCK_B]
    worst = _scores(worst_key)

    begin = i_s * rows_per_split
    end = tl.minimum(begin + rows_per_split, N)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        tile_ptr = table_ptr + tl.cast(start, tl.int64) * stride_table_n
        rows = tl.arange(0, BLOCK_N) * stride_table_n  # [BLOCK_N]
        if IS_DOT:
            score = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
            for first in range(0, D, BLOCK_D):
                offs_d = first + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                query = tl.load(
                    queries[:, None] + offs_d[None, :] * stride_queries_d,
                    mask=mask_b[:, None] & mask_d[None, :],
                    other=0.0,
                )  # [BLOCK_B, BLOCK_D]
                tile = tl.load(
                    tile_ptr + (rows[None, :] + offs_d[:, None] * stride_table_d),
                    mask=mask_n[None, :] & mask_d[:, None],
                    other=0.0,
                )  # [BLOCK_D, BLOCK_N]
                # Widened where the queries are, so that every product is exact before it is added.
                score = tl.dot(query, tile.to(query.dtype), score, input_precision="ieee")
            square = tl.load(
                squares_ptr + offs_n.to(tl.int64) * stride_squares_n,
                mask=mask_n & (is_l2 != 0),
                other=0.0,
            )
            score = square[None, :] - tl.where(is_l2 != 0, 2.0, 1.0) * score
        else:
            terms = tl.zeros((BLOCK_B, BLOCK_N, BLOCK_D), tl.float32)
            for first in range(0, D, BLOCK_D):
                offs_d = first + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                query = tl.load(
                    queries[:, None] + offs_d[None, :] * stride_queries_d,
                    mask=mask_b[:, None] & mask_d[None, :],
                    other=0.0,
                )
                tile = tl.load(
                    tile_ptr + (rows[:, None] + offs_d[None, :] * stride_table_d),
                    mask=mask_n[:, None] & mask_d[None, :],
                    other=0.0,
                ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
                left = tile[None, :, :] - tl.where(is_l2 != 0, query, 0.0)[:, None, :]
                terms += left * tl.where(is_l2 != 0, left, -query[:, None, :])
            score = tl.sum(terms, axis=2)  # [BLOCK_B, BLOCK_N]
        score = tl.where(score < LARGEST, score, LARGEST)
        score = tl.where(mask_b[:, None] & mask_n[None, :], score, float("inf"))

        lowest = tl.min(score, axis=1)  # [BLOCK_B]
        while tl.max((lowest < worst).to(tl.int32), axis=0) > 0:
            is_lowest = score == lowest[:, None]
            row = tl.min(tl.where(is_lowest, offs_n[None, :], LAST_ID), axis=1)  # ties: lower id
            taken = (lowest < worst)[:, None] & (keys == worst_key[:, None])
            keys = tl.where(taken, _pack(lowest, row)[:, None], keys)
            worst_key = tl.max(keys, axis=1)
            worst = _scores(worst_key)
            # Also where it was not taken: nothing of this tile is lower, and the worst only falls.
            score = tl.where(offs_n[None, :] == row[:, None], float("inf"), score)
            lowest = tl.min(score, axis=1)

    splits = tl.num_programs(1)
    out = keys_ptr + (offs_b.to(tl.int64) * splits + i_s) * KEEP  # [BLOCK_B]
    tl.store(out[:, None] + tl.arange(0, KEEP)[None, :], keys, mask=mask_b[:, None])


@triton.jit(do_not_specialize=["is_l2"])
def _nearest_kernel(
    distances_ptr,
    ids_ptr,
    keys_ptr,
    queries_ptr,
    table_ptr,
    stride_queries_b,
    stride_queries_d,
    stride_table_n,
    stride_table_d,
    D,
    K,
    candidates,
    is_l2,
    KEEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The K lowest (distance, id) among the KEEP best of a query's candidates, in order.

    distance = sum_d (t_d - q_d)^2 or -sum_d t_d q_d, summed in float64 and rounded to float32.
    Grid: (B,).
    """
    i_b = tl.program_id(0).to(tl.int64)
    keys = _empty_slots(KEEP)
    worst = tl.max(keys, axis=0)
    for start in range(0, candidates, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        tile = tl.load(
            keys_ptr + i_b * candidates + offs_c, mask=offs_c < candidates, other=NOTHING
        )
        lowest = tl.min(tile, axis=0)
        while lowest < worst:
            keys = tl.where(keys == worst, lowest, keys)
            worst = tl.max(keys, axis=0)
            tile = tl.where(tile == lowest, NOTHING, tile)
            lowest = tl.min(tile, axis=0)
    found = (keys >> 32) < EMPTY  # [KEEP]
    ids = tl.where(found, keys & ID_MASK, 0)

    total = tl.zeros((KEEP, BLOCK_D), tl.float64)
    rows = table_ptr + ids * stride_table_n  # [KEEP]
    query_ptr = queries_ptr + i_b * stride_queries_b
    for first in range(0, D, BLOCK_D):
        offs_d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        query = tl.load(query_ptr + offs_d * stride_queries_d, mask=mask_d, other=0.0)
        tile = tl.load(
            rows[:, None] + offs_d[None, :] * stride_table_d,
            mask=found[:, None] & mask_d[None, :],
            other=0.0,
        )  # [KEEP, BLOCK_D]
        query = query.to(tl.float64)[None, :]
        left = tile.to(tl.float64) - tl.where(is_l2 != 0, query, 0.0)
        total += left * tl.where(is_l2 != 0, left, -query)
    distances = tl.sum(total, axis=1).to(tl.float32)

    # The place of each is the number of those before it: all differ, if by their ids alone.
    keys = tl.where(found, _pack(distances, ids), keys | FARTHEST)
    place = tl.sum((keys[None, :] < keys[:, None]).to(tl.int32), axis=1)
    distances = tl.where(found, distances, float("inf"))
    distances = tl.where(is_l2 != 0, distances, 0.0 - distances)  # and not -0.0
    tl.store(distances_ptr + i_b * K + place, distances, mask=place < K)
    tl.store(ids_ptr + i_b * K + place, tl.where(found, ids, -1), mask=place < K)


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
    NaN query gets NaN distances to some rows of the table, each once.

    Args:
        queries: [B, D] float32, float16 or bfloat16, any strides.
        table: [N, D] likewise.
        k: K; where it exceeds N the rest is (+inf, -1), for "ip" (-inf, -1).
        metric: "l2" or "ip".
        squares: [N], the rows' squared norms; computed by one more read of the table where they are
            needed and not given.
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
    if B == 0:
        return distances, ids
    if config is None:
        config = knn_config(B, N, k, queries.dtype, table.dtype, multiprocessors(device))
    # Triton's interpreter, which is what runs on the CPU, multiplies bfloat16's bits as integers.
    if config.widened or (queries.dtype == torch.bfloat16 and not queries.is_cuda):
        queries = queries.float()
    # The first pass has 32-bit offsets inside a tile of rows (config.block_n of them).
    if max(config.block_n * table.stride(0), D * table.stride(1)) >= 2**30:
        table = table.contiguous()
    if max(config.block_b * queries.stride(0), D * queries.stride(1)) >= 2**30:
        queries = queries.contiguous()
    is_l2 = metric == "l2"
    if not is_l2 or not config.is_dot:
        squares = queries  # not read
    elif squares is None:
        squares = row_squares(table)
    elif squares.dtype != torch.float32:
        squares = squares.float()
    keys = torch.empty((B, config.splits, config.keep), dtype=torch.int64, device=device)
    sizes = (*queries.stride(), *table.stride())
    with torch.cuda.device_of(table):
        _candidates_kernel[(triton.cdiv(B, config.block_b), config.splits)](
            keys,
            queries,
            table,
            squares,
            *sizes,
            squares.stride(0),
            B,
            N,
            D,
            config.rows_per_split,
            int(is_l2),
            IS_DOT=config.is_dot,
            KEEP=config.keep,
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            num_warps=fitting_warps(config.num_warps),
            num_stages=config.num_stages,
        )
        _nearest_kernel[(B,)](
            distances,
            ids,
            keys,
            queries,
            table,
            *sizes,
            D,
            k,
            config.splits * config.keep,
            int(is_l2),
            KEEP=config.keep,
            BLOCK_C=config.block_c,
            BLOCK_D=config.merge_block_d,
            num_warps=config.merge_warps,
        )
    return distances, ids
