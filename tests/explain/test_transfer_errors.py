"""What the transfer engine says when something is wrong, and that it ends cleanly."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import common, loader, pictures
from transfer_case import KEPT, WIDTH, Scripted, engine, flat, queries, table

import gcfast
from gcfast import _core

pytest.importorskip("faiss")

WAYS: dict[str, Callable[[Any, Any, int], Any]] = {
    "transfer": lambda made, asked, k: made.transfer(asked, k=k),
    "submit": lambda made, asked, k: made.submit(asked, k=k).wait(),
}
BOTH = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# --- what the index does


@BOTH
def test_an_index_that_raises_is_heard(way: Any) -> None:
    whole = table(10)

    def answer(part: torch.Tensor, k: int) -> Any:
        if len(part) == 3:
            raise LookupError(f"three queries, {k} neighbours")
        return np.zeros((len(part), k))

    made = engine(Scripted(10, answer), [whole])
    for _ in range(2):
        with pytest.raises(LookupError, match="three queries, 2 neighbours"):
            way(made, queries(3), 2)
    assert (way(made, queries(2), 2)[0] == 0).all()  # and it goes on working


def test_a_tickets_exception_comes_each_time_it_is_waited_for() -> None:
    whole = table(10)
    made = engine(Scripted(10, lambda *_: 1 // 0), [whole])
    ticket = made.submit(queries(3), k=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) as caught:
            ticket.wait()
    frames = [entry.name for entry in caught.traceback]
    assert "search_c" in frames  # where it came from


@BOTH
def test_faisss_own_exceptions_keep_their_type_and_text(way: Any) -> None:
    import faiss

    whole = table(200)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, 4)
    index.train(whole.embeddings.numpy())
    index.add(whole.embeddings.numpy())
    made = engine(index, [whole])
    index.nprobe = 0
    with pytest.raises(RuntimeError, match="nprobe"):
        way(made, queries(3), 1)


@BOTH
@pytest.mark.parametrize("wrong", [10, -2])
def test_an_id_that_is_no_row_is_refused(wrong: int, way: Any) -> None:
    made = engine(Scripted(10, lambda *_: [[3, wrong]]), [table(10)])
    with pytest.raises(
        ValueError, match=f"must number the database's rows, 0 to 9, it returned {wrong}"
    ):
        way(made, queries(1), 2)


def test_nan_queries_do_no_harm() -> None:
    whole = table(10)
    made = engine(Scripted(10, lambda *_: [[3, 1, -1, 2]]), [whole])
    got = made.transfer(np.full((1, WIDTH), np.nan, np.float32), k=4)
    assert got[0].tolist() == [[1, 2, 3, -1]]
    assert np.isnan(got[1][0, :3]).all()


# --- what the engine is given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"memory_bytes": 0}, "`memory_bytes` must be at least 1"),
        ({"dim": WIDTH + 1}, "`embeddings` of a shard has another shape"),
        ({"width": KEPT + 1}, "`channels` of a shard has another shape"),
        ({"dim": 0}, "`dim` and `width` must be at least 1"),
        ({"index": Scripted(9, lambda *_: 0)}, "must hold the database's 10 rows, got 9"),
        ({"labels": np.zeros(10, np.int32)}, "`labels` of a shard has another dtype"),
        ({"weights": np.zeros((10, KEPT))}, "`weights` of a shard has another dtype"),
        ({"weights": np.zeros((10, KEPT), np.int16)}, "`weights` of a shard has another dtype"),
        ({"offsets": np.zeros(20, np.float32)[::2]}, "`offsets` of a shard .* not contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_compiled_engine_refuses(change: dict[str, Any], words: str) -> None:
    names = ("embeddings", "channels", "weights", "offsets", "labels")
    arrays = {n: t.numpy() for n, t in zip(names, table(10)[:5], strict=True)}
    arguments = {
        "index": Scripted(10, lambda *_: 0),
        "dim": WIDTH,
        "width": KEPT,
        "threads": 1,
        "memory_bytes": 1,
    }
    for name, value in change.items():
        (arrays if name in arrays else arguments)[name] = value
    index = arguments.pop("index")
    with pytest.raises(ValueError, match=words):
        _core.TransferEngine(index, [tuple(arrays.values())], **arguments)


@BOTH
def test_what_a_call_refuses(way: Any) -> None:
    made = engine(Scripted(10, lambda *_: 0), [table(10)])
    with pytest.raises(ValueError, match=rf"`queries` must have shape \[B, D\] with D = {WIDTH}"):
        way(made, np.zeros((3, WIDTH + 1), np.float32), 1)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        way(made, queries(3), 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        way(made, np.zeros((3, WIDTH)), 1)


# --- what becomes of the files


def saved(folder: Path, index: str) -> tuple[gcfast.Explainer, Path]:
    """An explainer over a memory-mapped database, which it has used, and its one shard."""
    model = common()
    gcfast.Explainer(model, "backbone", channels=5).build(loader(*pictures(60))).save(folder)
    one = gcfast.Explainer(model, database=gcfast.Database.open(folder), index=index)
    one.explain_batch(pictures(2)[0])
    return one, folder / "rows-00000.safetensors"


INDICES = pytest.mark.parametrize("index", ["exact", "Flat"])


@INDICES
def test_a_database_whose_file_is_deleted_lives_on_in_its_readers(
    tmp_path: Path, index: str
) -> None:
    one, file = saved(tmp_path / "rows", index)
    images, _ = pictures(2)
    before = one.explain_batch(images)
    file.unlink()
    assert torch.equal(one.explain_batch(images), before)


@INDICES
def test_a_database_that_is_replaced_lives_on_in_its_readers(tmp_path: Path, index: str) -> None:
    one, _ = saved(tmp_path / "rows", index)
    images, _ = pictures(2)
    before = one.explain_batch(images)
    shorter = gcfast.Explainer(common(), "backbone", channels=5).build(loader(*pictures(6)))
    shorter.save(tmp_path / "rows", overwrite=True)
    assert torch.equal(one.explain_batch(images), before)


def test_a_database_in_memory_does_not_need_its_folder(tmp_path: Path) -> None:
    one = gcfast.Explainer(common(), "backbone", channels=5, index="Flat")
    one.build(loader(*pictures(60))).save(tmp_path / "rows")
    (tmp_path / "rows" / "rows-00000.safetensors").unlink()
    one.explain_batch(pictures(2)[0])


# --- how it ends


def test_dropped_tickets_leak_nothing() -> None:
    whole = table(200)
    made = engine(flat(whole), [whole])
    asked = queries(50)
    watched: list[weakref.ref[Any]] = []
    before = sys.getrefcount(asked)
    for _ in range(100):
        buffer = np.empty(50 * 3 * KEPT, np.int64)
        watched.append(weakref.ref(buffer))
        buffers = (buffer, np.empty(50 * 3 * KEPT, np.float32), np.empty(50, np.float32))
        made.submit(asked, k=3, buffers=buffers)
        del buffer, buffers
    made.submit(asked, k=1).wait()
    gc.collect()
    assert sys.getrefcount(asked) == before
    assert not any(ref() is not None for ref in watched)


def test_an_engine_that_is_dropped_ends_its_thread() -> None:
    whole = table(10)
    index = flat(whole)
    before = sys.getrefcount(index)
    threads = _threads()
    made = engine(index, [whole])
    ticket = made.submit(queries(5), k=1)
    ticket.wait()
    assert _threads() > threads
    del made
    assert _threads() > threads  # the ticket still holds it
    del ticket
    gc.collect()
    assert _threads() == threads
    assert sys.getrefcount(index) == before


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_closed_engine_fails_what_waits_and_refuses_the_rest() -> None:
    whole = table(10)
    entered, leave = threading.Event(), threading.Event()

    def answer(part: torch.Tensor, k: int) -> Any:
        entered.set()
        leave.wait(10)
        return np.zeros((len(part), k))

    made = engine(Scripted(10, answer), [whole])
    first, second = made.submit(queries(1), k=1), made.submit(queries(1), k=1)
    entered.wait(10)
    closing = threading.Thread(target=made.close)
    closing.start()
    with pytest.raises(gcfast.GcfastError, match="closed before this batch was searched"):
        second.wait()
    assert not first.done()
    leave.set()
    assert first.wait()[0].tolist() == [[0]]
    closing.join(10)
    assert not closing.is_alive()
    made.close()
    for way in WAYS.values():
        with pytest.raises(gcfast.GcfastError, match="the transfer engine is closed"):
            way(made, queries(1), 1)


def test_the_last_reference_may_be_dropped_by_the_worker() -> None:
    whole = table(10)
    box = [engine(flat(whole), [whole])]
    gone = threading.Event()
    leave = threading.Event()

    class Ready:
        """Holds the engine, and is held by its job alone."""

        def __init__(self, made: Any) -> None:
            self.made = made
            weakref.finalize(self, gone.set)

        def __call__(self) -> None:
            leave.wait(10)

    box[0].submit(queries(1), k=1, ready=Ready(box[0]))
    box.clear()
    gc.collect()
    leave.set()
    assert gone.wait(10)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        check=False,
    )


PREPARE = """
import gc, os, sys, threading, time
import numpy as np, torch
torch.set_num_threads(1)
from transfer_case import Scripted, engine, queries, table
whole = table(10)
def slow(part, k):
    time.sleep(0.3)
    print("searched", flush=True)
    return np.zeros((len(part), k))
made = engine(Scripted(10, slow), [whole])
"""


@pytest.mark.parametrize("ending", ["", "del made, tickets"])
def test_the_interpreter_ends_while_work_is_under_way(ending: str) -> None:
    code = f"{PREPARE}tickets = [made.submit(queries(1), k=1) for _ in range(3)]\n"
    got = _run(f"{code}time.sleep(0.1)\n{ending}")
    assert (got.returncode, got.stderr) == (0, "")
    assert got.stdout.splitlines() == ["searched"]  # what was under way; the rest is dropped


def test_a_fork_after_use_is_told_in_words() -> None:
    code = f"""{PREPARE}
ticket = made.submit(queries(1), k=1)
made.submit(queries(1), k=1).wait()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tested
child = os.fork()
if child == 0:
    for call in (
        lambda: made.transfer(queries(1), k=1),
        lambda: made.submit(queries(1), k=1),
        lambda: made.close(),
        lambda: ticket.wait(),
        lambda: ticket.done(),
    ):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    again = engine(Scripted(10, slow), [whole])  # a new one works
    again.submit(queries(1), k=1).wait()
    del made, ticket, again
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
made.submit(queries(1), k=1).wait()
"""
    got = _run(code)
    assert (got.returncode, got.stderr) == (0, "")
    lines = got.stdout.splitlines()
    assert len(lines) == 10
    belongs = "GcfastError the transfer engine belongs to process"
    assert all(line.startswith(belongs) and "forked from it" in line for line in lines[2:5])
    assert all(line.startswith("GcfastError the ticket belongs to") for line in lines[5:7])
    assert lines[7:] == ["searched", "0", "searched"]


def test_a_ticket_can_be_interrupted() -> None:
    code = f"""{PREPARE}
import signal
made = engine(Scripted(10, lambda part, k: time.sleep(2) or np.zeros((len(part), k))), [whole])
ticket = made.submit(queries(1), k=1)
signal.setitimer(signal.ITIMER_REAL, 0.2)
signal.signal(signal.SIGALRM, signal.default_int_handler)
start = time.monotonic()
try:
    ticket.wait()
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 1.5)
"""
    got = _run(code)
    assert (got.returncode, got.stdout, got.stderr) == (0, "interrupted True\n", "")
