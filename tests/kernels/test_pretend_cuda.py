"""That the pretended GPU refuses what a GPU would, and sees what would make the host wait."""

from __future__ import annotations

import pytest
import torch
from cuda_case import needs_no_gpu
from pretend_cuda import PretendCuda

from gcfast import ops
from gcfast.builder import offload
from gcfast.kernels import top_m

pytestmark = needs_no_gpu


def test_where_things_are(cuda):
    x = cuda.cuda(torch.randn(3, 4))
    assert x.device == torch.device("cuda:0")
    assert (x + 1).is_cuda
    assert x.new_zeros(2).is_cuda
    assert torch.zeros(2, device=x.device).is_cuda
    assert torch.zeros(2).to(x).device == x.device
    assert not x.cpu().is_cuda
    assert torch.equal((2 * x).T.cpu(), 2 * x.inner.T)
    x[0].zero_()
    assert not x.inner[0].any()


def test_tensors_of_two_devices(cuda):
    x = cuda.cuda(torch.randn(3))
    with pytest.raises(RuntimeError, match="expected all tensors to be on"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).is_cuda  # a number
    with pytest.raises(RuntimeError, match="tensors on"):
        x + cuda.cuda(torch.ones(3), 1)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    assert not cuda.uploads
    x[torch.tensor([0, 1])]  # allowed, and copied over
    assert len(cuda.uploads) == 1


@pytest.mark.parametrize(
    ("look", "what"),
    [
        (lambda x: x.sum().item(), "read"),
        (lambda x: bool((x > 0).all()), "read"),
        (lambda x: float(x[0]), "read"),
        (lambda x: x.cpu(), "download"),
        (lambda x: x.tolist(), "download"),
        (lambda x: torch.zeros(3).copy_(x), "download"),
        (lambda x: x.nonzero(), "shape"),
        (lambda x: x[x > 0], "shape"),
        (lambda x: torch.equal(x, x.clone()), "read"),
    ],
)  # fmt: skip
def test_what_the_host_waits_in(cuda, look, what):
    x = cuda.cuda(torch.randn(3))
    look(x)
    assert [wait.what for wait in cuda.waits] == [what]


def test_kernels_are_checked(cuda):
    on_gpu, on_host = cuda.cuda(torch.randn(2, 8)), torch.randn(2, 8)
    kernel = top_m._top_m_kernel
    out = on_gpu.new_empty(2, 3, dtype=torch.int64), on_gpu.new_empty(2, 3)
    rest = {"BLOCK_C": 256, "BLOCK_M": 64, "num_warps": 2}
    kernel[(2,)](*out, on_gpu, 8, 1, 8, 3, **rest)
    with pytest.raises(ValueError, match="a pointer argument is in the host's memory"):
        kernel[(2,)](*out, on_host, 8, 1, 8, 3, **rest)
    for grid in ((0,), (1, 70_000)):
        with pytest.raises(AssertionError, match="a grid of"):
            kernel[grid](*out, on_gpu, 8, 1, 8, 3, **rest)
    with cuda.on_device(1), pytest.raises(AssertionError, match="launched on cuda:1"):
        kernel[(2,)](*out, on_gpu, 8, 1, 8, 3, **rest)
    assert cuda.launches == ["_top_m_kernel"]


def test_a_launcher_without_its_guard(cuda, monkeypatch):
    x = cuda.cuda(torch.randn(2, 8), 1)
    assert ops.top_m(x, 3)[0].device == x.device
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: cuda.on_device(-1))
    with pytest.raises(AssertionError, match="launched on cuda:0"):
        ops.top_m(x, 3)


def test_streams_that_do_not_wait(cuda):
    x, side = cuda.cuda(torch.randn(3)), torch.cuda.Stream()
    y = x + 1
    with torch.cuda.stream(side), pytest.raises(AssertionError, match="another stream's use"):
        y * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        z = y * 2
    with pytest.raises(AssertionError, match="another stream's use"):
        z + 1
    with pytest.raises(AssertionError, match="another stream's use"):
        y.add_(1)  # which is being read
    event = torch.cuda.Event()
    event.record(side)
    event.wait()
    z + 1
    z.record_stream(torch.cuda.current_stream())
    y.add_(1)


def test_memory_that_is_freed_too_early(monkeypatch):
    for keep in (False, True):
        with PretendCuda(monkeypatch) as cuda:
            y, side = cuda.cuda(torch.randn(3)) + 1, torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y * 2
            if keep:
                y.record_stream(side)
            del y
            assert bool(cuda.freed) == (not keep)


def test_pinned_memory_is_read_once_it_was_waited_for(cuda):
    x = cuda.cuda(torch.randn(3))
    pinned = torch.empty(3, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    with pytest.raises(AssertionError, match="another stream's use"):
        pinned.clone()
    event = torch.cuda.current_stream().record_event()
    assert not cuda.waits
    event.synchronize()
    assert torch.equal(pinned.clone(), x.inner)
    with pytest.raises(AssertionError, match="to pageable"):
        torch.empty(3).copy_(x, non_blocking=True)


@pytest.mark.parametrize("fault", [None, "order", "event", "promise"])
def test_faults_in_the_copies_of_a_build(cuda, monkeypatch, fault):
    transport = offload.PinnedTransport(torch.device("cuda:0"), slots=2)
    if fault == "order":
        monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda *_: None)
    if fault == "event":
        monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _: None)
    if fault == "promise":
        monkeypatch.setattr(type(cuda.cuda(torch.ones(1))), "record_stream", lambda *_: None)

    def run():
        for _ in range(3):
            column = cuda.cuda(torch.ones(4)) * 2
            token = transport.start({"x": column})
            del column
            assert torch.equal(transport.finish(token)["x"], torch.full((4,), 2.0))

    if fault in ("order", "event"):
        with pytest.raises(AssertionError, match="another stream's use"):
            run()
    else:
        run()
    assert bool(cuda.freed) == (fault == "promise")
    cuda.freed.clear()


def test_a_capture_is_run_again_and_may_not_wait(cuda):
    x, graph = cuda.cuda(torch.ones(3)), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        y = (x + 1).relu()
        with pytest.raises(AssertionError, match="the host waits in a capture"):
            y.sum().item()
    torch.cuda.current_stream().wait_stream(stream)
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [5, 5, 5]


def test_interpreted_kernels_give_the_same(monkeypatch):
    with PretendCuda(monkeypatch, interpreted=True) as cuda:
        x = torch.randn(2, 20)
        channels, weights = ops.top_m(cuda.cuda(x), 3)
        wanted = ops.top_m(x, 3)
        assert torch.equal(channels.cpu(), wanted[0])
        assert torch.equal(weights.cpu(), wanted[1])
