"""Which backend runs, and what import costs."""

import subprocess
import sys

import pytest
import torch

from gcfast import ops
from gcfast.errors import MissingExtraError
from gcfast.kernels import top_m
from gcfast.ops import _operation


def test_import_loads_neither_triton_nor_faiss():
    program = (
        "import sys, gcfast, torch; torch.ops.gcfast.top_m; "
        "print([m for m in ('triton', 'faiss', 'gcfast.kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_cpu_takes_the_reference():
    tensor = torch.ones(2)
    assert not _operation.uses_triton("auto", tensor, [tensor])
    assert not _operation.uses_triton("reference", tensor, [tensor])


def test_a_gpu_takes_triton_unless_something_is_float64():
    class OnGpu(torch.Tensor):
        is_cuda = True

    tensor = torch.ones(2).as_subclass(OnGpu)
    assert _operation.uses_triton("auto", tensor, [tensor, None])
    assert not _operation.uses_triton("auto", tensor, [tensor, torch.ones(2).double()])


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(_operation, "triton_installed", lambda: False)
    tensor = torch.ones(2).as_subclass(OnGpu)
    assert not _operation.uses_triton("auto", tensor, [tensor])


def test_triton_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(_operation, "triton_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"Triton, which is not installed: .*gcfast\[gpu\]"):
        ops.top_m(torch.ones(1, 2), 1, backend="triton")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(_operation, "_interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"tensors on cpu, got 'triton': .* TRITON_INTERPRET=1"):
        ops.top_m(torch.ones(1, 2), 1, backend="triton")


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="`backend` must be 'auto' or 'reference' for float64"):
        ops.top_m(torch.ones(1, 2).double(), 1, backend="triton")


@pytest.mark.parametrize(("B", "N"), [(0, 3), (2, 0), (0, 0)])
def test_operations_on_nothing_launch_no_empty_grid(B, N, device, monkeypatch):
    kernels = type(top_m._top_m_kernel)
    run = kernels.run

    def launched(kernel, *args, grid, **kwargs):
        assert all(size > 0 for size in grid), f"{kernel}: an empty grid {grid}"
        return run(kernel, *args, grid=grid, **kwargs)

    monkeypatch.setattr(kernels, "run", launched)

    def made(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    on_triton = {"backend": "triton"}
    ids = [made(size, dtype=torch.int64) for size in (B, B, N)]
    _, rows = ops.knn(made(B, 4), made(N, 4), 2, **on_triton)
    assert rows.shape == (B, 2)
    assert ops.top_m(made(B, 5), 3, **on_triton)[0].shape == (B, 3)
    gradients, valid = made(B, N, 5, 2, 2), made(B, N, dtype=torch.bool)
    for method in ops.METHODS:
        more = {"method": method, "activations": made(B, 5, 2, 2)}
        assert not ops.grad_weights(gradients, valid, **more, **on_triton).any()
        more = {"method": method, "activation_sums": made(B, 5), "pixels": 4}
        got = ops.head_grad_weights(made(B, N, 4), made(4, 5), valid, **more, **on_triton)
        assert not got.any()
    anchors = (made(B, 4), *ids[:2], made(N, 4), ids[2])
    drawn = ops.sample_triplets(*anchors, triplets=3, margin=0.1, **on_triton)
    assert drawn.positives.shape == (B, 3)
    assert ops.mean_cotangents(*anchors, margin=0.1, **on_triton)[0].shape == (B, 4)
    table = made(N, 2, dtype=torch.int64), made(N, 2)
    found = rows[:, :1].clamp(max=N - 1)
    maps = ops.sparse_cam(made(B, 5, 2, 2), found, *table, size=(3, 3), **on_triton)
    assert maps.shape == (B, 3, 3)
    assert ops.refine(maps, made(B, 5, 6, 6), **on_triton).shape == (B, 6, 6)
