"""Kernels that the offline test must find fault with, and one that it must not."""

import torch
import triton
import triton.language as tl


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


def launches(_):
    x = torch.empty(4096)
    with torch.cuda.device_of(x):
        _fine[(1,)](x, x, BLOCK=128, num_warps=4)
        _spilling[(1,)](x, x, BLOCK=4096, num_warps=1, maxnreg=32)
        _broken[(1,)](x, x, BLOCK=128, num_warps=4)
