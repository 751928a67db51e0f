"""What follows from a declaration: torch.ops.gcfast, compiled and exported graphs, signatures."""

import importlib
import inspect

import pytest
import torch

from gcfast import ops, reference
from gcfast.ops._operation import OPERATIONS


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
        (
            *(torch.randn(2, 3, 4), torch.randn(4, 5), None),
            *(torch.randn(2, 4), torch.rand(2) + 1, torch.rand(2, 5)),
        ),
        {"pixels": 4, "method": "gradcam++", "precision": "tf32"},
    ),
    "top_m": lambda: ((torch.randn(2, 7), 4), {}),
    "sparse_cam": lambda: (
        (torch.randn(2, 5, 3, 4), _ids(2, 1, high=6), _ids(6, 3, high=5), torch.randn(6, 3)),
        {"size": [7, 5]},
    ),
    "dense_cam": lambda: ((torch.randn(2, 5, 3, 4), torch.randn(2, 5)), {"size": [7, 5]}),
    "knn": lambda: ((torch.randn(3, 4), torch.randn(9, 4), 2), {}),
    "refine": lambda: ((torch.rand(2, 2, 3), torch.randn(2, 5, 4, 6)), {}),
    "sample_triplets": lambda: (_labelled(), {"triplets": 4, "margin": 0.2}),
    "mean_cotangents": lambda: (_labelled(), {"margin": 0.2}),
}


def _call(name, device="cpu"):
    """The registered operation, arguments and keywords."""
    args, kwargs = CALLS[name]()
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    return getattr(torch.ops.gcfast, name), args, kwargs


def _public(name):
    """The public operation, arguments and keywords: tensors after the star by their names."""
    registered, args, kwargs = _call(name)
    operation = getattr(ops, name)
    count = len(_declared(operation)[0])
    names = [a.name for a in registered.default._schema.arguments]
    later = dict(zip(names[count:], args[count:], strict=False))
    return operation, args[:count], {**later, **kwargs}


def _assert_equal(got, wanted):
    for one, other in zip(_listed(got), _listed(wanted), strict=True):
        assert torch.equal(one, other)


def _listed(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


each = pytest.mark.parametrize("name", OPERATIONS)


@each
def test_registered_as_torch_says(name):
    operation, args, kwargs = _call(name)
    torch.library.opcheck(operation.default, args, kwargs)


@each
def test_kernels_are_registered_as_torch_says(name, device):
    operation, args, kwargs = _call(name, device)
    torch.library.opcheck(operation.default, args, {**kwargs, "backend": "triton"})


@each
def test_strides_of_results_do_not_follow_those_of_inputs(name):
    operation, args, kwargs = _call(name)
    # Columns first: a fake like its input would be so too, and compiled code would rely on it.
    turned = [a.mT.contiguous().mT if torch.is_tensor(a) and a.ndim > 1 else a for a in args]
    torch.library.opcheck(operation.default, turned, kwargs)


@each
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_node_of_a_compiled_graph(name, backend):
    torch.compiler.reset()  # all operations are one call to it, whose graphs it limits
    operation, args, kwargs = _call(name)
    compiled = torch.compile(operation, fullgraph=True, backend=backend)
    _assert_equal(compiled(*args, **kwargs), operation(*args, **kwargs))


@each
def test_the_public_name_compiles_too(name):
    torch.compiler.reset()  # as above
    operation, args, kwargs = _public(name)

    def twice_the_first(first, *rest):
        out = operation(2 * first, *rest, **kwargs)
        return type(out), [part + 1 for part in _listed(out)]

    compiled = torch.compile(twice_the_first, fullgraph=True, backend="aot_eager")
    (kind, got), (wanted_kind, wanted) = compiled(*args), twice_the_first(*args)
    assert kind is wanted_kind
    _assert_equal(got, wanted)


@each
def test_exported_for_any_batch(name):
    operation, args, kwargs = _call(name)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return operation(*args, **kwargs)

    count = len(args[0])
    batch = torch.export.Dim("B", min=1)
    is_batched = [torch.is_tensor(a) and len(a) == count for a in args]
    dims = tuple({0: batch} if batched else None for batched in is_batched)
    program = torch.export.export(Module(), tuple(args), dynamic_shapes={"args": dims})
    more = [torch.cat([a, a, a]) if b else a for a, b in zip(args, is_batched, strict=True)]
    _assert_equal(program.module()(*more), operation(*more, **kwargs))


@each
def test_autocast_does_not_reach_registered_operations(name):
    operation, args, kwargs = _call(name)
    wanted = operation(*args, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        _assert_equal(operation(*args, **kwargs), wanted)


@each
def test_autocast_and_gradients_do_not_reach_public_operations(name):
    operation, args, kwargs = _public(name)
    wanted = operation(*args, **kwargs)
    for tensor in args:
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = operation(*args, **kwargs)
    _assert_equal(got, wanted)
    assert not any(part.requires_grad for part in _listed(got))


@each
def test_reference_and_kernel_take_the_declared_arguments(name):
    positional, keywords = _declared(getattr(ops, name))
    assert keywords.pop("backend") == "auto"
    assert _declared(getattr(reference, name)) == (positional, keywords)
    launcher = getattr(importlib.import_module(f"gcfast.kernels.{name}"), f"launch_{name}")
    assert _declared(launcher) == (positional, {**keywords, "config": None})


def _declared(function):
    """Names and defaults of positional and of keyword-only parameters."""
    kinds = ({}, {})
    for parameter in inspect.signature(function).parameters.values():
        kinds[parameter.kind is parameter.KEYWORD_ONLY][parameter.name] = parameter.default
    return kinds


def test_every_operation_is_public():
    assert sorted(OPERATIONS) == sorted(set(ops.__all__) - {"METHODS", "Triplets"})


def test_schemas_of_exported_explainers():
    # Programs that users have exported hold these.
    assert str(torch.ops.gcfast.knn.default._schema) == (
        "gcfast::knn(Tensor queries, Tensor table, SymInt k, Tensor? squares=None, *, "
        'str metric="l2", str backend="auto") -> (Tensor, Tensor)'
    )
    assert str(torch.ops.gcfast.sparse_cam.default._schema) == (
        "gcfast::sparse_cam(Tensor activations, Tensor neighbors, Tensor channels, Tensor weights, "
        "Tensor? mixing=None, Tensor? offsets=None, *, SymInt[] size, float center=0., "
        'bool relu=True, str? normalize="max", SymInt[]? grid=None, ScalarType dtype=6, '
        'str backend="auto") -> Tensor'
    )


def test_documented_as_what_it_returns():
    assert inspect.signature(ops.sample_triplets).return_annotation is ops.Triplets
    assert inspect.signature(ops.top_m).return_annotation == tuple[torch.Tensor, torch.Tensor]


def test_registered_operations_check_shapes_and_not_ids(device):
    activations = torch.ones((1, 2, 3, 3), device=device)
    rows = torch.zeros((1, 1), dtype=torch.int64, device=device)
    ones = activations[0, 0, :2, :2]
    with pytest.raises(ValueError, match=r"`weights` must have shape \[N, M\]"):
        torch.ops.gcfast.sparse_cam(activations, rows, rows, ones, size=[3, 3])
    outside = (activations, rows + 1, rows, ones[:1, :1])
    maps = torch.ops.gcfast.sparse_cam(*outside, size=[3, 3], backend="triton")
    assert not maps.any()
    with pytest.raises(ValueError, match=r"`neighbors` must lie in \[-1, 1\), got 1 to 1"):
        ops.sparse_cam(*outside, size=(3, 3))
