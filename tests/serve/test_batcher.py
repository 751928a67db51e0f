"""The queue and its thread."""

import threading

import pytest

from gcfast.serve.batcher import Batcher, Job


class Runs:
    """What ran, in which batches."""

    def __init__(self):
        self.batches, self.sizes = [], []
        self.go, self.begun = threading.Event(), threading.Event()

    def run(self, arguments):
        self.begun.set()
        assert self.go.wait(20)
        self.batches.append(list(arguments))
        if "bad" in arguments:
            raise ValueError("bad")
        return [f"{argument}!" for argument in arguments]

    def job(self, argument, key="one"):
        return Job(key, self.run, argument)


@pytest.fixture
def runs():
    return Runs()


@pytest.fixture
def batcher(runs):
    made = Batcher(size=3, wait=0.0, observe=lambda size, _seconds: runs.sizes.append(size))
    made.start()
    yield made
    runs.go.set()
    made.close()


def queued(batcher, runs, *jobs):
    """Submit jobs while the thread is busy with another one."""
    batcher.submit(runs.job("first"))
    assert runs.begun.wait(20)
    futures = [batcher.submit(job) for job in jobs]
    assert batcher.waiting == len(jobs)
    return futures


def test_what_waits_runs_together_up_to_the_size(batcher, runs):
    futures = queued(batcher, runs, *map(runs.job, "abcd"))
    runs.go.set()
    assert [future.result(20) for future in futures] == ["a!", "b!", "c!", "d!"]
    assert runs.batches == [["first"], ["a", "b", "c"], ["d"]]
    assert runs.sizes == [1, 3, 1]


def test_jobs_of_another_key_run_apart(batcher, runs):
    jobs = [runs.job("a"), runs.job("b", "other"), runs.job("c")]
    futures = queued(batcher, runs, *jobs)
    runs.go.set()
    assert [future.result(20) for future in futures] == ["a!", "b!", "c!"]
    assert runs.batches == [["first"], ["a", "c"], ["b"]]


def test_a_bad_one_fails_alone(batcher, runs):
    futures = queued(batcher, runs, *map(runs.job, ("a", "bad", "c")))
    runs.go.set()
    assert futures[0].result(20) == "a!"
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(20)
    assert futures[2].result(20) == "c!"
    assert runs.sizes == [1, 1, 1]


def test_a_cancelled_one_is_not_run(batcher, runs):
    futures = queued(batcher, runs, *map(runs.job, "ab"))
    assert futures[0].cancel()
    runs.go.set()
    assert futures[1].result(20) == "b!"
    assert runs.batches == [["first"], ["b"]]


def test_it_waits_for_others(runs):
    runs.go.set()
    batcher = Batcher(size=2, wait=20.0, observe=lambda *_: None)
    batcher.start()
    futures = [batcher.submit(runs.job(name)) for name in "ab"]
    assert [future.result(20) for future in futures] == ["a!", "b!"]  # long before 20 seconds
    assert runs.batches == [["a", "b"]]
    last = batcher.submit(runs.job("c"))
    batcher.close()  # does not wait for more, and leaves none behind
    assert last.result(0) == "c!"
    assert not batcher.alive


def test_closing_finishes_what_waits(runs):
    batcher = Batcher(size=2, wait=0.0, observe=lambda *_: None)
    batcher.start()
    futures = queued(batcher, runs, *map(runs.job, "abcde"))
    threading.Timer(0.05, runs.go.set).start()
    batcher.close()
    assert [future.result(0) for future in futures] == ["a!", "b!", "c!", "d!", "e!"]
