"""The transfer engine against brute force, and against itself on other threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import common, loader, pictures
from transfer_case import (
    CHANNELS,
    KEPT,
    WIDTH,
    Scripted,
    assert_nearest,
    cut,
    engine,
    exact_distances,
    flat,
    queries,
    table,
)

import gcfast
from gcfast import ops
from gcfast.database.shards import Shard

pytest.importorskip("faiss")

NAMES = ("neighbors", "distances", "labels", "rows", "channels", "weights", "offsets")


def named(arrays: tuple[np.ndarray[Any, Any], ...]) -> dict[str, np.ndarray[Any, Any]]:
    return dict(zip(NAMES, arrays, strict=True))


def mixed_by_hand(
    found: np.ndarray[Any, Any], distances: np.ndarray[Any, Any], whole: Shard, tau: float
) -> tuple[dict[int, float], float]:
    """({channel: weight}, offset) of one query's neighbours [K]."""
    there = found >= 0
    shares = np.exp(-(distances[there].astype(np.float64) - distances[0]) / tau)
    shares /= shares.sum()
    total: dict[int, float] = {}
    for row, share in zip(found[there], shares, strict=True):
        for channel, weight in zip(whole.channels[row], whole.weights[row], strict=True):
            total[int(channel)] = total.get(int(channel), 0.0) + share * float(weight)
    return total, float((shares * whole.offsets[found[there]].double().numpy()).sum())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("ends", [(), (1, 40, 40, 199)], ids=["one shard", "five shards"])
@pytest.mark.parametrize("k", [1, 4])
def test_equals_brute_force(k: int, ends: tuple[int, ...], half: bool) -> None:
    whole = table(200, half=half)
    asked = queries(150)
    got = named(engine(flat(whole), cut(whole, *ends)).transfer(asked, k=k, temperature=0.3))
    assert_nearest(got["neighbors"], got["distances"], exact_distances(asked, whole))
    np.testing.assert_array_equal(got["labels"], whole.labels.numpy()[got["neighbors"]])
    np.testing.assert_array_equal(got["rows"][:, 0], np.arange(150))
    for b in range(150):
        weights, offset = mixed_by_hand(got["neighbors"][b], got["distances"][b], whole, 0.3)
        own = len(weights)
        assert got["channels"][b, :own].tolist() == list(weights)
        np.testing.assert_allclose(
            got["weights"][b, :own], list(weights.values()), rtol=1e-5, atol=1e-6
        )
        assert got["offsets"][b] == pytest.approx(offset, rel=1e-5, abs=1e-6)
        # Narrower rows than the widest repeat their first channel with no weight.
        assert (got["channels"][b, own:] == got["channels"][b, 0]).all()
        assert (got["weights"][b, own:] == 0).all()
    width = max(len(set(row)) for row in got["channels"].tolist())
    assert got["channels"].shape[1] == width
    assert width == KEPT if k == 1 else KEPT < width < k * KEPT


@pytest.mark.parametrize("k", [1, 5])
def test_the_cam_operation_takes_the_arrays_as_they_are(k: int) -> None:
    whole = table(100)
    activations = torch.rand(6, CHANNELS, 3, 4)
    got = named(engine(flat(whole), [whole]).transfer(queries(6), k=k, temperature=0.2))
    tensors = {name: torch.from_numpy(array) for name, array in got.items()}
    maps = ops.sparse_cam(
        activations,
        tensors["rows"],
        tensors["channels"],
        tensors["weights"],
        size=(6, 8),
        offsets=tensors["offsets"],
        center=0.5,
    )
    distances = tensors["distances"]
    mixing = torch.softmax(-(distances - distances[:, :1]) / 0.2, 1)
    wanted = ops.sparse_cam(
        activations,
        tensors["neighbors"],
        whole.channels,
        whole.weights,
        size=(6, 8),
        mixing=mixing,
        offsets=whole.offsets,
        center=0.5,
    )
    torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-5)


def test_float16_is_read_to_the_last_bit() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    rows = len(every) // KEPT
    weights = every[: rows * KEPT].view(rows, KEPT)
    whole = table(rows)._replace(weights=weights)
    order = np.arange(rows)
    index = Scripted(rows, lambda *_: order[:, None])
    got = named(engine(index, [whole]).transfer(queries(rows), k=1))
    np.testing.assert_array_equal(got["weights"], weights.float().numpy())


@pytest.mark.parametrize("k", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(k: int) -> None:
    whole = table(3000)
    index, asked = flat(whole), queries(1100)
    results = [
        engine(index, cut(whole, 1000), threads=threads).transfer(asked, k=k)
        for threads in (1, 2, 7)
    ]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), two.view(np.uint8))


@pytest.mark.parametrize("k", [1, 5])
def test_a_batch_is_split_to_stay_below_the_bound(k: int) -> None:
    whole = table(300)
    sizes: list[int] = []
    index, asked = flat(whole), queries(100)

    def answer(part: torch.Tensor, k: int) -> Any:
        sizes.append(len(part))
        return index.search(part.numpy(), k)[1]

    each = 4 * WIDTH + 24 * k
    split = engine(Scripted(300, answer), [whole], memory_bytes=30 * each).transfer(asked, k=k)
    assert sizes == [30, 30, 30, 10]
    at_once = engine(index, [whole]).transfer(asked, k=k)
    for one, two in zip(split, at_once, strict=True):
        np.testing.assert_array_equal(one, two)
    sizes.clear()
    engine(Scripted(300, answer), [whole], memory_bytes=1).transfer(asked[:3], k=k)
    assert sizes == [1, 1, 1]


def memory_status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset")
def test_mixing_holds_no_second_copy_of_the_result() -> None:
    k, B = 16, 60_000
    whole, ids = table(2 * k), np.tile(np.arange(k), (B, 1))
    made = engine(
        Scripted(2 * k, lambda part, _: ids[: len(part)]), [whole], threads=1, memory_bytes=1 << 20
    )
    asked = queries(B)
    made.transfer(asked[:2000], k=k)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    got = made.transfer(asked, k=k)
    grown, result = memory_status("VmHWM") - before, sum(array.nbytes for array in got)
    assert grown <= result + (8 << 20), (grown, result)


def test_missing_neighbours_weigh_nothing() -> None:
    whole = table(5)
    made = engine(flat(whole), [whole])
    got = named(made.transfer(queries(4), k=8))
    assert (got["neighbors"][:, 5:] == -1).all()
    assert (got["labels"][:, 5:] == -1).all()
    assert np.isinf(got["distances"][:, 5:]).all()
    for b in range(4):
        weights, _ = mixed_by_hand(got["neighbors"][b], got["distances"][b], whole, 1.0)
        own = len(weights)
        np.testing.assert_allclose(
            got["weights"][b, :own], list(weights.values()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("k", [1, 3])
def test_nothing_found_is_a_row_of_zeros(k: int) -> None:
    whole = table(5)
    half = np.array([[2] * k, [-1] * k]) if k == 1 else np.array([[2, -1, 3], [-1] * 3])
    got = named(engine(Scripted(5, lambda *_: half), [whole]).transfer(queries(2), k=k))
    assert got["rows"].tolist() == [[0], [-1]]
    assert (got["weights"][1] == 0).all()
    assert (got["channels"][1] == 0).all()
    assert got["offsets"][1] == 0
    assert (got["neighbors"][:, -1] == -1).all() or k == 1
    assert np.isfinite(got["weights"]).all()


def test_the_temperature_of_twins_is_taken_by_the_nearest() -> None:
    whole = table(3)
    order = np.array([[2, 0, 1]])
    asked = whole.embeddings[1:2].numpy()
    got = named(engine(Scripted(3, lambda *_: order), [whole]).transfer(asked, k=3, temperature=0))
    assert got["distances"][0, 0] == 0
    assert got["neighbors"][0, 0] == 1
    weights = dict(zip(whole.channels[1].tolist(), whole.weights[1].tolist(), strict=True))
    kept = {c: w for c, w in zip(got["channels"][0], got["weights"][0], strict=True) if w != 0}
    assert kept == pytest.approx(weights)


def test_no_queries() -> None:
    whole = table(5)
    for k in (1, 3):
        got = named(engine(flat(whole), [whole]).transfer(queries(0), k=k))
        assert got["neighbors"].shape == got["distances"].shape == got["labels"].shape == (0, k)
        assert got["rows"].shape == (0, 1)
        assert len(got["channels"]) == len(got["weights"]) == len(got["offsets"]) == 0


@pytest.mark.parametrize("k", [1, 4])
def test_given_buffers_are_filled(k: int) -> None:
    whole = table(50)
    made, asked = engine(flat(whole), [whole]), queries(20)
    buffers = (
        np.full(20 * k * KEPT + 3, -7, np.int64),
        np.full(20 * k * KEPT + 3, np.nan, np.float32),
        np.full(21, np.nan, np.float32),
    )
    wanted = named(made.transfer(asked, k=k))
    got = named(made.transfer(asked, k=k, buffers=buffers))
    for name, buffer in zip(("channels", "weights", "offsets"), buffers, strict=True):
        np.testing.assert_array_equal(got[name], wanted[name])
        assert np.shares_memory(got[name], buffer)
        assert buffer[-1] == -7 or np.isnan(buffer[-1])
    with pytest.raises(ValueError, match=r"`buffers` must be int64 and float32 of at least B\*K"):
        made.transfer(asked, k=k + 1, buffers=buffers)


@pytest.mark.parametrize(
    ("factory", "least"), [("HNSW16", 0.95), ("IVF32,Flat", 0.6), ("PCA12,Flat", 0.3)]
)
def test_approximate_indices_are_as_good_as_by_themselves(factory: str, least: float) -> None:
    import faiss

    rows = torch.nn.functional.normalize(torch.randn(4000, WIDTH), dim=1)
    whole = table(4000)._replace(embeddings=rows)
    index = faiss.index_factory(WIDTH, factory)
    index.train(rows.numpy())
    index.add(rows.numpy())
    if "IVF" in factory:
        index.nprobe = 8  # type: ignore[attr-defined]
    asked = queries(300)
    best = exact_distances(asked, whole).argmin(1)
    got = named(engine(index, [whole]).transfer(asked, k=3))
    _, found = index.search(asked, 3)
    np.testing.assert_array_equal(np.sort(got["neighbors"], 1), np.sort(found, 1))
    recall = (got["neighbors"][:, 0] == best).mean()
    # Measured exactly, the nearest of what was found comes first.
    assert recall == (found == best[:, None]).any(1).mean() >= least


def test_sharded_and_replicated_indices() -> None:
    import faiss

    whole = table(200)
    rows, asked = whole.embeddings.numpy(), queries(30)
    shards = faiss.IndexShards(WIDTH, True, True)
    replicas = faiss.IndexReplicas(WIDTH)
    parts = [faiss.IndexFlatL2(WIDTH) for _ in range(2)] + [flat(whole), flat(whole)]
    parts[0].add(rows[:90])
    parts[1].add(rows[90:])
    shards.add_shard(parts[0])
    shards.add_shard(parts[1])
    replicas.addIndex(parts[2])
    replicas.addIndex(parts[3])
    for index in (shards, replicas):
        got = named(engine(index, [whole]).transfer(asked, k=3))
        assert_nearest(got["neighbors"], got["distances"], exact_distances(asked, whole))


# --- several threads


def test_eight_threads_on_one_engine() -> None:
    whole = table(3000)
    made = engine(flat(whole), cut(whole, 700, 2000))
    batches = [queries(300) for _ in range(8)]
    wanted = [made.transfer(batch, k=3) for batch in batches]

    def work(number: int) -> None:
        for _ in range(10):
            got = made.transfer(batches[number], k=3)
            for one, two in zip(got, wanted[number], strict=True):
                np.testing.assert_array_equal(one, two)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# --- through the Explainer


@pytest.mark.parametrize("index", ["Flat", "HNSW16"])
@pytest.mark.parametrize("k", [1, 3])
def test_an_explainer_with_an_index_gives_the_same_maps(k: int, index: str) -> None:
    model = common()
    images, _ = pictures(6)
    exact = gcfast.Explainer(model, "backbone", channels=5, k=k)
    database = exact.build(loader(*pictures(30)))
    one = gcfast.Explainer(model, database=database, index=index, k=k)
    for options in ({}, {"center": 1.0, "relu": False}):
        why = one.explain_batch(images, details=True, **options)
        wanted = exact.explain_batch(images, details=True, **options)
        torch.testing.assert_close(why.maps, wanted.maps, rtol=1e-4, atol=1e-5)
        assert torch.equal(why.neighbors, wanted.neighbors)
        assert torch.equal(why.labels, wanted.labels)
        assert torch.equal(why.flat, wanted.flat)
        torch.testing.assert_close(why.distances, wanted.distances)


def test_stored_weights_that_were_scaled_are_scaled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = common()
    images, _ = pictures(6)
    plain = gcfast.Explainer(model, "backbone", channels=5, index="Flat")
    plain.build(loader(*pictures(30)))
    wanted = plain.explain_batch(images, normalize=None, center=1.0)
    database = plain.database
    assert database is not None
    monkeypatch.setattr(gcfast.Database, "weight_scale", 4.0, raising=False)
    for name in ("weights", "offsets"):
        for whole in database.shards:
            getattr(whole, name).mul_(4)
    scaled = gcfast.Explainer(model, database=database, index="Flat")
    torch.testing.assert_close(scaled.explain_batch(images, normalize=None, center=1.0), wanted)
