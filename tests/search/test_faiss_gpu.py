"""Indices on a GPU, as far as stand-ins on the CPU show: turns, refusals, and what stays behind."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from networks import common, loader, pictures
from transfer_case import WIDTH, Scripted, engine, flat, queries, table

import gcfast
from gcfast.search.faiss_gpu import PARTS, gpus_of, in_turn, on_gpu, readable, turn
from gcfast.search.faiss_search import open_index
from gcfast.search.transfer import IndexTransfer

faiss = pytest.importorskip("faiss")


class OnGpu(faiss.IndexFlatL2):  # type: ignore[misc, name-defined]
    """Stands where a ``GpuIndexFlat`` does: it gives vectors back and has no codec."""

    device = 0

    def getDevice(self) -> int:  # noqa: N802
        return self.device

    def sa_encode(self, _: Any) -> Any:
        raise RuntimeError("standalone codec not implemented for this type of index")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GpuIndex", "GpuIndexFlat"):
        monkeypatch.setattr(faiss, name, OnGpu, raising=False)
    for name in ("GpuIndexIVFPQ", "GpuIndexIVFScalarQuantizer"):
        monkeypatch.setattr(faiss, name, type(name, (), {}), raising=False)
    monkeypatch.setattr(faiss, "downcast_index", lambda index: index)


def filled(rows: torch.Tensor, device: int = 0) -> OnGpu:
    index = OnGpu(WIDTH)
    index.add(rows.numpy())
    index.device = device
    return index


class Parts:
    """Stands where an ``IndexShards`` does."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def count(self) -> int:
        return len(self.parts)

    def at(self, number: int) -> Any:
        return self.parts[number]


@pytest.mark.usefixtures("stand_in")
def test_the_gpus_of_an_index_are_found_in_its_parts() -> None:
    whole = table(20)
    one, two = (filled(whole.embeddings, device) for device in (3, 1))
    assert gpus_of(flat(whole)) == ()
    assert gpus_of(one) == (3,)
    assert gpus_of(Parts(one, flat(whole), two, one)) == (1, 3)
    for name in PARTS:
        assert gpus_of(SimpleNamespace(**{name: one})) == (3,)
    assert gpus_of(SimpleNamespace(quantizer=flat(whole), storage=7)) == ()
    assert gpus_of(in_turn(Parts(one))) == (3,)
    assert in_turn(flat(whole)).__class__ is faiss.IndexFlatL2
    assert readable(one) is one


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("devices", [(0, 0), (0, 1)], ids=["one GPU", "two GPUs"])
def test_indices_of_one_gpu_are_entered_by_one_thread_at_a_time(
    devices: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def answer(part: torch.Tensor, k: int) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return np.zeros((len(part), k), np.int64)

    monkeypatch.setattr(Scripted, "getDevice", lambda self: self.number, raising=False)
    monkeypatch.setattr(faiss, "GpuIndex", Scripted)
    whole, engines = table(10), []
    for number in devices:
        index: Any = Scripted(10, answer)
        index.number = number
        engines.append(engine(index, [whole]))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: engines[i % 2].transfer(queries(1), k=1), range(16)))
    assert most == len(set(devices))


def test_a_turn_may_be_taken_within_a_turn_and_no_two_threads_wait_for_each_other() -> None:
    def take(number: int) -> int:
        with turn((0, 1) if number % 2 else (1,)), turn((1,)):
            time.sleep(0.001)
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(take, range(40), timeout=20)) == list(range(40))


# --- an index of the caller's


@pytest.mark.usefixtures("stand_in")
def test_one_wrong_row_in_a_flat_index_is_refused_as_on_the_cpu() -> None:
    whole = table(300)
    cpu = torch.device("cpu")
    rows = torch.nn.functional.normalize(torch.randn(300, WIDTH), dim=1)
    whole = whole._replace(embeddings=rows)
    open_index(filled(rows), [whole], cpu)
    wrong = rows.clone()
    wrong[-1] = rows[0]
    with pytest.raises(ValueError, match="under id 299 is not row 299"):
        open_index(filled(wrong), [whole], cpu)


@pytest.mark.usefixtures("stand_in")
def test_an_empty_one_is_refused_in_words() -> None:
    words = "got an empty OnGpu on a GPU, which FAISS does not copy: add the database's embeddings"
    with pytest.raises(ValueError, match=words):
        open_index(OnGpu(WIDTH), [table(30)], torch.device("cpu"))


@pytest.mark.usefixtures("stand_in")
def test_vectors_are_asked_of_it_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = table(3000), []

    def reconstruct_batch(self: OnGpu, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        asked.append(len(keys))
        return np.stack([self.reconstruct(int(key)) for key in keys])

    monkeypatch.setattr(OnGpu, "reconstruct_batch", reconstruct_batch)
    open_index(filled(whole.embeddings), [whole], torch.device("cpu"))
    assert sum(asked) == 1024
    assert max(asked) <= 1000  # of more, FAISS asks from several


@pytest.mark.parametrize("method", ["gradcam", "proxy", "elementwise"])
@pytest.mark.parametrize("k", [1, 3])
def test_what_is_lent_through_pinned_buffers(
    method: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"channels": 5} if method == "gradcam" else {}
    one = gcfast.Explainer(common(), "backbone", method=method, k=k, index="Flat", **settings)
    database = one.build(loader(*pictures(30)))
    made = one.attach().transfer
    assert isinstance(made, IndexTransfer)
    given = database.embeddings[:5].clone()
    size = 5 * k * made.width
    pinned = (torch.empty(size, dtype=torch.int64), torch.empty(size), torch.empty(5))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    for got, wanted in zip(
        made._transferred(made._search(given.numpy(), pinned), pinned), made(given), strict=True
    ):
        assert (got is None and wanted is None) or torch.equal(got, wanted)


# --- what stays on the CPU


class Resources:
    made: ClassVar[list[Resources]] = []

    def __init__(self) -> None:
        self.made.append(self)

    def setPinnedMemory(self, size: int) -> None:  # noqa: N802
        assert size == 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FAISS that sees one card, whose indices are the CPU's."""
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, number))
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda _, number, index: (number, index)[1], raising=False
    )
    monkeypatch.setattr(Resources, "made", [])


GPU = torch.device("cuda", 0)


@pytest.mark.usefixtures("card")
def test_each_index_on_a_gpu_has_resources_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    index = flat(table(20))
    for _ in range(2):
        assert on_gpu(index, GPU, 3) is index
    assert len(Resources.made) == 2
    assert caplog.messages == []


@pytest.mark.usefixtures("card")
def test_why_an_index_stays_on_the_cpu_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = flat(table(20))

    def no(*_: Any) -> Any:
        raise RuntimeError("This index type is not implemented on GPU.")

    class TooMany(faiss.IndexFlatL2):  # type: ignore[misc, name-defined]
        def search(self, _: Any, k: int) -> Any:
            raise RuntimeError(f"supports K selection up to 2048 (requested {k})")

    begins = "the index stays on the CPU: index=IndexFlatL2, reason="
    for module, name, value, words in (
        (faiss, "index_cpu_to_gpu", no, "This index type is not implemented on GPU."),
        (faiss, "index_cpu_to_gpu", lambda *_: TooMany(WIDTH), "up to 2048 (requested 3000)"),
        (torch.cuda, "get_device_capability", lambda _: (6, 1), "capability 7.0 and above"),
        (torch.cuda, "get_device_capability", lambda _: (6, 1), "cuda:0 has 6.1"),
        (faiss, "get_num_gpus", lambda: 0, "FAISS sees 0 GPUs and not cuda:0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert on_gpu(index, GPU, 3000) is index
        assert caplog.messages[-1].startswith(begins)
        assert words in caplog.messages[-1]
    monkeypatch.delattr(faiss, "StandardGpuResources")
    assert on_gpu(index, GPU, 1) is index
    assert caplog.messages[-1].endswith(
        "this FAISS has no code for GPUs: pip install 'gcfast[gpu]'"
    )
    assert len(caplog.messages) == 6
