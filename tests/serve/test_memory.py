"""Memory that malloc holds is given back while the server runs."""

import ctypes
import time

import pytest
from helpers import resident

from gcfast.serve.watch import Release

MIB = 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_holes_are_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    size = 100_000  # below what malloc would map, and so give back, on its own
    blocks = [libc.malloc(size) for _ in range(2_000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:
        libc.free(block)
    held = resident()
    release = Release(0.05)
    release.start()
    try:
        deadline = time.monotonic() + 10
        while resident() > held - 100 * MIB:
            assert time.monotonic() < deadline, "nothing was given back"
            time.sleep(0.02)
    finally:
        release.close()
        libc.free(blocks[-1])
