"""FAISS indices on a GPU: made there where FAISS can, and entered by one thread at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from gcfast._extras import import_faiss
from gcfast._log import tell
from gcfast.search.wrapped import Wrapped

# FAISS's wheels have code for this compute capability and above; on an older card the first kernel
# ends the process.
LEAST_CAPABILITY = (7, 0)

# Where an index holds another.
PARTS = ("index", "base_index", "refine_index", "quantizer", "storage")

_turns: dict[int, threading.RLock] = {}  # of the devices


def gpus_of(index: Any) -> tuple[int, ...]:
    """Return the numbers of the GPUs that an index runs on, wholly or in part, rising."""
    faiss = import_faiss("index")
    if not hasattr(faiss, "GpuIndex"):
        return ()
    while isinstance(index, Wrapped):
        index = index.index
    index = faiss.downcast_index(index) if hasattr(index, "this") else index
    if isinstance(index, faiss.GpuIndex):
        return (index.getDevice(),)
    named = (getattr(index, name, None) for name in PARTS)
    parts = [part for part in named if isinstance(part, faiss.Index)]
    if hasattr(index, "at") and hasattr(index, "count"):
        parts += [index.at(i) for i in range(index.count())]
    return tuple(sorted({number for part in parts for number in gpus_of(part)}))


@contextmanager
def turn(gpus: tuple[int, ...]) -> Iterator[None]:
    """Be the only thread in an index of these GPUs while the block runs.

    Indices of one card may share a ``StandardGpuResources``, in which two threads at once end the
    process, and FAISS does not say which do; their kernels would wait for each other anyway.
    """
    with ExitStack() as held:
        for number in gpus:  # rising, so that no two threads wait for each other
            held.enter_context(_turns.setdefault(number, threading.RLock()))
        yield


class InTurn(Wrapped):
    """An index on GPUs, which one thread enters at a time."""

    def __init__(self, index: Any, gpus: tuple[int, ...]) -> None:
        super().__init__(index)
        self._gpus = gpus

    def search_c(self, n: int, queries: Any, k: int, distances: Any, ids: Any) -> None:
        """As FAISS's: through pointers."""
        with turn(self._gpus):
            self.index.search_c(n, queries, k, distances, ids)


def in_turn(index: Any) -> Any:
    """Return an index that any number of threads may search in: itself, if on no GPU."""
    gpus = gpus_of(index)
    return InTurn(index, gpus) if gpus else index


def readable(index: Any) -> Any:
    """Return the index, or a copy on the CPU where a GPU holds codes that only a CPU gives back."""
    faiss = import_faiss("index")
    if not gpus_of(index):
        return index
    inner = faiss.downcast_index(index)
    while isinstance(inner, (faiss.IndexIDMap, faiss.IndexPreTransform)):
        inner = faiss.downcast_index(inner.index)
    if not isinstance(inner, (faiss.GpuIndexIVFPQ, faiss.GpuIndexIVFScalarQuantizer)):
        return index
    try:
        return faiss.index_gpu_to_cpu(index)
    except RuntimeError:  # it keeps no ids
        return index


def on_gpu(index: Any, device: torch.device, k: int) -> Any:
    """Return the index on the device, or itself, with a word in the log, where FAISS cannot.

    Args:
        index: on the CPU.
        device: a CUDA device.
        k: neighbors that will be searched for.
    """
    faiss = import_faiss("index")
    number = device.index or 0
    why = _no_code(faiss, number)
    if why is None:
        try:
            # Of its own: each index has a worker thread, and threads must not share them. The index
            # keeps them. Their pinned memory is for queries of more bytes than an engine asks with.
            resources = faiss.StandardGpuResources()
            resources.setPinnedMemory(0)
            there = faiss.index_cpu_to_gpu(resources, number, index)
            there.search(np.zeros((1, index.d), np.float32), k)  # a GPU's K has a limit
        except RuntimeError as error:  # HNSW, for example; or the memory is full
            why = str(error)
        else:
            return there
    kind = type(faiss.downcast_index(index)).__name__
    tell("search", "the index stays on the CPU", logging.WARNING, index=kind, reason=why)
    return index


def _no_code(faiss: Any, number: int) -> str | None:
    """Why FAISS has no code for a card; None if it has."""
    if not hasattr(faiss, "StandardGpuResources"):
        return "this FAISS has no code for GPUs: pip install 'gcfast[gpu]'"
    if number >= faiss.get_num_gpus():
        return f"FAISS sees {faiss.get_num_gpus()} GPUs and not cuda:{number}"
    capability = torch.cuda.get_device_capability(number)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"FAISS has code for compute capability {least} and above, cuda:{number} has " + (
            ".".join(map(str, capability))
        )
    return None
