"""FAISS indices on a real GPU: they find and lend what the CPU's do, in order, without waits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cuda_case import agree, no_waits, twins
from networks import common, loader, pictures
from torch import Tensor
from transfer_case import (
    CPU,
    WIDTH,
    assert_nearest,
    exact_distances,
    flat,
    queries,
    table,
    transfer,
)

import gcfast
from gcfast.database.shards import Shard
from gcfast.search.faiss_gpu import gpus_of
from gcfast.search.faiss_search import open_index

pytestmark = pytest.mark.cuda

faiss = pytest.importorskip("faiss")
ROWS = 3000
CYCLES = 200_000_000  # of the GPU, about a tenth of a second


def no_ties(count: int = ROWS) -> Shard:
    """Rows no two of which are as near to anything."""
    rows = torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=1)
    return table(count)._replace(embeddings=rows)


def array(whole: Shard) -> np.ndarray[Any, Any]:
    return whole.embeddings.float().numpy()


def trained(index: Any, rows: np.ndarray[Any, Any]) -> Any:
    """The index, filled; all of its lists are searched."""
    index.train(rows)
    index.add(rows)
    if hasattr(index, "nprobe"):
        index.nprobe = 4
    return index


def flat_on_gpu(rows: np.ndarray[Any, Any], *, half: bool = False) -> Any:
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = half
    return trained(faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), WIDTH, config), rows)


def sharded(rows: np.ndarray[Any, Any]) -> Any:
    index = faiss.IndexShards(WIDTH, True, True)
    for part in (rows[:1000], rows[1000:]):
        index.add_shard(flat_on_gpu(part))
    return index


def replicated(rows: np.ndarray[Any, Any]) -> Any:
    index = faiss.IndexReplicas(WIDTH)
    for _ in range(2):
        index.addIndex(flat_on_gpu(rows))
    return index


def moved(rows: np.ndarray[Any, Any]) -> Any:
    index = trained(faiss.index_factory(WIDTH, "PCAR16,Flat"), rows)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


# Indices of the caller's on the GPU, which search all the rows.
EXACT: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "GpuIndexFlatL2": flat_on_gpu,
    "GpuIndexFlatIP": lambda rows: trained(
        faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), WIDTH), rows
    ),
    "GpuIndexIVFFlat": lambda rows: trained(
        faiss.GpuIndexIVFFlat(faiss.StandardGpuResources(), WIDTH, 4, faiss.METRIC_L2), rows
    ),
    "IndexShards": sharded,
    "IndexReplicas": replicated,
    "IndexPreTransform": moved,
}
LOSSY: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "GpuIndexFlat in float16": lambda rows: flat_on_gpu(rows, half=True),
    "GpuIndexIVFPQ": lambda rows: trained(
        faiss.GpuIndexIVFPQ(faiss.StandardGpuResources(), WIDTH, 4, 4, 8, faiss.METRIC_L2), rows
    ),
    "GpuIndexIVFScalarQuantizer": lambda rows: trained(
        faiss.GpuIndexIVFScalarQuantizer(
            faiss.StandardGpuResources(), WIDTH, 4, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
        ),
        rows,
    ),
}


@pytest.fixture(autouse=True)
def _modest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One core, and little of the card for an index: several of these tests may run at once."""
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS has no code for GPUs")
    if faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU")
    real, threads = faiss.StandardGpuResources, faiss.omp_get_max_threads()

    def small() -> Any:
        made = real()
        made.setTempMemory(2**26)
        return made

    monkeypatch.setattr(faiss, "StandardGpuResources", small)
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def asked(count: int, device: torch.device) -> Tensor:
    return torch.from_numpy(queries(count)).to(device)


def equals_the_cpus(got: Any, wanted: Any, device: torch.device) -> None:
    """All that a transfer gives; without ties nothing may differ but by rounding."""
    for name in wanted._fields:
        one, two = getattr(got, name), getattr(wanted, name)
        assert (one is None) == (two is None), name
        if two is not None:
            assert one.device == device
            torch.testing.assert_close(one.cpu(), two, rtol=1e-5, atol=1e-6)


# --- made at load


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4np", "IVF4,SQ8", "PCAR16,Flat"])
def test_what_a_factory_string_makes_is_on_the_gpu(
    gpu: torch.device, factory: str, k: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = no_ties()
    made, plain = transfer(factory, whole, k, device=gpu), transfer(factory, whole, k)
    assert gpus_of(made.index) == (0,)
    assert gpus_of(plain.index) == ()
    assert caplog.messages == []
    given = asked(200, CPU)
    got, wanted = made(given.to(gpu)), plain(given)
    assert made.temperature == pytest.approx(plain.temperature, rel=1e-2)
    same = (got.neighbors.cpu() == wanted.neighbors).float().mean()
    # Codes are summed in another order there, so that rows of nearly the same code change places.
    assert same >= (0.95 if "PQ" in factory or "SQ" in factory else 0.999), same
    if factory.endswith("Flat"):
        torch.testing.assert_close(got.distances.cpu(), wanted.distances, rtol=1e-4, atol=1e-5)
    if factory == "Flat":
        equals_the_cpus(got, wanted, gpu)


@pytest.mark.parametrize(
    ("factory", "k", "words"),
    [
        ("HNSW16", 3, "IndexHNSWFlat, reason=.*not implemented on GPU"),
        ("IVF4,PQ4x4", 3, "IndexIVFPQ, reason=.*only pq.nbits == 8 is supported"),
        ("Flat", 2048, r"IndexFlat, reason=.*selection up to 2048 \(requested 2049\)"),
    ],
)
def test_what_stays_on_the_cpu_is_said_and_works(
    gpu: torch.device, factory: str, k: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = no_ties()
    made, plain = transfer(factory, whole, k, device=gpu), transfer(factory, whole, k)
    assert gpus_of(made.index) == ()
    (said,) = caplog.messages
    assert re.search(f"the index stays on the CPU: index={words}", said), said
    given = asked(9, CPU)
    equals_the_cpus(made(given.to(gpu)), plain(given), gpu)


# --- the caller's


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("where", ["model on the GPU", "model on the CPU"])
@pytest.mark.parametrize("kind", EXACT)
def test_an_index_of_the_callers_gives_what_the_cpus_does(
    gpu: torch.device, kind: str, where: str, k: int
) -> None:
    whole, device = no_ties(), gpu if where == "model on the GPU" else CPU
    made = transfer(EXACT[kind](array(whole)), whole, k, device=device)
    assert gpus_of(made.index) == (0,)
    plain, given = transfer(flat(whole), whole, k), asked(200, CPU)
    for got in (made(given.to(device)), made.start(given.to(device))()):
        equals_the_cpus(got, plain(given), device)
        found, distances = got.neighbors.cpu().numpy(), got.distances.cpu().numpy()
        assert_nearest(found, distances, exact_distances(given.numpy(), whole))


@pytest.mark.parametrize("kind", ["GpuIndexFlatL2", "IndexShards", "IndexReplicas"])
def test_of_rows_that_tie_any_is_right(gpu: torch.device, kind: str) -> None:
    whole = table(ROWS)
    made = transfer(EXACT[kind](array(whole)), whole, 5, device=gpu)
    given = asked(200, CPU)
    got = made(given.to(gpu))
    found, distances = got.neighbors.cpu().numpy(), got.distances.cpu().numpy()
    assert_nearest(found, distances, exact_distances(given.numpy(), whole))


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_index_of_the_callers_is_taken(gpu: torch.device, kind: str) -> None:
    whole = no_ties()
    index = LOSSY[kind](array(whole))
    made, given = transfer(index, whole, 5, device=gpu), asked(200, CPU)
    got = made(given.to(gpu))
    _, found = index.search(given.numpy(), 5)
    np.testing.assert_array_equal(np.sort(got.neighbors.cpu(), 1), np.sort(found, 1))
    wanted = np.take_along_axis(exact_distances(given.numpy(), whole), found, 1)
    np.testing.assert_allclose(got.distances.cpu(), np.sort(wanted, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_other_rows_are_refused(gpu: torch.device, kind: str) -> None:
    whole = no_ties()
    index = {**EXACT, **LOSSY}[kind](array(whole)[np.random.default_rng(0).permutation(ROWS)])
    with pytest.raises(ValueError, match=r"what it has under id .* is not row"):
        open_index(index, [whole], gpu)


@pytest.mark.parametrize("kind", ["GpuIndexFlatL2", "GpuIndexIVFPQ"])
def test_ids_of_its_own_are_mapped_to_rows(gpu: torch.device, kind: str) -> None:
    whole, ids = no_ties(), np.random.default_rng(0).permutation(ROWS) * (2**40) + 7
    rows = array(whole)
    index = {**EXACT, **LOSSY}[kind](rows)
    index.reset()
    index = faiss.IndexIDMap(index)
    index.add_with_ids(rows, ids)
    made = transfer(index, whole, 1, device=gpu, ids=ids)
    got = made(whole.embeddings[:50].to(gpu)).neighbors[:, 0].tolist()
    assert np.mean(np.array(got) == np.arange(50)) >= (1 if "Flat" in kind else 0.7)
    for wrong in (None, np.roll(ids, 1), -2 - np.arange(ROWS)):
        with pytest.raises(ValueError, match=r"is not (any )?row"):
            open_index(index, [whole], gpu, wrong)
    with pytest.raises(ValueError, match=r"is not any row"):
        open_index(flat_on_gpu(rows), [whole], gpu, -2 - np.arange(ROWS))


def test_what_the_gpu_cannot_do_is_said(gpu: torch.device) -> None:
    whole = no_ties()
    with pytest.raises(RuntimeError, match="selection up to 2048"):
        transfer(flat_on_gpu(array(whole)), whole, 2048, device=gpu)
    empty = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), WIDTH)
    for index in (empty, faiss.IndexIDMap(empty)):
        with pytest.raises(ValueError, match="on a GPU, which FAISS does not copy: add the"):
            open_index(index, [whole], gpu)


def test_an_index_on_the_cpu_under_a_model_on_the_gpu(gpu: torch.device) -> None:
    whole, given = no_ties(), asked(200, CPU)
    for k in (1, 5):
        made, plain = transfer(flat(whole), whole, k, device=gpu), transfer(flat(whole), whole, k)
        assert gpus_of(made.index) == ()
        equals_the_cpus(made(given.to(gpu)), plain(given), gpu)


# --- streams and threads


def test_it_is_started_without_a_wait_and_in_order_with_the_callers_stream(
    gpu: torch.device,
) -> None:
    whole, given = no_ties(), asked(200, CPU)
    made, wanted = transfer("Flat", whole, 3, device=gpu), transfer(flat(whole), whole, 3)(given)
    there = given.to(gpu)
    made.start(there)()  # allocates pinned memory
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(there)
            with no_waits():
                torch.cuda._sleep(CYCLES)
                late.copy_(there)
                wait = made.start(late)
                late.zero_()
                busy = not stream.query()
            got = wait()
        assert busy, "it waited for the kernel before it"
        stream.synchronize()
        equals_the_cpus(got, wanted, gpu)


@pytest.mark.parametrize("way", ["one transfer", "one index", "an index each", "indices of one"])
def test_eight_threads(gpu: torch.device, way: str) -> None:
    whole = no_ties()
    batches = [asked(100, CPU) for _ in range(8)]
    plain = transfer(flat(whole), whole, 3)
    wanted = [plain(batch) for batch in batches]
    shared: Any = None
    if way == "one transfer":
        shared = transfer("Flat", whole, 3, device=gpu)
    elif way == "one index":
        shared = flat_on_gpu(array(whole))
    elif way == "indices of one":
        resources = faiss.StandardGpuResources()
        shared = [faiss.index_cpu_to_gpu(resources, 0, flat(whole)) for _ in range(8)]

    def work(number: int) -> None:
        made = shared
        if way != "one transfer":
            index = {"one index": shared, "an index each": "Flat"}.get(way) or shared[number]
            made = transfer(index, whole, 3, device=gpu)
        with torch.cuda.stream(torch.cuda.Stream()):
            there = batches[number].to(gpu)
            for i in range(10):
                got = made(there) if i % 2 else made.start(there)()
                torch.cuda.current_stream().synchronize()
                equals_the_cpus(got, wanted[number], gpu)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# --- through the Explainer


def explainers(gpu: torch.device, index: str, k: int) -> tuple[gcfast.Explainer, gcfast.Explainer]:
    """(on the CPU, exact, one on the GPU with this index)."""
    plain, ours = twins(gpu, k=k)
    assert plain.database is not None
    given: Any = index
    if index == "own":
        given = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), plain.database.dim)
        given.add(plain.database.embeddings.numpy())
    return plain, gcfast.Explainer(
        ours.network.model, database=plain.database, channels=4, k=k, index=given
    )


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("index", ["Flat", "IVF1,Flat", "own"])
def test_an_explainer_gives_what_the_cpus_gives(gpu: torch.device, index: str, k: int) -> None:
    plain, ours = explainers(gpu, index, k)
    given = [pictures(count)[0] for count in (3, 2, 0, 4, 1)]
    for details in (False, True):
        wanted = [plain.explain_batch(images, details=details) for images in given]
        batches = [images.to(gpu) for images in given]
        for got, one in zip(
            [ours.explain_batch(images, details=details) for images in batches], wanted, strict=True
        ):
            agree(got, one)
        for got, one in zip(ours.explain_stream(batches, details=details), wanted, strict=True):
            agree(got, one)
    assert gpus_of(ours.attach().transfer.index) == (0,)  # type: ignore[attr-defined]


def test_rows_that_are_mapped_from_disk(gpu: torch.device, tmp_path: Any) -> None:
    plain, ours = twins(gpu, k=3)
    assert plain.database is not None
    plain.database.save(tmp_path / "rows")
    mapped = gcfast.load(tmp_path / "rows", ours.network.model, index="Flat", k=3)
    given = [pictures(3)[0] for _ in range(4)]
    for got, images in zip(
        mapped.explain_stream(images.to(gpu) for images in given), given, strict=True
    ):
        agree(got, plain.explain_batch(images))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", ["proxy", "elementwise"])
def test_methods_whose_rows_keep_no_channels(gpu: torch.device, method: str, k: int) -> None:
    model = common().eval()
    plain = gcfast.Explainer(model, "backbone", method=method, k=k)
    plain.build(loader(*pictures(30)))
    ours = gcfast.Explainer(
        copy.deepcopy(model).to(gpu), database=plain.database, method=method, k=k, index="Flat"
    )
    given = [pictures(3)[0] for _ in range(3)]
    for got, images in zip(
        ours.explain_stream(images.to(gpu) for images in given), given, strict=True
    ):
        agree(got, plain.explain_batch(images))
        agree(ours.explain_batch(images.to(gpu)), plain.explain_batch(images))


def test_a_stored_index_goes_to_the_gpu(gpu: torch.device, tmp_path: Any) -> None:
    plain, ours = twins(gpu, k=3)
    assert plain.database is not None
    plain.database.save(tmp_path / "rows")
    gcfast.Database.open(tmp_path / "rows").build_index("Flat")
    stored = gcfast.load(tmp_path / "rows", ours.network.model, index="stored", k=3)
    images = pictures(3)[0]
    agree(stored.explain_batch(images.to(gpu)), plain.explain_batch(images))
    assert gpus_of(stored.attach().transfer.index) == (0,)  # type: ignore[attr-defined]
