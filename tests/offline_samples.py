"""Kernels that the offline test must find fault with, and one that it must not."""

import triton
import triton.language as tl

from gcfast.kernels.launch import Specialisation


@triton.jit
def _fine(out_ptr, in_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(in_ptr + offs) + 1)


@triton.jit
def _spilling(out_ptr, in_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(in_ptr + offs)  # 128 values a thread, all of them alive to the end
    total = tl.sum(x, axis=0)
    x = tl.exp(x - total)
    total = tl.sum(x, axis=0)
    tl.store(out_ptr + offs, x / total)


@triton.jit
def _broken(out_ptr, in_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(in_ptr + tl.arange(0, 2 * BLOCK)))


def specialisations():
    types = {"out_ptr": "*fp32", "in_ptr": "*fp32"}
    return [
        Specialisation(_fine, types, {"BLOCK": 128}, {"num_warps": 4}),
        Specialisation(_spilling, types, {"BLOCK": 4096}, {"num_warps": 1, "maxnreg": 32}),
        Specialisation(_broken, types, {"BLOCK": 128}, {"num_warps": 4}),
    ]
