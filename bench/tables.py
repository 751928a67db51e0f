"""Large tables and indices for the benchmarks of the transfer."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from gcfast.database.shards import Shard

CHANNELS = 1280
CLUSTERS = 1000
SPREAD = 0.05


def shard(folder: Path, rows: int, dim: int, kept: int) -> Shard:
    """Unit embeddings round cluster centres, each row with random weights.

    Memory-mapped from one file, as a database's shards are.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, dim, generator=generator)
    centres = torch.nn.functional.normalize(centres, dim=1)
    embeddings = centres[torch.randint(CLUSTERS, (rows,), generator=generator)]
    embeddings += SPREAD * torch.randn(rows, dim, generator=generator)
    values = {
        "embeddings": torch.nn.functional.normalize(embeddings, dim=1),
        "channels": torch.randint(CHANNELS, (rows, kept), generator=generator),
        "weights": torch.randn(rows, kept, generator=generator),
        "offsets": torch.randn(rows, generator=generator),
        "labels": torch.randint(CLUSTERS, (rows,), generator=generator),
        "triplet_counts": torch.ones(rows, dtype=torch.int64),
    }
    safetensors.torch.save_file(values, folder / "rows.safetensors")
    return Shard(**safetensors.torch.load_file(folder / "rows.safetensors"))


def queries(table: Shard, count: int, seed: int = 1) -> np.ndarray[Any, Any]:
    """Unit vectors near random rows."""
    generator = torch.Generator().manual_seed(seed)
    near = table.embeddings[torch.randint(len(table.labels), (count,), generator=generator)]
    noise = SPREAD * torch.randn(near.shape, generator=generator)
    return torch.nn.functional.normalize(near + noise, dim=1).numpy()


def filled(factory: str, rows: Tensor, nprobe: int = 8, ef: int = 64) -> Any:
    """A FAISS index of the rows; "IVF" has about √N lists."""
    import faiss

    if factory == "IVF":
        factory = f"IVF{2 ** round(math.log2(len(rows) ** 0.5))},Flat"
    index = faiss.index_factory(rows.shape[1], factory)
    index.train(rows[:: max(1, len(rows) // 500_000)].numpy())
    index.add(rows.numpy())
    if hasattr(index, "nprobe"):
        index.nprobe = nprobe
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = ef
    return index


class Known:
    """Stands where an index does and gives row numbers that were drawn before."""

    def __init__(self, dim: int, rows: int) -> None:
        self.d, self.ntotal = dim, rows
        self.rows = np.zeros(0, np.int64)

    def search_c(self, n: int, queries: Any, k: int, distances: Any, ids: Any) -> None:
        del queries, distances
        ctypes.memmove(int(ids), self.rows.ctypes.data, 8 * n * k)


def numpy_gather(table: dict[str, np.ndarray[Any, Any]], ids: np.ndarray[Any, Any]) -> Any:
    """What a user writes: one indexing operation an array."""
    return [table[name][ids] for name in ("channels", "weights", "offsets", "labels")]


def views(table: Shard) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in table._asdict().items()}
