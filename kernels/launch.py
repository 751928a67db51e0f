"""Blocks and warps of every kernel, as functions of shape and dtype.

For each operation there is a NamedTuple of its launch choices, a function ``<operation>_config``
that makes one, and ``<OPERATION>_CONFIGS``, every value that the function can return: the kernels
are compiled offline for all of them (tests/test_offline_compile.py), so a choice that is not listed
there is one that nothing has compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Specialisation(NamedTuple):
    """One compiled form of a kernel.

    Each kernel file has ``specialisations()``, which lists every form that its launcher can ask
    for. Pointers are taken to be 16-byte aligned, as PyTorch allocates them.
    """

    kernel: Any  # the @triton.jit function
    # Arguments at run time, as Triton names types: "*fp32", "i64", "fp32"; "i32:16" is a number
    # divisible by 16, for which Triton makes other code.
    types: dict[str, str]
    constants: dict[str, Any]  # tl.constexpr arguments, and integers that are 1
    options: dict[str, int]  # num_warps, num_stages


# Programs that fill a GPU several times over: 132 multiprocessors (H100, H200) by eight.
FULL_GRID = 1056


class SparseCamConfig(NamedTuple):
    """Launch choices of ``sparse_cam``."""

    window: int  # side of the square of the low-resolution map that is held at once
    block_m: int  # kept channels read at once
    block_oh: int
    block_ow: int
    num_warps: int
    whole: bool = True  # whether the window holds every map

    def tile(self, H: int, OH: int, W: int, OW: int) -> tuple[int, int]:
        """Output rows and columns of one tile: as many as the window has source pixels for."""
        if self.whole:
            return self.block_oh, self.block_ow
        # n outputs span (n - 1) scale source pixels, and two more for the taps; one for rounding.
        rows = int((self.window - 3) * OH / H) + 1
        columns = int((self.window - 3) * OW / W) + 1
        return min(rows, self.block_oh), min(columns, self.block_ow)


SPARSE_CAM_CONFIGS = (
    SparseCamConfig(window=8, block_m=16, block_oh=8, block_ow=256, num_warps=4),
    SparseCamConfig(window=8, block_m=16, block_oh=32, block_ow=64, num_warps=4),
    SparseCamConfig(window=16, block_m=16, block_oh=8, block_ow=256, num_warps=4),
    SparseCamConfig(window=16, block_m=16, block_oh=32, block_ow=64, num_warps=4),
    SparseCamConfig(window=32, block_m=4, block_oh=16, block_ow=128, num_warps=4),
    SparseCamConfig(window=64, block_m=2, block_oh=32, block_ow=128, num_warps=8),
    SparseCamConfig(window=64, block_m=2, block_oh=32, block_ow=128, num_warps=8, whole=False),
)


def sparse_cam_config(H: int, W: int, OW: int) -> SparseCamConfig:
    """The smallest window that holds a map, or windows of the largest."""
    side = max(H, W)
    narrow = OW <= 64
    if side <= 8:
        return SPARSE_CAM_CONFIGS[1 if narrow else 0]
    if side <= 16:
        return SPARSE_CAM_CONFIGS[3 if narrow else 2]
    if side <= 32:
        return SPARSE_CAM_CONFIGS[4]
    return SPARSE_CAM_CONFIGS[5 if side <= 64 else 6]


def sparse_cam_slices(B: int, tiles: int) -> int:
    """Programs an image, of the tiles of its output rows: few images have many."""
    return max(1, min(tiles, FULL_GRID // B))


TOP_M_MAX_C, TOP_M_MAX_M = 8192, 256  # a library sort beyond


class TopMConfig(NamedTuple):
    """Launch choices of ``top_m``."""

    block_c: int  # channels read at once, at least block_m
    block_m: int  # at least M
    num_warps: int


TOP_M_CONFIGS = (
    TopMConfig(block_c=1024, block_m=64, num_warps=4),
    TopMConfig(block_c=1024, block_m=256, num_warps=4),
    TopMConfig(block_c=256, block_m=64, num_warps=2),
)


def top_m_config(C: int, M: int) -> TopMConfig:
    """Blocks of channels that a row fills, and room for M."""
    if M > 64:
        return TOP_M_CONFIGS[1]
    return TOP_M_CONFIGS[2 if C <= 256 else 0]
