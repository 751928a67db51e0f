"""Embeddings as people have them, in arrays and in FAISS indexes, as one table of float32."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import require_finite_rows


class Vectors(NamedTuple):
    """Embeddings in the order of the rows to be."""

    table: Tensor  # [N, D] float32 on the CPU
    numbers: NDArray[np.int64] | None  # [N] an index's own ids, rising; None where they are 0, 1, …
    source: str  # what they were read from, in a word or two


def read_vectors(embeddings: Any) -> Vectors:
    """Return the embeddings of an array or of a FAISS index.

    Args:
        embeddings: [N, D] floating point, a tensor or anything NumPy takes (a memory map is read
            once); or a ``faiss.Index``, which is left as it is. Vectors of a compressed index are
            what it decodes.

    Raises:
        TypeError: neither numbers nor an index.
        ValueError: another shape, no rows, NaN with the row, or an index that does not give its
            vectors back.
    """
    faiss = _faiss_of(embeddings)
    if faiss is not None:
        table, numbers = _of_index(faiss, embeddings)
        source = type(faiss.downcast_index(embeddings)).__name__
        order = np.argsort(numbers, kind="stable")
        plain = np.array_equal(numbers, np.arange(len(numbers)))
        if not plain and not np.array_equal(order, np.arange(len(order))):
            table, numbers = table[order], numbers[order]
            plain = np.array_equal(numbers, np.arange(len(numbers)))
        twice = numbers[1:][np.diff(numbers) == 0]
        if len(twice):
            raise ValueError(f"`embeddings` must have ids that are unique, got {twice[0]} twice")
        vectors = Vectors(torch.from_numpy(table), None if plain else numbers, source)
    else:
        vectors = Vectors(floats("embeddings", embeddings, "N D"), None, "an array")
    if not len(vectors.table):
        raise ValueError("`embeddings` must hold at least one row, got none")
    require_finite_rows("embeddings", vectors.table)
    return vectors


def own_ids(embeddings: Any) -> list[int] | None:
    """Return an index's own ids, rising; None where they are 0, 1, … or there is no index.

    Raises:
        ValueError: as :func:`read_vectors`.
    """
    if _faiss_of(embeddings) is None:
        return None
    numbers = read_vectors(embeddings).numbers
    return None if numbers is None else [int(number) for number in numbers]


def _faiss_of(embeddings: Any) -> Any:
    """Return the module faiss for an index of it, None for anything else."""
    faiss = sys.modules.get("faiss")  # where there is an index, its module is loaded
    return faiss if faiss is not None and isinstance(embeddings, faiss.Index) else None


def floats(name: str, values: Any, letters: str) -> Tensor:
    """Return numbers of any floating-point kind as a float32 tensor on the CPU.

    Args:
        name: the argument's name.
        values: a tensor, or anything NumPy takes.
        letters: its dimensions, "N D" or "N".

    Raises:
        TypeError: not floating-point numbers.
        ValueError: another rank.
    """
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        array = np.asarray(values)
        if array.dtype.kind != "f":
            raise TypeError(
                f"`{name}` must be floating-point numbers"
                f"{' or a faiss.Index' if name == 'embeddings' else ''}, got "
                f"{type(values).__name__} of {array.dtype}"
            )
        native = array.dtype.newbyteorder("=")
        tensor = torch.from_numpy(np.require(array, native, ["C", "W"]))
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating-point numbers, got {tensor.dtype}")
    expected = letters.split()
    if tensor.ndim != len(expected):
        raise ValueError(
            f"`{name}` must have shape [{', '.join(expected)}], got {list(tensor.shape)}"
        )
    return tensor.float().contiguous()


def _of_index(faiss: Any, index: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (vectors [N, D], ids [N]) in the index's own order, decoded where it compresses."""
    index = faiss.downcast_index(index)
    if hasattr(faiss, "GpuIndex") and isinstance(index, faiss.GpuIndex):
        index = faiss.downcast_index(faiss.index_gpu_to_cpu(index))
    if isinstance(index, faiss.IndexIDMap):  # IDMap2 is one
        table, inner = _of_index(faiss, index.index)
        return table, faiss.vector_to_array(index.id_map)[inner]
    if isinstance(index, faiss.IndexPreTransform):
        table, numbers = _of_index(faiss, index.index)
        for step in reversed(range(index.chain.size())):
            table = faiss.downcast_VectorTransform(index.chain.at(step)).reverse_transform(table)
        return table, numbers
    try:
        if isinstance(index, faiss.IndexIVF):
            return _of_lists(faiss, index)
        if index.ntotal:
            index.reconstruct(0)  # FAISS ends the process where many at once cannot be had
        return index.reconstruct_n(0, index.ntotal), np.arange(index.ntotal)
    except RuntimeError as error:
        raise ValueError(
            f"`embeddings` must be an index that gives its vectors back, got "
            f"{type(index).__name__}, which does not ({str(error).splitlines()[-1][:120]}): give "
            "the embeddings that it was made of"
        ) from None


def _of_lists(faiss: Any, index: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read inverted lists one vector at a time, which needs no direct map: it would stay there."""
    lists = index.invlists
    table = np.empty((index.ntotal, index.d), dtype=np.float32)
    numbers = np.empty(index.ntotal, dtype=np.int64)
    filled = 0
    for number in range(index.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        ids = lists.get_ids(number)
        numbers[filled : filled + size] = faiss.rev_swig_ptr(ids, size)
        lists.release_ids(number, ids)
        for offset in range(size):
            index.reconstruct_from_offset(number, offset, faiss.swig_ptr(table[filled + offset]))
        filled += size
    return table, numbers
