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
    types: dict[str, str]  # arguments at run time, as Triton names types: "*fp32", "i64", "fp32"
    constants: dict[str, Any]  # tl.constexpr arguments, and integers that are 1
    options: dict[str, int]  # num_warps, num_stages
