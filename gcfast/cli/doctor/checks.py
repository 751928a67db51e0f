"""What ``gcfast doctor`` tries: each check a function that says what it found, or raises."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gcfast
from gcfast import ops, reference
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network

LAYER = "features"
CLASSES, PICTURES, ROUNDS = 5, 4, 7
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}  # of maps in [0, 1]; a GPU may multiply in TF32


class AbsentError(Exception):
    """What a check is of is not installed, or not in this machine."""


class Result(NamedTuple):
    """What a check found.

    ``status`` is "ok", "absent" or "failed"; ``detail`` says it in words, ``figures`` in numbers.
    """

    name: str
    status: str
    detail: str
    figures: dict[str, float]
    seconds: float


Found = tuple[str, dict[str, float]]


def run_all() -> Iterator[Result]:
    """Run every check, and yield what it found; an exception fails its own check alone."""
    for name, check in CHECKS.items():
        began = time.perf_counter()
        figures: dict[str, float] = {}
        try:
            detail, figures = check()
            status = "ok"
        except AbsentError as absent:
            status, detail = "absent", str(absent)
        except Exception as error:  # whatever a broken installation raises
            status, detail = "failed", in_a_line(error)
        yield Result(name, status, detail, figures, round(time.perf_counter() - began, 2))


def in_a_line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _pictures(seed: int, each: int) -> list[Tensor]:
    return [
        as_batch([draw_bird(label, seed=seed, index=i) for i in range(each)])
        for label in range(CLASSES)
    ]


@functools.cache
def _explainer(device: torch.device, **settings: Any) -> gcfast.Explainer:
    explainer = gcfast.Explainer(load_network().to(device), LAYER, **settings)
    explainer.build([(images, [y] * PICTURES) for y, images in enumerate(_pictures(0, PICTURES))])
    return explainer


def _queries(device: torch.device) -> Tensor:
    return torch.cat(_pictures(1, 2)).to(device)


def _difference(maps: Tensor, wanted: Tensor, what: str) -> float:
    """The largest difference of maps.

    Raises:
        ArithmeticError: it is beyond TOLERANCE.
    """
    worst = float((maps.cpu() - wanted.cpu()).abs().max())
    if not worst <= TOLERANCE[maps.device.type]:
        raise ArithmeticError(f"maps differ from {what} by {worst:.2g}")
    return worst


def compiled() -> Found:
    """The C++ module."""
    from gcfast import _core

    return f"{Path(_core.__file__).name} loads", {}


def build_and_explain() -> Found:
    """A build and maps on each kind of device, against a plain forward pass and a dense sum."""
    figures: dict[str, float] = {}
    for kind in dict.fromkeys(("cpu", _device().type)):
        device = torch.device(kind)
        explainer, images = _explainer(device), _queries(device)
        database = explainer.database
        assert database is not None
        network = load_network().to(device)
        with torch.no_grad():
            activations, embeddings = network.feature_maps(images), network(images)
        rows = torch.cdist(embeddings.double().cpu(), database.embeddings.double()).argmin(1)
        weights = torch.zeros(len(images), activations.shape[1])
        weights.scatter_(1, database.channels[rows], database.weights[rows])
        size = (images.shape[2], images.shape[3])
        wanted = reference.dense_cam(activations.cpu(), weights, size=size)
        found = explainer.explain_batch(images, details=True)
        if not torch.equal(found.neighbors[:, 0].cpu(), rows):
            raise ArithmeticError("the nearest rows are not the nearest")
        figures[f"map_difference_{kind}"] = _difference(found.maps, wanted, "the reference")
    worst = ", ".join(f"{name.split('_')[-1]} {value:.1e}" for name, value in figures.items())
    return f"maps equal the reference ({worst})", figures


def speed() -> Found:
    """explain_batch against the model's own forward pass, in pairs."""
    device = _device()
    explainer, images = _explainer(device), _queries(device)
    model = load_network().to(device)

    def seconds(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    ratios, rates = [], []
    with torch.inference_mode():
        for number in range(ROUNDS + 3):
            ours = seconds(lambda: explainer.explain_batch(images))
            theirs = seconds(lambda: model(images))
            if number >= 3:  # the first ones choose algorithms, and capture graphs
                ratios.append(ours / theirs)
                rates.append(len(images) / ours)
    ratio, rate = statistics.median(ratios), statistics.median(rates)
    text = f"explain_batch takes {ratio:.2f} times the forward pass, {rate:.0f} pictures a second"
    return f"{text} ({device.type})", {"explain_to_forward": ratio, "pictures_per_second": rate}


def kernels() -> Found:
    """The Triton kernels of search and maps on the GPU, against their specification."""
    device = _gpu()
    if find_spec("triton") is None:
        raise AbsentError("Triton is not installed: pip install 'gcfast[gpu]'")
    generator = torch.Generator().manual_seed(0)
    queries, table = (torch.randn(n, 64, generator=generator) for n in (8, 5000))
    wanted = reference.knn(queries, table, 3)
    got = ops.knn(queries.to(device), table.to(device), 3, backend="triton")
    if not torch.equal(got[1].cpu(), wanted[1]):
        raise ArithmeticError("knn finds other rows than its specification")
    activations = torch.rand(8, 32, 7, 7, generator=generator)
    weights = torch.randn(8, 32, generator=generator)
    maps = ops.dense_cam(
        activations.to(device), weights.to(device), size=(56, 56), backend="triton"
    )
    worst = _difference(maps, reference.dense_cam(activations, weights, size=(56, 56)), "reference")
    return f"knn and dense_cam equal their specification ({worst:.1e})", {"map_difference": worst}


def cuda_graphs() -> Found:
    """Maps by a captured graph against those without."""
    device = _gpu()
    images = _queries(device)
    wanted = _explainer(device, cuda_graphs=False).explain_batch(images)
    graphed = _explainer(device, cuda_graphs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of what cannot be captured, and runs plain
        graphed.explain_batch(images)
    worst = _difference(graphed.explain_batch(images), wanted, "those without a graph")
    return f"replayed maps are those without a graph ({worst:.1e})", {"map_difference": worst}


def faiss_search() -> Found:
    """An index on the CPU, and on the GPU where FAISS is built for that, against exact search."""
    if find_spec("faiss") is None:
        raise AbsentError("FAISS is not installed: pip install 'gcfast[cpu]' (or 'gcfast[gpu]')")
    import faiss

    device = torch.device("cpu")
    images = _queries(device)
    exact = _explainer(device)
    assert exact.database is not None
    model = exact.network.model
    wanted = exact.explain_batch(images, details=True)
    index = gcfast.Explainer(model, database=exact.database, index="Flat")
    found = index.explain_batch(images, details=True)
    if not torch.equal(found.neighbors, wanted.neighbors):
        raise ArithmeticError("a flat index finds other rows than exact search")
    if not hasattr(faiss, "StandardGpuResources"):
        return f"FAISS {faiss.__version__}: CPU, finds the same rows (built without GPUs)", {}
    if not torch.cuda.is_available():
        return f"FAISS {faiss.__version__}: CPU, finds the same rows; no GPU for its other half", {}
    table = exact.database.embeddings.float().numpy()
    flat = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), table.shape[1])
    flat.add(table)
    rows = torch.from_numpy(flat.search(wanted.embeddings.numpy(), 1)[1])
    sm = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if not torch.equal(rows, wanted.neighbors):
        raise ArithmeticError(f"a GPU index finds other rows than exact search ({sm})")
    return f"FAISS {faiss.__version__}: CPU and GPU ({sm}) find the same rows", {}


def onnx_runtime() -> Found:
    """An exported graph in ONNX Runtime against explain_batch."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(name) is None:
            raise AbsentError(f"{name} is not installed: pip install 'gcfast[onnx]'")
    import onnxruntime

    device = torch.device("cpu")
    explainer, images = _explainer(device), _queries(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doctor.onnx"
        explainer.export_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (maps,) = session.run(["maps"], {"images": images.numpy()})
    worst = _difference(torch.from_numpy(maps), explainer.explain_batch(images), "explain_batch")
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in session.get_providers())
    text = f"ONNX Runtime {onnxruntime.__version__} ({providers}): maps equal explain_batch's"
    return f"{text} ({worst:.1e})", {"map_difference": worst}


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        if torch.cuda.device_count():  # its driver is there
            torch.cuda.init()  # type: ignore[no-untyped-call] # raises, and says why
        raise AbsentError("no CUDA device, or a PyTorch without CUDA")
    return torch.device("cuda")


CHECKS: dict[str, Callable[[], Found]] = {
    "compiled module": compiled,
    "build and explain": build_and_explain,
    "speed": speed,
    "kernels": kernels,
    "CUDA graphs": cuda_graphs,
    "FAISS": faiss_search,
    "ONNX": onnx_runtime,
}
