"""Search and gather through the engine beside FAISS's Python API and NumPy indexing."""

from pathlib import Path

import numpy as np
import pytest
from tables import filled, numpy_gather, queries, shard, views

from gcfast.search.transfer import make_engine

ROWS, D, M, THREADS = 50_000, 128, 50, 2


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return shard(Path(tmp_path_factory.mktemp("table")), ROWS, D, M)


@pytest.fixture(scope="module")
def indices(table):
    return {name: filled(name, table.embeddings) for name in ("Flat", "IVF64,Flat")}


@pytest.mark.parametrize("side", ["gcfast", "FAISS + NumPy"])
@pytest.mark.parametrize("batch", [1, 32, 1024])
@pytest.mark.parametrize("index", ["Flat", "IVF64,Flat"])
def test_search_and_gather(benchmark, table, indices, index, batch, side):
    benchmark.group = f"{index}, N = {ROWS}, D = {D}, M = {M}, B = {batch}, K = 1"
    index, asked, arrays = indices[index], queries(table, batch), views(table)
    engine = make_engine(index, [table], threads=THREADS)

    def by_hand():
        _, found = index.search(asked, 1)
        return [found, *numpy_gather(arrays, found[:, 0])]

    wanted = by_hand()
    got = engine.transfer(asked, k=1)
    for one, two in zip((got[0], *got[4:], got[2][:, 0]), wanted, strict=True):
        np.testing.assert_array_equal(one, two)
    if side == "gcfast":
        benchmark(engine.transfer, asked, k=1)
    else:
        benchmark(by_hand)
