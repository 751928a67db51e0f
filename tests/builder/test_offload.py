"""Taking results to the host a batch behind the device."""

import pytest
import torch

from gcfast.builder.offload import RESIDENT_SHARE, Offload, PinnedTransport, resident


class Recorder:
    """A transport that notes what is asked of it, and whose copies exist once they are finished."""

    def __init__(self):
        self.events = []

    def start(self, columns):
        number = sum(kind == "start" for kind, _ in self.events)
        self.events.append(("start", number))
        return number, dict(columns)

    def finish(self, token):
        number, columns = token
        self.events.append(("finish", number))
        return columns


def test_the_cpu_hands_out_at_once():
    offload = Offload(torch.device("cpu"))
    columns = {"embeddings": torch.ones(2, 3)}
    ((got, note),) = offload.put(columns, "first")
    assert got["embeddings"] is columns["embeddings"]
    assert note == "first"
    assert offload.drain() == []


@pytest.mark.parametrize("behind", [1, 2])
def test_a_batch_is_taken_up_after_the_next_was_started(behind):
    recorder = Recorder()
    offload = Offload(torch.device("cpu"), behind=behind, transport=recorder)
    notes = []
    for row in range(4):
        notes += [note for _, note in offload.put({"x": torch.tensor([row])}, row)]
        assert notes == list(range(max(0, row + 1 - behind)))
    for columns, note in offload.drain():
        assert columns["x"].tolist() == [note]
        notes.append(note)
    assert notes == [0, 1, 2, 3]
    assert offload.drain() == []
    order = recorder.events.index
    for batch in range(4 - behind):
        assert order(("start", batch + behind)) < order(("finish", batch))


def test_draining_between_batches_leaves_nothing_behind():
    offload = Offload(torch.device("cpu"), transport=Recorder())
    assert offload.put({"x": torch.zeros(1)}, "a") == []
    assert [note for _, note in offload.drain()] == ["a"]
    assert offload.put({"x": torch.zeros(1)}, "b") == []
    assert [note for _, note in offload.put({"x": torch.zeros(1)}, "c")] == ["b"]


def test_errors_of_a_copy_reach_the_caller():
    class Broken(Recorder):
        def finish(self, token):
            raise RuntimeError(f"copy {token[0]} failed")

    offload = Offload(torch.device("cpu"), transport=Broken())
    offload.put({"x": torch.zeros(1)}, 0)
    with pytest.raises(RuntimeError, match="copy 0 failed"):
        offload.put({"x": torch.zeros(1)}, 1)


def test_a_table_stays_where_there_is_no_room(monkeypatch):
    table = torch.ones(4, 8)
    assert resident(table, torch.device("cpu")) is table
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: asked.append(device) or self)
    gpu, enough = torch.device("cuda"), int(table.nbytes / RESIDENT_SHARE)
    assert resident(table, gpu, free_bytes=enough - 1) is table
    assert asked == []
    resident(table, gpu, free_bytes=enough)
    assert asked == [gpu]


@pytest.mark.cuda
def test_pinned_copies_are_the_callers_own():
    device = torch.device("cuda")
    offload = Offload(device)
    assert isinstance(offload.transport, PinnedTransport)
    taken = []
    for size in (5, 3, 8, 0, 2):  # a buffer is reused, grows, and may hold less than it can
        x = torch.arange(size, device=device) + 100 * size
        taken += offload.put({"x": x, "y": x[:, None].expand(-1, 2)}, size)
    taken += offload.drain()
    assert [note for _, note in taken] == [5, 3, 8, 0, 2]
    for columns, size in taken:
        assert columns["x"].tolist() == [100 * size + i for i in range(size)]
        assert columns["y"].shape == (size, 2)
        assert not columns["x"].is_pinned()
