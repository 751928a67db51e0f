"""Blocks and warps of every kernel, as functions of shape and dtype.

For each operation there is a NamedTuple of its launch choices, a function ``<operation>_config``
that makes one, and ``<OPERATION>_CONFIGS``, every value that the function can return, where they
are few. tests/kernels/launches.py makes launches that ask for every choice, and their kernels are
compiled offline.

Those of the search were measured as its functions say. Those of ``sparse_cam`` (maps of up to 64
pixels), ``grad_weights``, ``head_grad_weights`` and ``top_m`` were the fastest on an H200 with
Triton 3.6 (bench/results/nvidia-h200-2026-11-27-kernels.json) of those that compile without
spilling, or nearly, on every target by Triton 3.7.1. The others were reasoned from the sizes of a
card (registers, shared memory, multiprocessors). bench/sweep_launch.py prints what a card prefers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton

SPARSE_CAM_MAX_PIXELS = 256  # of a map that is held in registers


class SparseCamConfig(NamedTuple):
    """Launch choices of ``sparse_cam``."""

    block_p: int  # pixels of the map that a program makes at once
    block_m: int  # kept channels read at once
    num_warps: int
    block_oh: int
    block_ow: int


SPARSE_CAM_CONFIGS = tuple(
    SparseCamConfig(block_p, block_m, num_warps, block_oh, block_ow)
    for block_p, block_m, num_warps in ((64, 64, 2), (256, 16, 8), (64, 32, 2))
    for block_oh, block_ow in ((2, 256), (8, 256), (8, 64))
)


def sparse_cam_config(P: int, enlarged: float, OW: int) -> SparseCamConfig:
    """Room for a small map or parts of a large one, and tiles no higher than what they share.

    Args:
        P: pixels of the map.
        enlarged: output rows a source row, which are interpolated between the same two.
        OW: output columns.
    """
    first = 0 if P <= 64 else 3 if P <= SPARSE_CAM_MAX_PIXELS else 6
    low, high, narrow = SPARSE_CAM_CONFIGS[first : first + 3]
    if OW <= 64:
        return narrow
    return high if enlarged >= 8 else low


def sparse_cam_rows(B: int, OH: int, config: SparseCamConfig) -> int:
    """Output rows of a program, whole tiles of them: few images have many programs.

    Each program of an image makes its map again, so a large batch has one or two, a single image
    as many as it has tiles (H200: the best of five numbers at B = 1, 4, 16, 64, 256, 512, 1,024).
    """
    slices = max(1, round(32 / math.sqrt(B)))
    return -(-OH // (slices * config.block_oh)) * config.block_oh


class RefineConfig(NamedTuple):
    """Launch choices of ``refine``: a program's tile of channels and pixels, twice."""

    block_c: int  # of the statistics
    block_p: int
    sum_block_c: int  # of the sum over the channels
    sum_block_p: int
    product_block: int  # pixels of the result
    num_warps: int


REFINE_CONFIGS = (RefineConfig(8, 256, 16, 128, 256, 4), RefineConfig(64, 16, 128, 16, 256, 4))


def refine_config(*, is_last: bool) -> RefineConfig:
    """Tiles that lie as the memory does, up to 2,048 numbers for 128 threads.

    Args:
        is_last: whether neighbouring channels are neighbours in memory (channels-last).
    """
    return REFINE_CONFIGS[is_last]


class DenseCamConfig(NamedTuple):
    """Launch choices of the sums of ``dense_cam``; ``sparse_cam``'s are those of its maps."""

    block_p: int
    block_c: int  # channels read at once
    num_warps: int
    channels: int  # that a program adds up


DENSE_CAM_BLOCKS = ((64, 64, 4), (256, 32, 8), (128, 32, 4))  # reasoned from registers


def dense_cam_config(B: int, C: int, P: int, sms: int) -> DenseCamConfig:
    """A small map at once, with its channels in slices until each multiprocessor has four programs.

    Args:
        B: images.
        C: channels.
        P: pixels of the map.
        sms: multiprocessors of the device.
    """
    at = 0 if P <= 64 else 1 if P <= SPARSE_CAM_MAX_PIXELS else 2
    block_p, block_c, num_warps = DENSE_CAM_BLOCKS[at]
    slices = 1 if at == 2 else max(1, PROGRAMS_PER_SM * sms // B)
    channels = -(-C // (slices * block_c)) * block_c
    return DenseCamConfig(block_p, block_c, num_warps, channels)


TOP_M_MAX_C, TOP_M_MAX_M = 8192, 256  # a library sort beyond


class TopMConfig(NamedTuple):
    """Launch choices of ``top_m``."""

    block_c: int  # at least C
    block_m: int  # at least M
    num_warps: int


TOP_M_CONFIGS = tuple(
    TopMConfig(block_c, block_m, num_warps)
    for block_c, num_warps in ((256, 1), (1024, 1), (2048, 4), (8192, 8))
    for block_m in (64, 256)
)


def top_m_config(C: int, M: int) -> TopMConfig:
    """The smallest blocks that hold a row and what is kept of it."""
    return next(c for c in TOP_M_CONFIGS if c.block_c >= C and c.block_m >= M)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one elsewhere, where Triton's interpreter runs."""
    if device.type != "cuda":
        return 1
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


MAX_THREADS = 512  # of a program: beyond, AMD's registers are too few


def fitting_warps(num_warps: int, lanes: int | None = None) -> int:
    """That many warps, or as many as make MAX_THREADS where one has 64 lanes (AMD) and not 32."""
    if lanes is None:
        lanes = 64 if torch.version.hip else 32
    return min(num_warps, MAX_THREADS // lanes)


def fitting_stages(num_stages: int, lanes: int | None = None) -> int:
    """That many stages of a pipeline, or one where shared memory is 64 KiB (AMD)."""
    if lanes is None:
        lanes = 64 if torch.version.hip else 32
    return num_stages if lanes == 32 else 1


class KnnConfig(NamedTuple):
    """How `knn` is launched: program s of ``splits`` takes the tiles s, s + splits, ..."""

    is_scaled: bool  # the queries are scaled and rounded by a launch of their own
    block_b: int
    block_n: int  # rows of a tile
    block_d: int
    num_warps: int
    num_stages: int
    splits: int
    list: int  # slots for the K nearest
    taken: int  # groups measured at once
    measured_block_d: int
    measured_warps: int
    allowed: int  # rows left to measure for a query that one program measures
    slices: int  # of the table in the exhaustive pass; 0 leaves no query to it
    programs: int  # of the exhaustive pass

    @property
    def block_c(self) -> int:
        """Room for the classes of all splits: one size, for few forms of the kernel."""
        return max(KNN_MAX_CLASSES, triton.next_power_of_2(self.splits * self.block_n // 4))


KNN_MAX_CLASSES = 4096  # of all splits, which one program holds in registers
KNN_MIN_SPLITS = 64  # or neighbours would share classes of too many rows
KNN_SMALL_N = 4096  # rows that one program may have to measure by itself


@functools.lru_cache(256)  # asked at each call, and takes as long as an operation
def knn_config(B: int, N: int, D: int, K: int, processors: int) -> KnnConfig:
    """The launch of `knn` for these shapes on a GPU with so many multiprocessors.

    Three sizes of lists and four of batches keep the forms of the kernels few. The blocks of the
    first pass and TAKEN of the second are the fastest of some ten each on an H200 (triton 3.6, D =
    128 and 512), where rows still had scales of their own; the rest is reasoned.
    """
    block_d = max(16, min(128, triton.next_power_of_2(D)))
    is_whole = block_d >= D
    if not is_whole:
        block_d = 64
    has_rest = D % block_d > 0 and not is_whole
    if B <= 16:
        block_b, block_n, num_warps, resident = (16, 32, 4, 4) if has_rest else (16, 64, 4, 2)
    elif B <= 64 and is_whole:
        block_b, block_n, num_warps, resident = 64, 32, 4, 3
    elif B <= 128 or D % block_d:
        # With a rest to mask, more queries at once need more registers than there are.
        block_b, block_n, num_warps, resident = 128, 32, 8, 3
    elif is_whole:
        block_b, block_n, num_warps, resident = 256, 32, 8, 2
    else:
        block_b, block_n, num_warps, resident = 256, 64, 8, 1
    classes = block_n // 4
    splits = max(KNN_MIN_SPLITS, -(-resident * processors // -(-B // block_b)))
    splits = min(splits, -(-N // block_n), KNN_MAX_CLASSES // classes)
    is_small = N <= KNN_SMALL_N
    slots = 2 if K <= 2 else 8 if K <= 8 else 32
    return KnnConfig(
        is_scaled=B > 16,
        block_b=block_b,
        block_n=block_n,
        block_d=block_d,
        num_warps=num_warps,
        num_stages=3,
        splits=splits,
        list=slots,
        taken=min(16, slots),
        measured_block_d={2: 128, 8: 64, 32: 32}[slots],
        measured_warps=4,
        allowed=2**30 if is_small else 1024,
        slices=0 if is_small else min(-(-N // 64), 2 * processors),
        programs=4 * processors,
    )


class TriesConfig(NamedTuple):
    """How the tries of `sample_triplets` are launched."""

    block_j: int  # tries side by side
    block_d: int
    block_k: int  # kept pairs compared at once
    num_warps: int


def tries_config(D: int) -> TriesConfig:
    """The launch for embeddings of width D: two tiles of 2,048 numbers for 128 threads."""
    block_d = min(128, max(32, 1 << (D - 1).bit_length()))  # Triton to 3.7 fails to compile 16
    return TriesConfig(block_j=2048 // block_d, block_d=block_d, block_k=16, num_warps=4)


def long_tries_config(D: int) -> TriesConfig:
    """The launch for the anchors that need many tries: twice as many side by side."""
    block_j, block_d, block_k, num_warps = tries_config(D)
    return TriesConfig(min(2 * block_j, 256), block_d, block_k, 2 * num_warps)


class NearConfig(NamedTuple):
    """How rows near anchors are looked for, in `sample_triplets` and `mean_cotangents`."""

    block_b: int
    block_n: int
    block_d: int
    num_warps: int
    programs: int


def near_config(processors: int) -> NearConfig:
    """The launch on a GPU with so many multiprocessors."""
    return NearConfig(block_b=64, block_n=64, block_d=64, num_warps=8, programs=2 * processors)


VECTOR_BYTES = 16  # the widest load of one thread
PROGRAMS_PER_SM = 4  # wanted before T is split
RUN_BYTES = 4096  # of one triplet, held by a program
RUN_PIXELS = 1024  # above it a channel's pixels are long enough for a tile


class GradWeightsConfig(NamedTuple):
    """Of ``grad_weights``; ``channels`` 0 takes the tile kernel."""

    channels: int  # a program's, in the run kernel
    align: int  # every block of the run starts at a multiple of so many elements
    block_t: int
    block_c: int  # of the tile kernel
    block_p: int
    splits: int  # parts of T that programs of their own add up
    num_warps: int


def grad_weights_config(
    B: int,
    T: int,
    C: int,
    P: int,
    itemsize: int,
    *,
    is_run: bool,
    is_last: bool,
    sms: int,
) -> GradWeightsConfig:
    """128 bytes in flight a thread, or 64; T is split until each multiprocessor has four programs.

    Args:
        B: images.
        T: triplets.
        C: channels.
        P: pixels.
        itemsize: bytes of a gradient.
        is_run: whether each triplet's [C, P] is one run of memory.
        is_last: whether neighbouring channels are neighbours in memory (channels-last).
        sms: multiprocessors of the device.
    """
    wanted = PROGRAMS_PER_SM * sms
    if is_run and P <= RUN_PIXELS and C * P < 2**31:
        block_t = 4
        if block_t > T:
            block_t = 2  # with 1, ptxas spills the longest runs on sm_80
        vector = VECTOR_BYTES // itemsize
        step = vector // math.gcd(P, vector)  # channels whose pixels fill whole vectors
        fit = RUN_BYTES // itemsize // P
        channels = min(fit // step * step or fit, triton.cdiv(C, step) * step)
        programs = B * triton.cdiv(C, channels)
        elements = triton.next_power_of_2(channels * P)
        return GradWeightsConfig(
            channels=channels,
            align=math.gcd(channels * P, vector),
            block_t=block_t,
            block_c=0,
            block_p=0,
            splits=max(1, min(triton.cdiv(wanted, programs), T // (3 * block_t))),
            num_warps=max(1, min(8, elements * itemsize // 1024)),
        )
    if is_last:
        block_c = min(64, triton.next_power_of_2(C))
        block_p = min(32, triton.next_power_of_2(max(T, 1) * P))
    else:
        block_p = min(2048, triton.next_power_of_2(P))
        block_c = min(2048 // block_p, triton.next_power_of_2(C))
    programs = B * triton.cdiv(C, block_c)
    return GradWeightsConfig(
        channels=0,
        align=1,
        block_t=1,
        block_c=block_c,
        block_p=block_p,
        splits=max(1, min(triton.cdiv(wanted, programs), T // 6)),
        num_warps=4 if is_last else 8,
    )


class HeadConfig(NamedTuple):
    """Of the product of ``head_grad_weights``."""

    is_split: bool  # into bfloat16 halves, for tensor cores
    block_rows: int  # triplets of one image or of several (Grad-CAM++), or images (Grad-CAM)
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int


HEAD_GRAD_WEIGHTS_CONFIGS = (
    HeadConfig(False, 16, 64, 32, 4, 3),
    HeadConfig(False, 64, 64, 16, 2, 3),
    HeadConfig(True, 64, 64, 32, 4, 3),
)


def head_grad_weights_config(
    B: int, T: int, C: int, precision: str, *, is_plus: bool, sms: int
) -> HeadConfig:
    """A tile of the product, for Grad-CAM as large as leaves one for every multiprocessor.

    Args:
        B: images.
        T: triplets.
        C: channels.
        precision: "ieee" or "tf32".
        is_plus: the product of every triplet, an image a program, in place of every image's.
        sms: multiprocessors of the device.
    """
    small, large, split = HEAD_GRAD_WEIGHTS_CONFIGS
    if precision == "tf32":
        return split
    if is_plus:
        return large if small.block_rows < T else small
    tiles = triton.cdiv(B, large.block_rows) * triton.cdiv(C, large.block_c)
    return large if tiles >= sms else small


def head_project_config(T: int, D: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_D, warps): all of D at once, up to 2,048 numbers of D and T together."""
    block_d = triton.next_power_of_2(max(D, 1))
    block_t = max(1, min(triton.next_power_of_2(max(T, 1)), 2048 // block_d))
    return block_t, block_d, max(1, min(8, block_d * block_t // 256))
