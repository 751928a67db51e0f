"""The operations of the GPU benchmark: inputs, ours, what it is compared with, and that they agree.

The first side of each operation is the kernel, called as the explainer calls it: without the checks
of values, which would wait for the device. The others are the reference in eager PyTorch and under
``torch.compile``, and what PyTorch or FAISS have that comes nearest. Nothing is timed before its
result agreed with the reference's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import CASES, IMAGE, Case, copies, selected
from gpu_runner import Context, Row, failed, importable, measured
from torch import Tensor

from gcfast import ops, reference

USABLE = 0.9  # of a card's memory: the context and the allocator's gaps take the rest
FAISS_BYTES = 6 * 10**9  # a larger table takes longer to copy to the host and back than to search
LONG_FLOPS = 10**12
DATABASE_ROWS = 10_000  # of the table that sparse_cam reads
CLASSES = 100
MARGIN = 0.2
# Largest difference from the reference, relative to the largest value, that is taken for agreement.
AGREEMENT = {"float32": 1e-4, "tf32": 3e-3, "bfloat16": 1e-2, "float16": 1e-2, "uint8": 1.01 / 255}
Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]


class Side(NamedTuple):
    """One way to do an operation."""

    name: str
    run: Run
    graph: bool = True  # it can be captured: nothing in it waits for the device
    when: Callable[[Case], bool] = lambda case: True  # noqa: ARG005
    prepare: Callable[[Inputs], Inputs] | None = None  # not timed: an index, say
    working: Callable[[Case], int] = lambda case: 0  # noqa: ARG005 - bytes beside the inputs


class Operation(NamedTuple):
    """An operation's inputs and its sides: ours first, then what every result must agree with."""

    inputs: Callable[[Case, torch.device], Inputs]
    call: Callable[[Callable[..., Any], Inputs], Any]  # a function of the operation's signature
    sides: list[Side]
    compare: Callable[[Any, Any], float]  # difference from the wanted result

    def wanted(self, inputs: Inputs) -> Any:
        """The result of the second side, which is the reference or C++'s."""
        side = self.sides[1]
        with torch.no_grad():
            return side.run(inputs if side.prepare is None else side.prepare(inputs))


def run_operation(name: str, context: Context, *, quick: bool | None = None) -> Iterator[Row]:
    """The cases of an operation that the card has room for, every side of each.

    Args:
        name: of the operation.
        context: of the run.
        quick: only the quick cases, only the others, or all.
    """
    run, left = selected(name, quick=quick, memory_bytes=context.memory_bytes)
    operation = OPERATIONS[name]
    # First, so that a run which is cut short names them too.
    yield from ({"case": "left out", "side": name, "text": reason} for reason in left)
    for case in run:
        torch.manual_seed(0)
        count = copies(case, context.l2_bytes, context.memory_bytes)
        try:
            sets = [operation.inputs(case, context.device) for _ in range(count)]
            wanted = operation.wanted(sets[0])
        except Exception as error:  # out of memory, as a rule: the next case may be smaller
            yield failed(case.name, "reference", error)
            continue
        for side in operation.sides:
            if not side.when(case):
                continue
            reason = no_room(case, side, count, context.memory_bytes)
            if reason:
                yield {"case": case.name, "side": side.name, "text": f"left out: {reason}"}
                continue
            try:
                with torch.no_grad():
                    yield from _timed(case, operation, side, sets, wanted, context)
            except Exception as error:  # a baseline that fails must not take ours with it
                yield failed(case.name, side.name, error)
        del sets, wanted
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def no_room(case: Case, side: Side, sets: int, memory_bytes: int) -> str:
    """Why a side does not fit beside so many sets of inputs; "" where it does."""
    needed = side.working(case) * (sets if side.prepare is not None else 1)
    room = int(USABLE * memory_bytes) - sets * case.inputs
    if needed <= room:
        return ""
    return f"{needed / 1e9:.1f} GB beside the inputs, {room / 1e9:.1f} GB are free"


def _timed(
    case: Case, operation: Operation, side: Side, sets: list[Inputs], wanted: Any, context: Context
) -> Iterator[Row]:
    prepared = sets if side.prepare is None else [side.prepare(s) for s in sets]
    difference = operation.compare(side.run(prepared[0]), wanted)
    allowed = AGREEMENT[_coarsest(case)]
    if not difference <= allowed:
        raise AssertionError(f"differs from the reference by {difference:.1e}, above {allowed:.0e}")
    taken = context.measure([functools.partial(side.run, s) for s in prepared], graph=side.graph)
    yield {**measured(case, side.name, taken, context.rates), "difference": difference}


def _coarsest(case: Case) -> str:
    if "uint8" in case.name:
        return "uint8"
    return "tf32" if case.rate == "tf32" else case.dtype


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; NaN stays NaN and fails."""
    got, wanted = got.float(), wanted.float()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def first_relative(got: Any, wanted: Any) -> float:
    """As ``relative``, of distances: ids may differ between rows as near as rounding."""
    return relative(got[0], wanted[0])


def kept_values(got: Any, wanted: Any) -> float:
    """The difference of the values kept, (channels, weights) in both."""
    return relative(got[1], wanted[1])


def same_draws(got: Any, wanted: Any) -> float:
    """0 where every draw is the same one, infinity elsewhere."""
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))
    return 0.0 if same else float("inf")


@functools.lru_cache(maxsize=1)
def _database(C: int, M: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One for all sets of inputs: an image reads one row of it, drawn anew for each set."""
    channels = torch.rand(DATABASE_ROWS, C, device=device).topk(M, dim=1).indices
    return channels, torch.randn(DATABASE_ROWS, M, device=device)


def _cam_inputs(case: Case, device: torch.device) -> Inputs:
    B, C, H, W, M = (case.sizes[letter] for letter in "BCHWM")
    activations = torch.rand(B, C, H, W, device=device, dtype=case.torch_dtype())
    if case.options["layout"] == "channels last":
        activations = activations.contiguous(memory_format=torch.channels_last)
    channels, weights = _database(C, M, device)
    return {
        "activations": activations,
        "neighbors": torch.randint(DATABASE_ROWS, (B, 1), device=device),
        "channels": channels,
        "weights": weights,
        "out": torch.uint8 if "uint8" in case.options["out"] else torch.float32,
    }


def _cam(run: Callable[..., Tensor], s: Inputs) -> Tensor:
    arguments = (s["activations"], s["neighbors"], s["channels"], s["weights"])
    return run(*arguments, size=IMAGE, dtype=s["out"])


def _interpolate(s: Inputs) -> Tensor:
    return F.interpolate(s["low"], size=IMAGE, mode="bilinear", align_corners=False)[:, 0]


def _low_maps(s: Inputs) -> Inputs:
    size = tuple(s["activations"].shape[2:])
    maps = reference.sparse_cam(
        s["activations"], s["neighbors"], s["channels"], s["weights"], size=size
    )
    return {"low": maps[:, None]}


def _dense_inputs(case: Case, device: torch.device) -> Inputs:
    B, C, H, W = (case.sizes[letter] for letter in "BCHW")
    activations = torch.rand(B, C, H, W, device=device, dtype=case.torch_dtype())
    if case.options["layout"] == "channels last":
        activations = activations.contiguous(memory_format=torch.channels_last)
    return {"activations": activations, "weights": torch.randn(B, C, device=device)}


def _dense(run: Callable[..., Tensor], s: Inputs) -> Tensor:
    return run(s["activations"], s["weights"], size=IMAGE)


def _grad_inputs(case: Case, device: torch.device) -> Inputs:
    B, T, C, H, W = (case.sizes[letter] for letter in "BTCHW")
    last = case.options["layout"] == "channels last"
    dtype = case.torch_dtype()
    shape = (B, T, H, W, C) if last else (B, T, C, H, W)
    gradients = torch.randn(shape, device=device, dtype=dtype)
    maps = torch.rand((B, *shape[2:]), device=device, dtype=dtype)
    return {
        "gradients": gradients.permute(0, 1, 4, 2, 3) if last else gradients,
        "valid": torch.ones(B, T, dtype=torch.bool, device=device),
        "activations": maps.permute(0, 3, 1, 2) if last else maps,
        "method": case.options["method"],
    }


def _grad(run: Callable[..., Tensor], s: Inputs) -> Tensor:
    return run(s["gradients"], s["valid"], activations=s["activations"], method=s["method"])


def _head_inputs(case: Case, device: torch.device) -> Inputs:
    B, T, D, C = (case.sizes[letter] for letter in "BTDC")
    return {
        "cotangents": torch.randn(B, T, D, device=device),
        "weight": torch.randn(D, C, device=device) / D**0.5,
        "valid": torch.rand(B, T, device=device) < 0.9,
        "pixels": 49,
        "embeddings": F.normalize(torch.randn(B, D, device=device), dim=1),
        "norms": torch.rand(B, device=device) + 0.5,
        "activation_sums": 49 * torch.rand(B, C, device=device),
        "method": case.options["method"],
        "precision": case.options["precision"],
    }


def _head(run: Callable[..., Tensor], s: Inputs) -> Tensor:
    return run(**{name: value for name, value in s.items() if name != "precision"})


def _head_kernel(s: Inputs) -> Tensor:
    return ops.head_grad_weights.trusted(**s)


def _top_inputs(case: Case, device: torch.device) -> Inputs:
    weights = torch.randn(case.sizes["B"], case.sizes["C"], device=device)
    return {"weights": weights, "m": case.sizes["M"]}


def _torch_topk(s: Inputs) -> tuple[Tensor, Tensor]:
    values, ids = s["weights"].topk(s["m"], dim=1)
    return ids, values


def _knn_inputs(case: Case, device: torch.device) -> Inputs:
    B, N, D, K = (case.sizes[letter] for letter in "BNDK")
    dtype = case.torch_dtype()
    table = F.normalize(torch.randn(N, D, device=device), dim=1).to(dtype)
    queries = F.normalize(torch.randn(B, D, device=device), dim=1).to(dtype)
    squares = torch.cat([part.float().square().sum(1) for part in table.split(2**20)])
    return {"queries": queries, "table": table, "k": K, "squares": squares}


def _knn(run: Callable[..., Any], s: Inputs) -> Any:
    return run(s["queries"], s["table"], s["k"], squares=s["squares"])


def _matmul_topk(s: Inputs) -> tuple[Tensor, Tensor]:
    """|q|² + |t|² − 2⟨q, t⟩, all B × N of it."""
    queries, table = s["queries"], s["table"]
    products = (queries @ table.T).float()
    squares = queries.float().square().sum(1, keepdim=True)
    distances = torch.add(s["squares"], products, alpha=-2).add_(squares)
    values, ids = distances.topk(s["k"], largest=False)
    return values, ids


def _all_products(case: Case) -> int:
    """The products in the table's dtype, in float32, and the distances."""
    return 3 * 4 * case.sizes["B"] * case.sizes["N"]


@functools.cache
def _faiss_resources(device: int) -> Any:
    """FAISS's streams and scratch memory, once: they are slow to make and take 1.5 GiB unbidden."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(512 * 2**20)
    cast = faiss.cast_integer_to_cudastream_t  # type: ignore[attr-defined]  # of GPU builds alone
    stream = cast(torch.cuda.current_stream().cuda_stream)
    resources.setDefaultStream(device, stream)
    return resources


def _faiss_index(s: Inputs) -> Inputs:
    """A flat index on the GPU that holds the table, and buffers for what it finds."""
    import faiss

    device = s["queries"].device
    resources = _faiss_resources(device.index or 0)
    config = faiss.GpuIndexFlatConfig()
    config.device = device.index or 0
    index = faiss.GpuIndexFlatL2(resources, s["table"].shape[1], config)
    index.add(s["table"].float().cpu().numpy())
    B, K = len(s["queries"]), s["k"]
    found = torch.empty(B, K, device=device), torch.empty(B, K, device=device, dtype=torch.int64)
    return {**s, "index": index, "found": found}


def _faiss_search(s: Inputs) -> Any:
    import faiss

    queries, (distances, ids) = s["queries"], s["found"]
    s["index"].search_c(
        len(queries),
        faiss.cast_integer_to_float_ptr(queries.data_ptr()),
        s["k"],
        faiss.cast_integer_to_float_ptr(distances.data_ptr()),
        faiss.cast_integer_to_idx_t_ptr(ids.data_ptr()),
    )
    return distances, ids


def _has_gpu_faiss(case: Case) -> bool:
    if case.dtype != "float32" or case.inputs > FAISS_BYTES or not importable("faiss"):
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources")


def _triplet_inputs(case: Case, device: torch.device) -> Inputs:
    B, N, D, T = (case.sizes[letter] for letter in "BNDT")
    labels = torch.randint(CLASSES, (N,), device=device)
    centres = torch.randn(CLASSES, D, device=device)
    table = F.normalize(centres[labels] + torch.randn(N, D, device=device), dim=1)
    rows = torch.randperm(N, device=device)[:B]
    order = reference.label_order(labels)
    tensors = (table[rows], labels[rows], rows, table, labels, order)
    return {"tensors": tensors, "triplets": T}


def _draw(run: Callable[..., Any], s: Inputs) -> Any:
    return run(*s["tensors"], triplets=s["triplets"], margin=MARGIN)


def _on_cpu(s: Inputs) -> Inputs:
    return {**s, "tensors": tuple(t.cpu() for t in s["tensors"])}


def _first(case: Case) -> bool:
    """The first case of its operation: torch.compile takes longer than all that is timed of it."""
    return case.quick and case == CASES[case.operation][0]


def _short(case: Case) -> bool:
    """Short enough for what is slow to be timed, and not only run once to compare with."""
    return case.flops <= LONG_FLOPS


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _three(call: Callable[[Callable[..., Any], Inputs], Any], name: str) -> list[Side]:
    """The kernel, the reference, and the reference compiled, for the operation's first case."""
    kernel, plain = getattr(ops, name).trusted, getattr(reference, name)
    return [
        Side("gcfast", functools.partial(call, kernel)),
        Side("reference", functools.partial(call, plain), when=_short),
        Side("reference, torch.compile", lambda s: call(_compiled(plain), s), when=_first),
    ]


def _top(run: Callable[..., Any], s: Inputs) -> Any:
    return run(s["weights"], s["m"])


OPERATIONS = {
    "sparse_cam": Operation(
        _cam_inputs,
        _cam,
        [
            *_three(_cam, "sparse_cam"),
            Side(
                "F.interpolate alone",
                _interpolate,
                when=lambda case: "uint8" not in case.name,
                prepare=_low_maps,
            ),
        ],
        relative,
    ),
    "dense_cam": Operation(_dense_inputs, _dense, _three(_dense, "dense_cam"), relative),
    "grad_weights": Operation(_grad_inputs, _grad, _three(_grad, "grad_weights"), relative),
    "head_grad_weights": Operation(
        _head_inputs,
        _head,
        [Side("gcfast", _head_kernel), *_three(_head, "head_grad_weights")[1:]],
        relative,
    ),
    "top_m": Operation(
        _top_inputs, _top, [*_three(_top, "top_m"), Side("torch.topk", _torch_topk)], kept_values
    ),
    "knn": Operation(
        _knn_inputs,
        _knn,
        [
            *_three(_knn, "knn")[:2],
            Side("matmul + topk", _matmul_topk, working=_all_products),
            Side(
                "matmul + topk, torch.compile",
                lambda s: _compiled(_matmul_topk)(s),
                when=_first,
                working=_all_products,
            ),
            Side(
                "FAISS, flat on the GPU",
                _faiss_search,
                False,
                _has_gpu_faiss,
                _faiss_index,
                working=lambda case: case.inputs,
            ),
        ],
        first_relative,
    ),
    "sample_triplets": Operation(
        _triplet_inputs,
        _draw,
        [
            Side("gcfast", functools.partial(_draw, ops.sample_triplets.trusted)),
            Side(
                "C++ on the CPU",
                functools.partial(_draw, ops.sample_triplets.trusted),
                False,
                prepare=_on_cpu,
            ),
        ],
        same_draws,
    ),
}
