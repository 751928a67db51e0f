"""Lower bounds of the scores of groups of rows: the first pass of `knn`, one read of the table.

A score orders the rows as the distance to a query does: |t|^2 - 2 <q, t>, or -<q, t> for inner
products. What is kept is a bound that the true score is never below, once
:mod:`gcfast.kernels.knn` has taken off what depends on the query alone.

The table is cut into tiles of BLOCK_N rows and a tile into groups of four. Program s of S takes the
tiles s, s + S, s + 2 S, ... and sorts their groups into BLOCK_N / 4 classes by their place in the
tile, so that rows which lie side by side, and are often alike, go to different classes. Of every
class it keeps the lowest bound, the group that has it, and the lowest bound of all other groups.

Products are those of float16 on tensor cores. A query is scaled by a power of two so that its norm
lies in [1, 2), the rows by one that does so for the longest query of the block, 1 / unit. Rounding
then changes an element by at most 2^-12 of itself, or by 2^-25 where float16 is subnormal. So, by
Cauchy and Schwarz, a product changes by at most

    (2^-11 + 2^-24 + sqrt(D) 2^-25) |q| |t| + sqrt(D) 2^-25 |q| unit.

Products of float16 are exact in float32; adding D of them loses at most one unit in the last place
of the sum of all magnitudes each (tensor cores truncate and do not round: Fasi, Higham, Mikaitis
and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021), D 2^-23 (1 + 2^-10) |q| |t|. Together
less than

    epsilon |q| |t| + sqrt(D) 2^-25 |q| unit,  epsilon = 2^-11 + 2^-20 + 2^-22 D.

For L2, |q| |t| <= (|q|^2 + |t|^2) / 2 makes of the first a part of the query's and one of the
row's. The second joins the error of |t|^2 as a sum in float32: with
eta = epsilon + 2^-23 D + 2^-20,

    |t|^2 - 2 <q, t> >= (1 - eta) (s - 2 / (1 - eta) p) - (epsilon + 2^-20) |q|^2
                        - sqrt(D) 2^-24 |q| unit

for s the square and p the product as computed. The bracket is the bound that is kept. For inner
products it is -p - 1.01 epsilon |q| sqrt(s).

A row whose elements overflow float16, at 2^15 units or more, may get a bound that is infinite. It
is farther than 2^14.9 units from the query, which the passes that follow take for granted.

Three products of bfloat16 halves are off by a third of this and took .39 and 1.43 ms where one of
float16 took .24 and .94 (256 and 1,024 queries, N = 10^6, D = 128, an H200).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import KnnConfig, fitting_stages, fitting_warps

PRODUCT_ERROR = tl.constexpr(2.0**-11 + 2.0**-20)
SUM_ERROR = tl.constexpr(2.0**-22)  # times D
SQUARE_ERROR = tl.constexpr(2.0**-23)  # times D
LARGE_SQUARE = tl.constexpr(1e36)  # of a query; float32 holds it and what is made of it
ROUNDING = tl.constexpr(2.0**-20)
GROUP = 4  # rows
SCALED_BLOCK_D = 128


@triton.jit
def epsilon(D):
    """The error of a product, in |q| |t|."""
    return PRODUCT_ERROR + SUM_ERROR * D


@triton.jit
def eta(D):
    """What errors take off |t|^2."""
    return epsilon(D) + SQUARE_ERROR * D + ROUNDING


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scales(squares):
    """(2^-e, 2^e) of squared norms: 2^-e times the norm lies in [1, 2), or below if under 2^-63."""
    exponents = ((squares.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    down = ((127 - exponents) << 23).to(tl.float32, bitcast=True)
    return down, ((127 + exponents) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load(places, offs_d, D, FULL: tl.constexpr):
    """[X, BLOCK_D] from places, 0 from the D-th element on; FULL where all are below it."""
    if FULL:
        return tl.load(places)
    return tl.load(places, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _rounded(rows, scale):
    """Rows [BLOCK_N, BLOCK_D] scaled and rounded to float16; those of float16 as they are."""
    if rows.dtype == tl.float16:
        return rows
    return (rows.to(tl.float32) * scale).to(tl.float16)


@triton.jit
def _lowest_of_four(scores, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_B, BLOCK_N] to [BLOCK_B, BLOCK_N / 4]: group g has the rows of ``group_rows``.

    These four lie in one thread where tensor cores leave a product, so nothing is exchanged.
    """
    a, b = tl.split(scores.reshape(BLOCK_B, BLOCK_N // 2, 2))
    pairs = _lower(a, b).reshape(BLOCK_B, BLOCK_N // 16, 2, 4)
    a, b = tl.split(pairs.permute(0, 1, 3, 2))
    return _lower(a, b).reshape(BLOCK_B, BLOCK_N // 4)


@triton.jit
def group_rows(group, member):
    """The place in its tile of a group's row, ``member`` of 0 to 3."""
    return 16 * (group // 4) + 2 * (group % 4) + 8 * (member // 2) + member % 2


@triton.jit
def tile_start(tile, N, BLOCK_N: tl.constexpr):
    """The first row of a tile. The last tile ends with the table and reaches into the one before.

    So no tile has places without a row, except where N < BLOCK_N: its last row is repeated there.
    """
    return tl.maximum(tl.minimum(tile * BLOCK_N, N - BLOCK_N), 0)


@triton.jit
def _scaled_queries_kernel(
    scaled_ptr,
    squares_ptr,
    queries_ptr,
    stride_queries_b,
    stride_queries_d,
    D,
    BLOCK_D: tl.constexpr,
):
    """scaled[b] = q scaled and rounded to float16; squares[b] = |q|^2 in float32.  Grid: (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    query_ptr = queries_ptr + i_b * stride_queries_b
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, D, BLOCK_D):
        offs = (first + offs_d).to(tl.int64)
        part = tl.load(query_ptr + offs * stride_queries_d, mask=offs < D, other=0.0)
        total += part.to(tl.float32) * part.to(tl.float32)
    square = tl.sum(total, axis=0)
    tl.store(squares_ptr + i_b, square)
    scale, _ = _scales(square)
    for first in range(0, D, BLOCK_D):
        offs = (first + offs_d).to(tl.int64)
        part = tl.load(query_ptr + offs * stride_queries_d, mask=offs < D, other=0.0)
        tl.store(scaled_ptr + i_b * D + offs, part.to(tl.float32) * scale, mask=offs < D)


@triton.jit(do_not_specialize=["B", "N"])  # B: or every other batch is compiled for again
def _candidates_kernel(
    bounds_ptr,
    groups_ptr,
    others_ptr,
    units_ptr,
    pending_ptr,
    queries_ptr,
    query_squares_ptr,
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
    IS_L2: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of each query and class of groups: the lowest bound, whose it is, the lowest of the others.

    Queries come scaled with their squares (SCALED), or as they are. WHOLE holds a query's D
    elements at once; FULL has no rest after the last BLOCK_D. A bound that is NaN says nothing of
    its class: the row, the query or the score has no finite value.

    bounds, groups, others: [B, S, BLOCK_N / 4]. A group's number is tile * BLOCK_N / 4 + place.
    units: [B], what the rows were measured in.
    pending: [1 + 2 B], whose count and locks are cleared for the passes that follow.
    Grid: (ceil(B / BLOCK_B), S), S at most the number of tiles.
    """
    i_b, i_s = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    offs_d = tl.arange(0, BLOCK_D)
    # 64 bits to a tile's first row, 32 from there on: the launcher sees that they suffice.
    offs_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1)
    rows = (offs_n * stride_table_n)[:, None]  # [BLOCK_N, 1]
    whole_rows = rows + offs_d[None, :] * stride_table_d
    offs_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    offs_q = tl.minimum(offs_b, B - 1)
    queries = queries_ptr + (offs_q.to(tl.int64) * stride_queries_b)[:, None]  # [BLOCK_B, 1]
    if SCALED:
        query_squares = tl.load(query_squares_ptr + offs_q)
    else:
        query_squares = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, D, BLOCK_D):
            offs = first + offs_d
            part = _load(queries + offs[None, :] * stride_queries_d, offs, D, FULL)
            part = part.to(tl.float32)
            query_squares += tl.sum(part * part, axis=1)
    query_scales, factors = _scales(query_squares)  # [BLOCK_B]
    longest = tl.max(tl.where(query_squares < LARGE_SQUARE, query_squares, 0.0), axis=0)
    scale, unit = _scales(tl.where(longest == 0, 1.0, longest))
    if i_s == 0:
        tl.store(units_ptr + offs_b, unit, mask=mask_b)
        tl.store(pending_ptr + 1 + B + offs_b, 0, mask=mask_b)
        if i_b == 0:
            tl.store(pending_ptr, 0)
    if table_ptr.dtype.element_ty != tl.float16:
        factors *= unit
    if WHOLE:
        query = _load(queries + offs_d[None, :] * stride_queries_d, offs_d, D, FULL)
        if not SCALED:
            query = (query.to(tl.float32) * query_scales[:, None]).to(tl.float16)
    if IS_L2:
        factors *= 2.0 / (1.0 - eta(D))
    else:
        margins = 1.01 * epsilon(D) * tl.sqrt(query_squares)  # [BLOCK_B]

    GROUPS: tl.constexpr = BLOCK_N // 4
    bounds = tl.full((BLOCK_B, GROUPS), float("inf"), tl.float32)
    others = tl.full((BLOCK_B, GROUPS), float("inf"), tl.float32)
    tile_of = tl.full((BLOCK_B, GROUPS), -1, tl.int32)
    for tile in range(i_s, tl.cdiv(N, BLOCK_N), splits):
        start = tl.cast(tile_start(tile, N, BLOCK_N), tl.int64)
        tile_ptr = table_ptr + start * stride_table_n
        products = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        squares = tl.load(squares_ptr + start * stride_squares_n + offs_n * stride_squares_n)
        if WHOLE:
            elements = _load(tile_ptr + whole_rows, offs_d, D, FULL)
            products = tl.dot(query, tl.trans(_rounded(elements, scale)), products)
        else:
            for first in range(0, D, BLOCK_D):
                offs = first + offs_d
                part = _load(queries + offs[None, :] * stride_queries_d, offs, D, FULL)
                if not SCALED:
                    part = (part.to(tl.float32) * query_scales[:, None]).to(tl.float16)
                elements = _load(tile_ptr + (rows + offs[None, :] * stride_table_d), offs, D, FULL)
                products = tl.dot(part, tl.trans(_rounded(elements, scale)), products)
        if IS_L2:
            scores = squares[None, :] - products * factors[:, None]
        else:
            scores = -products * factors[:, None] - margins[:, None] * tl.sqrt(squares)[None, :]
            scores = tl.where(scores < float("inf"), scores, float("nan"))  # an overflow
        lowest = _lowest_of_four(scores, BLOCK_B, BLOCK_N)
        taken = lowest < bounds
        others = _lower(others, _higher(bounds, lowest))
        tile_of = tl.where(taken, tile, tile_of)
        bounds = _lower(bounds, lowest)

    offs_g = tl.arange(0, GROUPS)[None, :]
    out = (offs_b.to(tl.int64) * splits + i_s)[:, None] * GROUPS + offs_g
    tl.store(bounds_ptr + out, bounds, mask=mask_b[:, None])
    tl.store(others_ptr + out, others, mask=mask_b[:, None])
    groups = tl.where(tile_of < 0, -1, tile_of * GROUPS + offs_g)
    tl.store(groups_ptr + out, groups, mask=mask_b[:, None])


class Bounds(NamedTuple):
    """What the first pass leaves."""

    bounds: Tensor  # [B, splits * classes] float32, lowest of each class
    groups: Tensor  # [B, splits * classes] int32, whose that is; -1 where none is known
    others: Tensor  # [B, splits * classes] float32, lowest of the class's other groups
    units: Tensor  # [B] float32, what the rows were scaled by
    pending: Tensor  # [1 + 2 B] int32: a count of 0, room for as many queries, locks that are open


def launch_group_bounds(
    queries: Tensor, table: Tensor, squares: Tensor, *, is_l2: bool, config: KnnConfig
) -> Bounds:
    """Run the first pass on queries [B, D] and a table [N, D] of N >= 1 rows.

    Args:
        queries: of any floating dtype and strides.
        table: float32, float16 or bfloat16, of strides that keep a tile within 2^30 elements.
        squares: [N] float32, the rows' squared norms.
        is_l2: or inner products.
        config: of the launch.
    """
    (B, D), N, device = queries.shape, len(table), queries.device
    shape = (B, config.splits * config.block_n // GROUP)
    found = Bounds(
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(B, dtype=torch.float32, device=device),
        torch.empty(1 + 2 * B, dtype=torch.int32, device=device),
    )
    query_squares = found.bounds  # not read
    if config.is_scaled:
        query_squares = torch.empty(B, dtype=torch.float32, device=device)
        scaled = torch.empty((B, D), dtype=torch.float16, device=device)
        _scaled_queries_kernel[(B,)](
            scaled, query_squares, queries, *queries.stride(), D,
            BLOCK_D=SCALED_BLOCK_D, num_warps=1,
        )  # fmt: skip
        queries = scaled
    _candidates_kernel[(-(-B // config.block_b), config.splits)](
        *found, queries, query_squares, table, squares,
        *queries.stride(), *table.stride(), squares.stride(0), B, N, D,
        IS_L2=is_l2, SCALED=config.is_scaled, WHOLE=config.block_d >= D,
        FULL=D % config.block_d == 0, BLOCK_B=config.block_b, BLOCK_N=config.block_n,
        BLOCK_D=config.block_d, num_warps=fitting_warps(config.num_warps),
        num_stages=fitting_stages(config.num_stages),
    )  # fmt: skip
    return found
