"""A FAISS index of the caller's: the right rows whatever its kind and ids, or one clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import common, loader, pictures
from torch import Tensor

import gcfast
from gcfast.database.shards import Shard
from gcfast.search.faiss_search import open_index
from gcfast.search.transfer import make_engine

faiss = pytest.importorskip("faiss")

ROWS, WIDTH = 400, 16
OTHER_ROWS = "`index` must hold the database's rows, and what it has under id .* is not row"


def table(*, grouped: bool = True) -> Tensor:
    """Unit rows, sorted by class, as a folder of pictures gives them."""
    centers = 3 * torch.randn(8, WIDTH)
    rows = centers.repeat_interleave(ROWS // 8, 0) + torch.randn(ROWS, WIDTH)
    return torch.nn.functional.normalize(rows if grouped else rows[torch.randperm(ROWS)], dim=1)


def shards(rows: Tensor) -> list[Shard]:
    number = torch.arange(len(rows))
    ones = torch.ones(len(rows), 2)
    whole = Shard(rows, number[:, None].expand(-1, 2), ones, ones[:, 0], number, number)
    return [
        Shard(*(c[:150].contiguous() for c in whole)),
        Shard(*(c[150:].contiguous() for c in whole)),
    ]


def opened(index: Any, rows: Tensor, ids: Any = None) -> Any:
    return open_index(index, shards(rows), torch.device("cpu"), ids)


def nearest(index: Any, rows: Tensor, queries: Tensor, k: int, ids: Any = None) -> np.ndarray:
    made = make_engine(opened(index, rows, ids), shards(rows), threads=1)
    return made.search(queries.numpy(), k=k)[1]


def filled(factory: str, rows: Tensor, ids: Any = None, metric: int = 1) -> Any:
    index = faiss.index_factory(WIDTH, factory, metric)
    array = np.ascontiguousarray(rows.numpy())
    index.train(array)
    if ids is None:
        index.add(array)
    else:
        index.add_with_ids(array, np.asarray(ids))
    return index


# Kinds of index, and whether they are exact enough to be compared with brute force.
KINDS = {
    "Flat": True,
    "HNSW16": True,
    "IVF4,Flat": False,
    "IVF4,PQ4np": False,
    "IVF4,PQ4x4fs": False,
    "IVF4,SQ8": False,
    "PQ4np": False,
    "PQ2x4np": False,
    "PQ4x4fs": False,
    "SQ8": False,
    "SQ4": False,
    "SQfp16": False,
    "OPQ4,PQ4x4np": False,
    "OPQ4,IVF4,PQ4x4np": False,
    "PCA8,Flat": False,
    "L2norm,Flat": True,
    "LSH": False,
    "NSG16,Flat": False,
    "HNSW16,PQ4np": False,
    "HNSW16,SQ8": False,
    "IVF4_HNSW8,PQ4np": False,
    "PQ4np,RFlat": False,
    "IVF4,PQ4np,RFlat": False,
    "RaBitQ": False,
    "IVF4,RaBitQ": False,
    "RQ4x4": False,
    "PCAR8,SQ8": False,
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "another order": lambda rows: rows[torch.randperm(len(rows))],
    "row 0 removed and added again": lambda rows: torch.cat([rows[1:], rows[:1]]),
    "a row in the middle missing, one more at the end": lambda rows: torch.cat(
        [rows[:50], rows[51:], rows[:1]]
    ),
    "another model": lambda rows: torch.nn.functional.normalize(torch.randn_like(rows), dim=1),
    "not normalized": lambda rows: (0.5 + 3 * torch.rand(len(rows), 1)) * rows,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_is_taken_with_the_right_rows(kind: str) -> None:
    rows = table()
    found = nearest(filled(kind, rows), rows, rows[:20], 1)
    if KINDS[kind]:
        assert found[:, 0].tolist() == list(range(20))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_are_refused(kind: str, wrong: str) -> None:
    if kind in ("L2norm,Flat", "LSH") and wrong == "not normalized":
        pytest.skip("it does not depend on their length")
    rows = table()
    with pytest.raises(ValueError, match=OTHER_ROWS):
        opened(filled(kind, WRONG[wrong](rows)), rows)


def test_a_lossless_index_may_differ_as_devices_do() -> None:
    rows = table()
    moved = rows + 2e-3 * torch.nn.functional.normalize(torch.randn_like(rows), dim=1)
    for kind in ("Flat", "IVF4,Flat", "SQfp16", "HNSW16"):
        opened(filled(kind, moved), rows)
        opened(filled(kind, rows.half().float()), rows.half())
    one = rows.clone()
    one[-1] = rows[0]
    with pytest.raises(ValueError, match=r"under id 399 is not row 399: make it of .*`ids`.*Flat'"):
        opened(filled("Flat", one), rows)


# --- ids


IDS = {
    "from 1": lambda: np.arange(1, ROWS + 1),
    "64 bits": lambda: np.random.default_rng(0).permutation(ROWS) * (2**53) + 7,
    "negative": lambda: -2 - np.arange(ROWS),
    "falling": lambda: np.arange(ROWS)[::-1].copy(),
}
MAPS = ("IDMap,Flat", "IDMap2,Flat", "IDMap,PQ4np", "IVF4,Flat", "IDMap,HNSW16", "IDMap2,LSH")


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("which", IDS)
def test_ids_of_its_own_are_mapped_to_rows(which: str, kind: str) -> None:
    if which == "negative" and kind.startswith("IVF"):
        pytest.skip("FAISS takes no negative ids there")
    rows, ids = table(), IDS[which]()
    index = filled(kind, rows, ids)
    for given in (ids, torch.from_numpy(ids), ids.tolist()):
        found = nearest(index, rows, rows[:30], 1, given)
    if kind in ("IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW16", "IVF4,Flat"):
        assert found[:, 0].tolist() == list(range(30))
    # Without them it would give other rows.
    with pytest.raises(ValueError, match=OTHER_ROWS.replace("row", "(any )?row")):
        opened(index, rows)
    wrong = np.roll(ids, 1)
    with pytest.raises(ValueError, match=r"is not (any )?row"):
        opened(index, rows, wrong)


def test_rows_that_were_added_in_another_order_under_their_numbers() -> None:
    rows, order = table(), np.random.default_rng(0).permutation(ROWS)
    for kind in ("IDMap,Flat", "IDMap2,Flat", "IVF4,Flat"):
        index = filled(kind, rows[order], order)
        assert nearest(index, rows, rows[:30], 1)[:, 0].tolist() == list(range(30))


def test_ids_that_do_not_fit_are_refused() -> None:
    rows = table()
    index = filled("IDMap,Flat", rows, np.arange(1, ROWS + 1))
    for ids, kind, words in (
        (np.arange(ROWS - 1), ValueError, r"one id for each of the database's 400 rows, got 399"),
        (np.zeros(ROWS, int), ValueError, "must be unique, got 0 for more than one row"),
        (np.arange(-1, ROWS - 1), ValueError, "must not hold -1"),
        (np.arange(ROWS) / 2, TypeError, r"\[N\] whole numbers, .* got float64 of shape \[400\]"),
        (["a"] * ROWS, TypeError, r"must be \[N\] whole numbers"),
    ):
        with pytest.raises(kind, match=words):
            opened(index, rows, ids)
    with pytest.raises(ValueError, match="`ids` must be left out with index='Flat'"):
        gcfast.Explainer(common(), "backbone", index="Flat", ids=np.arange(3))


def test_negative_ids_of_an_index_without_ids_are_refused() -> None:
    rows = table()
    with pytest.raises(ValueError, match=r"is not any row"):
        opened(filled("Flat", rows), rows, -2 - np.arange(ROWS))


def test_an_id_that_is_no_rows_is_refused_when_it_is_found() -> None:
    rows, ids = table(), np.arange(1, ROWS + 1)

    class Odd(faiss.IndexFlatL2):  # type: ignore[misc, name-defined]
        def search(self, queries: Any, k: int) -> tuple[Any, Any]:
            D, found = super().search(queries, k)
            return D, found + 1 + 10_000 * (queries[:, :1] > 5)

    index = Odd(WIDTH)
    index.add(rows.numpy())
    made = make_engine(opened(index, rows, ids), shards(rows), threads=1)
    assert made.search(rows[:3].numpy(), k=1)[1][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="`ids` must name every row of `index`, it returned 10"):
        made.search(np.full((1, WIDTH), 9, np.float32), k=1)


# --- what gives no vectors back


def unreadable(rows: Tensor, parts: int = 2) -> Any:
    index = faiss.IndexShards(WIDTH, False, True)
    step = len(rows) // parts
    for start in range(0, len(rows), step):
        index.add_shard(filled("Flat", rows[start : start + step]))
    return index


@pytest.mark.parametrize("wrong", WRONG)
def test_where_it_gives_no_vectors_rows_are_searched_for(wrong: str) -> None:
    rows = table()
    assert nearest(unreadable(rows), rows, rows[:9], 1)[:, 0].tolist() == list(range(9))
    with pytest.raises(ValueError, match=OTHER_ROWS):
        opened(unreadable(WRONG[wrong](rows)), rows)


# --- metrics, and the count


@pytest.mark.parametrize("kind", ["Flat", "IDMap,Flat", "IVF1,Flat"])
def test_inner_products_of_unit_rows_give_the_nearest(kind: str) -> None:
    rows = table(grouped=False)
    queries = torch.nn.functional.normalize(torch.randn(25, WIDTH), dim=1)
    ids = np.arange(5, ROWS + 5) if "IDMap" in kind else None
    index = filled(kind, rows, ids, faiss.METRIC_INNER_PRODUCT)
    wanted = (queries @ rows.T).argsort(1, descending=True)[:, :3]
    assert nearest(index, rows, queries, 3, ids).tolist() == wanted.tolist()
    # A cosine index, whose rows were normalized, over rows that were not.
    with pytest.raises(ValueError, match="not of unit length, got METRIC_INNER_PRODUCT"):
        opened(index, 2 * rows, ids)
    with pytest.raises(ValueError, match=OTHER_ROWS):
        opened(filled(kind, 2 * rows, ids, faiss.METRIC_INNER_PRODUCT), rows, ids)


@pytest.fixture
def explainer() -> Callable[..., gcfast.Explainer]:
    model = common()
    database = gcfast.Explainer(model, "backbone", channels=5).build(loader(*pictures(30)))
    return lambda **options: gcfast.Explainer(model, database=database, **options)


@pytest.mark.parametrize("way", ["explain_batch", "explain_stream"])
def test_an_index_that_loses_rows_in_use_is_refused(
    way: str, explainer: Callable[..., gcfast.Explainer]
) -> None:
    exact = explainer()
    assert exact.database is not None
    index = faiss.IndexFlatL2(6)
    index.add(exact.database.embeddings.numpy())
    one = explainer(index=index)
    images, _ = pictures(4)

    def explain() -> Tensor:
        if way == "explain_batch":
            return one.explain_batch(images)
        return next(iter(one.explain_stream([images])))

    torch.testing.assert_close(explain(), exact.explain_batch(images))
    index.remove_ids(np.array([0]))
    with pytest.raises(ValueError, match="30 rows, as it did when it was given, got 29: make an"):
        explain()
    index.add(exact.database.embeddings[:1].numpy())
    again = explainer(index=index)
    with pytest.raises(ValueError, match=r"under id 0 is not row 0"):
        again.explain_batch(images)


def test_an_explainer_maps_ids(explainer: Callable[..., gcfast.Explainer]) -> None:
    exact = explainer(k=2)
    assert exact.database is not None
    ids = np.arange(30)[::-1] * 2**40 + 1
    index = faiss.IndexIDMap(faiss.IndexFlatIP(6))
    images, _ = pictures(5)
    wanted = exact.explain_batch(images, details=True)
    for given in (index, faiss.clone_index(index)):  # empty, and then one that is filled
        one = explainer(k=2, index=given, ids=ids)
        got = one.explain_batch(images, details=True)
        assert got.neighbors.tolist() == wanted.neighbors.tolist()
        torch.testing.assert_close(got.maps, wanted.maps)
        assert index.ntotal in (0, 30)
        index.add_with_ids(exact.database.embeddings.numpy(), ids) if index.ntotal == 0 else None
