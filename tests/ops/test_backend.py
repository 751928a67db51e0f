"""Which backend runs, what import costs, and the operations as torch.ops.gcfast."""

import subprocess
import sys

import pytest
import torch

from gcfast import ops
from gcfast.errors import MissingExtraError
from gcfast.kernels import top_m
from gcfast.ops import backend


def test_import_loads_neither_triton_nor_faiss():
    program = (
        "import sys, gcfast, torch; torch.ops.gcfast.top_m; "
        "print([m for m in ('triton', 'faiss', 'gcfast.kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_cpu_takes_the_reference():
    tensor = torch.ones(2)
    assert not backend.uses_triton("auto", tensor)
    assert not backend.uses_triton("reference", tensor)


def test_a_gpu_takes_triton_unless_something_is_float64():
    class OnGpu(torch.Tensor):
        is_cuda = True

    tensor = torch.ones(2).as_subclass(OnGpu)
    assert backend.uses_triton("auto", tensor, None)
    assert not backend.uses_triton("auto", tensor, torch.ones(2).double())


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    assert not backend.uses_triton("auto", torch.ones(2).as_subclass(OnGpu))


def test_triton_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"Triton, which is not installed: .*gcfast\[gpu\]"):
        ops.top_m(torch.ones(1, 2), 1, backend="triton")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"tensors on cpu, got 'triton': .* TRITON_INTERPRET=1"):
        ops.top_m(torch.ones(1, 2), 1, backend="triton")


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="`backend` must be 'auto' or 'reference' for float64"):
        ops.top_m(torch.ones(1, 2).double(), 1, backend="triton")


def _ids(*shape, high):
    return torch.randint(high, shape)


def _labelled():
    return (torch.randn(3, 4), _ids(3, high=2), torch.arange(3), torch.randn(9, 4), _ids(9, high=2))


CALLS = {
    "grad_weights": lambda: (
        (torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3) > 0.3, torch.rand(2, 4, 2, 2)),
        {"method": "gradcam++"},
    ),
    "head_grad_weights": lambda: (
        (torch.randn(2, 3, 4), torch.randn(4, 5), None, torch.randn(2, 4), torch.rand(2) + 1),
        {"pixels": 4},
    ),
    "top_m": lambda: ((torch.randn(3, 7), 4), {}),
    "sparse_cam": lambda: (
        (torch.randn(2, 5, 3, 4), _ids(2, 1, high=6), _ids(6, 3, high=5), torch.randn(6, 3)),
        {"size": [7, 5]},
    ),
    "knn": lambda: ((torch.randn(3, 4), torch.randn(9, 4), 2), {}),
    "sample_triplets": lambda: (_labelled(), {"triplets": 4, "margin": 0.2}),
    "mean_cotangents": lambda: (_labelled(), {"margin": 0.2}),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_registered_as_torch_says(name):
    args, kwargs = CALLS[name]()
    torch.library.opcheck(getattr(torch.ops.gcfast, name).default, args, kwargs)


@pytest.mark.parametrize("name", ["knn", "mean_cotangents", "sample_triplets"])
def test_kernels_are_registered_as_torch_says(name, device):
    args, kwargs = CALLS[name]()
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    operation = getattr(torch.ops.gcfast, name).default
    torch.library.opcheck(operation, args, {**kwargs, "backend": "triton"})


@pytest.mark.parametrize("name", sorted(CALLS))
def test_strides_of_results_do_not_follow_those_of_inputs(name):
    args, kwargs = CALLS[name]()
    # Columns first: a fake like its input would be so too, and compiled code would rely on it.
    turned = [a.mT.contiguous().mT if torch.is_tensor(a) and a.ndim > 1 else a for a in args]
    torch.library.opcheck(getattr(torch.ops.gcfast, name).default, turned, kwargs)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_one_node_of_a_compiled_graph(name):
    args, kwargs = CALLS[name]()
    operation = getattr(torch.ops.gcfast, name)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        _listed(compiled(*args, **kwargs)), _listed(operation(*args, **kwargs)), strict=True
    ):
        assert torch.equal(got, wanted)


def test_the_public_name_compiles_too():
    weights = torch.randn(3, 7)

    def double_top(weights):
        channels, kept = ops.top_m(2 * weights, 4)
        return channels, kept + 1

    compiled = torch.compile(double_top, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(weights), double_top(weights), strict=True):
        assert torch.equal(got, wanted)


def test_registered_operations_check_shapes_and_not_ids():
    activations, rows = torch.ones(1, 2, 3, 3), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`weights` must have shape \[N, M\]"):
        torch.ops.gcfast.sparse_cam(activations, rows, rows, torch.ones(2, 2), size=[3, 3])


def test_autocast_does_not_reach_registered_operations():
    args, kwargs = CALLS["head_grad_weights"]()
    wanted = torch.ops.gcfast.head_grad_weights(*args, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.gcfast.head_grad_weights(*args, **kwargs), wanted)


def _listed(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


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
