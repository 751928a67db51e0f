"""Nearest rows, exact and through FAISS."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from networks import common, loader, pictures

import gcfast
from gcfast.database.shards import Shard
from gcfast.search.faiss_search import ExactSearch, open_index, temperature
from gcfast.search.transfer import ExactTransfer, make_engine, make_transfer

TABLE_ROWS, WIDTH = 60, 6


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss")


def table() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(TABLE_ROWS, WIDTH), dim=1)


def brute(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    distances = (queries[:, None].double() - rows[None].double()).square().sum(2)
    return distances.sort(1)[0][:, :k], distances.sort(1)[1][:, :k]


def shard(rows: torch.Tensor) -> Shard:
    count = len(rows)
    ids = torch.zeros(count, dtype=torch.int64)
    return Shard(
        rows, ids[:, None].expand(-1, 2), torch.ones(count, 2), torch.ones(count), ids, ids
    )


def search(index: Any, rows: torch.Tensor, queries: torch.Tensor, k: int) -> list[torch.Tensor]:
    """(distances, rows) through an index."""
    if index == "exact":
        return list(ExactSearch(rows)(queries, k))
    shards = [shard(rows[: len(rows) // 3]), shard(rows[len(rows) // 3 :])]
    opened = open_index(index, shards, torch.device("cpu"))
    found = make_engine(opened, shards, threads=2).search(queries.numpy(), k=k)
    return [torch.from_numpy(array) for array in found]


def test_queries_of_another_width_than_the_table() -> None:
    rows = table()
    wider = torch.zeros(2, rows.shape[1] + 1)
    with pytest.raises(ValueError, match=r"`table` must have shape \[N, D\] with D = "):
        ExactSearch(rows)(wider, 1)


@pytest.mark.parametrize("index", ["exact", "Flat", "HNSW16", "IVF1,Flat"])
@pytest.mark.parametrize("k", [1, 5])
def test_every_index_finds_the_nearest_rows(index: str, k: int) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    rows, queries = table(), table()[:7]
    distances, found = search(index, rows, queries, k)
    wanted, ids = brute(queries, rows, k)
    assert found.tolist() == ids.tolist()
    assert found.dtype == torch.int64
    torch.testing.assert_close(distances, wanted.float(), rtol=1e-5, atol=1e-6)


def test_candidates_of_a_coarse_index_are_measured_exactly(faiss: Any) -> None:
    rows = table()
    queries = rows[:5] + 0.01
    distances, found = search("PQ2x4np", rows, queries, 3)
    for b in range(5):
        exact = (rows[found[b]] - queries[b]).square().sum(1)
        torch.testing.assert_close(distances[b], exact)
    assert (distances.diff(dim=1) >= 0).all()
    del faiss


def test_a_users_index_full_or_empty_or_of_inner_products(faiss: Any) -> None:
    rows, queries = table(), table()[:4]
    wanted = brute(queries, rows, 2)[1].tolist()
    for kind in (faiss.IndexFlatL2, faiss.IndexFlatIP):
        empty, full = kind(WIDTH), kind(WIDTH)
        full.add(np.ascontiguousarray(rows.numpy()))
        for index, count in ((empty, 0), (full, TABLE_ROWS)):
            assert search(index, rows, queries, 2)[1].tolist() == wanted
            assert index.ntotal == count  # an empty one is copied, and the copy filled


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_more_neighbours_than_rows(index: str) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    distances, found = search(index, table()[:3], table()[:2], 5)
    assert found[:, 3:].tolist() == [[-1, -1]] * 2
    assert torch.isinf(distances[:, 3:]).all()
    assert torch.isfinite(distances[:, :3]).all()


def test_indices_that_do_not_fit_are_refused(faiss: Any) -> None:
    rows = table()

    def opened(index: Any, scale: float = 1.0) -> Any:
        return open_index(index, [shard(scale * rows)], torch.device("cpu"))

    half = faiss.IndexFlatL2(WIDTH)
    half.add(np.ascontiguousarray(rows[:30].numpy()))
    with pytest.raises(ValueError, match="must hold the database's 60 rows, got 30"):
        opened(half)
    with pytest.raises(ValueError, match="the dimension of the database, 6, got 5"):
        opened(faiss.IndexFlatL2(5))
    with pytest.raises(ValueError, match="must be a FAISS factory string, got 'nonsense'"):
        opened("nonsense")
    with pytest.raises(ValueError, match="must be trainable on the database's 60 rows"):
        opened("IVF100,Flat")
    with pytest.raises(
        ValueError, match=r"60 rows or take them, got an empty Index.* not trained: train it"
    ):
        opened(faiss.index_factory(WIDTH, "IVF4,Flat"))
    with pytest.raises(ValueError, match=r"METRIC_L2, or METRIC_INNER_PRODUCT .* got metric 2"):
        opened(faiss.IndexFlat(WIDTH, faiss.METRIC_L1))
    with pytest.raises(ValueError, match=r"not of unit length, got METRIC_INNER_PRODUCT and rows"):
        opened(faiss.IndexFlatIP(WIDTH), 2.0)
    with pytest.raises(
        TypeError, match=r"'stored', a FAISS factory string or a faiss.Index, got int"
    ):
        opened(3)


def test_an_index_made_here_is_trained_on_rows_of_every_shard(
    faiss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del faiss
    rows = table()
    monkeypatch.setattr("gcfast.database.index.TRAINING_ROWS", 40)
    shards = [shard(rows[:1]), shard(rows[1:1]), shard(rows[1:])]
    index = open_index("IVF1,Flat", shards, torch.device("cpu"))
    spread = rows[torch.linspace(0, 59, 40, dtype=torch.float64).round().long()]
    centre = torch.from_numpy(index.quantizer.reconstruct(0))
    torch.testing.assert_close(centre, spread.mean(0), rtol=1e-4, atol=1e-5)
    assert index.ntotal == TABLE_ROWS


@pytest.mark.parametrize("index", ["Flat", object()], ids=["string", "object"])
def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, index: Any) -> None:
    database = gcfast.Explainer(common(), "backbone", channels=5).build(loader(*pictures(6)))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(gcfast.MissingExtraError, match=r"pip install 'gcfast\[cpu\]'"):
        make_transfer(database, torch.device("cpu"), 1, index)
    assert isinstance(make_transfer(database, torch.device("cpu"), 1, "exact"), ExactTransfer)


def test_an_explainer_searches_through_faiss(faiss: Any) -> None:
    model = common()
    images, _ = pictures(4)
    exact = gcfast.Explainer(model, "backbone", channels=5, k=2)
    database = exact.build(loader(*pictures(15)))
    for index in ("Flat", faiss.IndexFlatL2(WIDTH)):
        one = gcfast.Explainer(model, database=database, index=index, k=2)
        torch.testing.assert_close(one.explain_batch(images), exact.explain_batch(images))
        assert one.info()["index"] in ("Flat", "IndexFlatL2")


def test_an_index_that_finds_nothing_gives_a_flat_map(faiss: Any) -> None:
    model = common()
    images, labels = pictures(15)
    database = gcfast.Explainer(model, "backbone", channels=5).build([(images, labels)])

    class Blind(faiss.IndexFlatL2):  # type: ignore[misc]
        def search(self, queries: Any, k: int) -> tuple[Any, Any]:
            return np.full((len(queries), k), np.inf, "f4"), np.full((len(queries), k), -1)

    blind = Blind(WIDTH)
    with pytest.raises(ValueError, match="overrides `search` and cannot be copied: add the data"):
        gcfast.Explainer(model, database=database, index=blind).explain_batch(images[:2])
    blind.add(database.embeddings.numpy())
    one = gcfast.Explainer(model, database=database, index=blind, k=3)
    why = one.explain_batch(images[:2], details=True)
    assert why.flat.tolist() == [True, True]
    assert why.labels.tolist() == why.neighbors.tolist() == [[-1] * 3] * 2
    assert torch.equal(why.maps, torch.zeros(2, 8, 8))


def test_temperature_is_the_mean_distance_to_the_kth_other_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = table()
    kth = (rows[:, None] - rows[None]).square().sum(2).sort(1)[0][:, 3]
    assert temperature(rows, 3) == pytest.approx(float(kth.mean()), rel=1e-4)
    monkeypatch.setattr("gcfast.search.faiss_search.TEMPERATURE_ROWS", 2)
    assert temperature(rows, 3) == pytest.approx(float(kth[[0, -1]].mean()), rel=1e-4)
    assert temperature(rows[:2], 5) == 1.0
    assert temperature(rows[:1].expand(9, -1), 3) == 0.0
