"""Transfers that are started and waited for later, and how they end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transfer_case import answering, flat, queries, table, transfer

from gcfast.search.transferred import Transferred

pytest.importorskip("faiss")


def asked(count: int) -> torch.Tensor:
    return torch.from_numpy(queries(count))


def assert_equal(one: Transferred, two: Transferred) -> None:
    for a, b in zip(one, two, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_they_run_in_order_and_give_what_a_call_gives() -> None:
    whole = table(200)
    index, searched = flat(whole), []

    def answer(part: np.ndarray[Any, Any], k: int) -> Any:
        searched.append(len(part))
        return index.search(part, k)[1]

    made, plain = transfer(answering(whole.embeddings, answer), whole, 2), transfer(index, whole, 2)
    searched.clear()  # the temperature's
    batches = [asked(5 + i) for i in range(8)]
    started = [made.start(batch) for batch in batches]
    for batch, wait in reversed(list(zip(batches, started, strict=True))):
        assert_equal(wait(), plain(batch))
        assert_equal(wait(), plain(batch))
    assert searched == [len(batch) for batch in batches]


def test_several_threads_may_wait_for_one() -> None:
    whole = table(200)
    made, given = transfer(flat(whole), whole, 3), asked(300)
    wanted = made(given)
    for _ in range(20):
        wait = made.start(given)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _, wait=wait: wait(), range(4)):
                assert_equal(got, wanted)


def test_embeddings_may_be_overwritten_once_it_is_started() -> None:
    whole = table(200)
    index, leave = flat(whole), threading.Event()

    def answer(part: np.ndarray[Any, Any], k: int) -> Any:
        assert leave.wait(10)
        return index.search(part, k)[1]

    made, given = transfer(answering(whole.embeddings, answer), whole), asked(9)
    wanted = transfer(index, whole)(given)
    wait = made.start(given)
    given.zero_()
    leave.set()
    assert_equal(wait(), wanted)


@pytest.mark.parametrize("way", ["call", "start"])
def test_eight_threads_on_one_transfer(way: str) -> None:
    whole = table(3000)
    made = transfer(flat(whole), whole, 3)
    batches = [asked(300) for _ in range(8)]
    wanted = [made(batch) for batch in batches]

    def work(number: int) -> None:
        for _ in range(10):
            got = made(batches[number]) if way == "call" else made.start(batches[number])()
            assert_equal(got, wanted[number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_an_exception_comes_each_time_it_is_waited_for() -> None:
    whole = table(10)

    def answer(part: np.ndarray[Any, Any], k: int) -> Any:
        if len(part) == 3:
            raise LookupError("three queries")
        return np.zeros((len(part), k))

    made = transfer(answering(whole.embeddings, answer), whole)
    wait = made.start(asked(3))
    for _ in range(3):
        with pytest.raises(LookupError, match="three queries") as caught:
            wait()
    assert "answer" in [entry.name for entry in caught.traceback]  # where it came from
    assert (made.start(asked(2))().neighbors == 0).all()  # and it goes on working


def test_faiss_uses_as_many_threads_as_where_the_transfer_was_made() -> None:
    import faiss

    whole, seen = table(10), []

    def answer(part: np.ndarray[Any, Any], k: int) -> Any:
        seen.append(faiss.omp_get_max_threads())
        return np.zeros((len(part), k))

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        made = transfer(answering(whole.embeddings, answer), whole)
    finally:
        faiss.omp_set_num_threads(before)
    made.start(asked(1))()
    made(asked(1))
    assert seen == [3, before]


# --- how it ends


def workers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("gcfast-transfer")}


def until(condition: Any) -> bool:
    """Whether it becomes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return bool(condition())


def test_what_is_not_waited_for_leaks_nothing() -> None:
    whole = table(200)
    made, given = transfer(flat(whole), whole, 3), asked(50)
    made.start(given)()
    watched = [weakref.ref(made.start(given).args[0]) for _ in range(100)]  # type: ignore[attr-defined]
    made.start(given)()
    assert until(lambda: all(ref() is None for ref in watched))


def test_a_transfer_that_is_dropped_ends_its_thread() -> None:
    whole = table(10)
    index = flat(whole)
    references, before = sys.getrefcount(index), workers()
    made = transfer(index, whole)
    wait = made.start(asked(5))
    wait()
    (worker,) = workers() - before
    del made
    gc.collect()
    assert wait().neighbors.shape == (5, 1)  # which still holds it
    assert worker.is_alive()
    del wait
    assert until(lambda: not worker.is_alive())
    assert until(lambda: sys.getrefcount(index) == references)


def test_the_last_reference_may_be_dropped_by_the_worker() -> None:
    whole, leave = table(10), threading.Event()

    def answer(part: np.ndarray[Any, Any], k: int) -> Any:
        assert leave.wait(10)
        return np.zeros((len(part), k))

    before = workers()
    made = transfer(answering(whole.embeddings, answer), whole)
    gone = weakref.ref(made)
    made.start(asked(1))
    (worker,) = workers() - before
    del made
    gc.collect()
    assert gone() is not None
    leave.set()
    assert until(lambda: gone() is None and not worker.is_alive())


PREPARE = """
import gc, os, sys, threading, time
import numpy as np, torch
torch.set_num_threads(1)
from transfer_case import answering, queries, table, transfer
whole = table(10)
def slow(part, k):
    time.sleep(0.3)
    print("searched", flush=True)
    return np.zeros((len(part), k))
made = transfer(answering(whole.embeddings, slow), whole)
asked = torch.from_numpy(queries(1))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        check=False,
    )


@pytest.mark.parametrize("ending", ["", "del made, started"])
def test_the_interpreter_ends_while_work_is_under_way(ending: str) -> None:
    code = f"{PREPARE}started = [made.start(asked) for _ in range(3)]\n"
    got = run(f"{code}time.sleep(0.1)\n{ending}")
    assert (got.returncode, got.stderr) == (0, "")
    assert set(got.stdout.splitlines()) == {"searched"}


def test_a_fork_after_use_is_told_in_words() -> None:
    code = f"""{PREPARE}
wait = made.start(asked)
made.start(asked)()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tested
child = os.fork()
if child == 0:
    for call in (lambda: made(asked), lambda: made.start(asked), wait):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    again = transfer(answering(whole.embeddings, slow), whole)  # a new one works
    again.start(asked)()
    del made, wait, again
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
made.start(asked)()
"""
    got = run(code)
    assert (got.returncode, got.stderr) == (0, "")
    lines = got.stdout.splitlines()
    assert len(lines) == 8
    belongs = "GcfastError the search through an index belongs to process"
    assert all(line.startswith(belongs) and "forked from it" in line for line in lines[2:5])
    assert lines[5:] == ["searched", "0", "searched"]


def test_a_fork_while_it_searches_is_told_in_words() -> None:
    code = f"""{PREPARE}
started = [made.start(asked) for _ in range(2)]
time.sleep(0.1)
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    for wait in started:
        try:
            wait()
        except Exception as error:
            print(type(error).__name__, flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
for wait in started:
    wait()
"""
    got = run(code)
    assert (got.returncode, got.stderr) == (0, "")
    assert sorted(got.stdout.splitlines()) == ["0", "GcfastError", "GcfastError", *["searched"] * 2]


def test_waiting_can_be_interrupted() -> None:
    code = f"""{PREPARE}
import signal
made = transfer(answering(whole.embeddings, lambda part, k: time.sleep(2) or [0]), whole)
wait = made.start(asked)
signal.setitimer(signal.ITIMER_REAL, 0.2)
signal.signal(signal.SIGALRM, signal.default_int_handler)
start = time.monotonic()
try:
    wait()
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 1.5)
"""
    got = run(code)
    assert (got.returncode, got.stdout, got.stderr) == (0, "interrupted True\n", "")
