"""Explaining and building on a GPU beside the forward pass and beside the peers.

Ratios are of two sides timed alternately (``paired.paired``), each a few calls and a wait for the
device. "as written" is what a user has without us: ``model(images)`` on contiguous NCHW images.
explain_batch and the forward pass beside it run under ``torch.inference_mode``.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from build_speed import paper_row
from gpu_runner import Context, Row, attempted, importable, timed
from gpu_timing import Timing
from paired import Paired, paired
from peers import PEERS, CosineScore, layer_module, make_torchvision_importable
from subjects import explainer_with_rows, images, loader, network
from torch import Tensor, nn

import gcfast
from gcfast import reference
from gcfast.explain.cuda_graphs import TRIALS, TRIALS_UNTIMED
from gcfast.search.transfer import ExactTransfer

NAME, OTHER = "resnet50", "vit-b16"
TITLES = {"resnet50": "ResNet-50", "vit-b16": "ViT-B/16"}
BATCHES = (1, 4, 16, 64, 256)
# Of explain_batch by the time of model(x), as written: what is aimed at.
GOALS = {
    (NAME, "float32"): {1: "<= .25", 4: "<= .30", 16: "<= .60", 64: "<= .85", 256: "<= .82"},
    (NAME, "bfloat16"): {1: "<= .12", 4: "<= .20", 16: "<= .25", 64: "<= .40", 256: "<= .67"},
}
ROWS = (10_000, 100_000, 1_000_000)
AGREEMENT = 1e-2  # of maps in [0, 1]: two forward passes may round differently
LONG_SECONDS = 1.0
SIDE_SECONDS = 0.03  # of one side between two waits for the device
ROUNDS = 7
BUILD_IMAGES, BUILD_BATCH, BUILD_CLASSES = (64, 256, 1024, 8192), 64, 32
BUILD_DISTINCT = 1024  # images, which come again in larger builds
BUILD_GOALS = {1024: "<= 1.15", 8192: "<= 1.05"}

Explain = Callable[[Tensor], object]


class Subject:
    """A network on the device in one precision, its images and its explainers."""

    def __init__(self, context: Context, dtype: torch.dtype, *, name: str = NAME) -> None:
        model, self.layer = network(name)
        self.model = model.to(context.device, dtype)
        self.device, self.dtype, self.name = context.device, dtype, name
        self.title, self.precision = TITLES[name], str(dtype).removeprefix("torch.")

    def images(self, B: int) -> Tensor:
        return images(B, seed=9).to(self.device, self.dtype)

    def explainer(self, rows: int) -> gcfast.Explainer:
        return explainer_with_rows(self.model, self.layer, rows)

    def forward(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            out = self.model(batch)
        assert isinstance(out, Tensor)
        return out


def last(batch: Tensor) -> Tensor:
    return batch.contiguous(memory_format=torch.channels_last)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    a: Callable[[], object], b: Callable[[], object], device: torch.device, *, rounds: int = ROUNDS
) -> tuple[Paired, int]:
    """(seconds of each side in each round, calls of a side in a round)."""
    start = time.perf_counter()
    a()
    wait(device)
    is_long = time.perf_counter() - start > LONG_SECONDS  # and needs no more warming up
    calls = 1

    def several(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls):
                call()
            wait(device)

        return run

    if not is_long:
        once = paired(several(a), lambda: None, rounds=2, warmup=1).a
        calls = max(1, round(SIDE_SECONDS / min(once)))
    return paired(several(a), several(b), rounds=rounds, warmup=1 if is_long else 2), calls


def pair_rows(
    case: str, names: tuple[str, str], both: Paired, calls: int, goal: str
) -> Iterator[Row]:
    """A row for each side and one for their ratio."""
    for name, seconds in zip(names, (both.a, both.b), strict=True):
        yield timed(case, name, Timing([s / calls for s in seconds], "alternating", calls))
    text = f"{both.ratio:.3f} x {names[1]}" + (f" (goal {goal})" if goal else "")
    yield {
        "case": case,
        "side": f"{names[0]} is",
        "text": text,
        "ratio": both.ratio,
        "ratios": both.ratios,
        "goal": goal,
    }


def check(explainer: gcfast.Explainer, batch: Tensor) -> None:
    """Raise unless what is about to be timed gives the reference's neighbours and maps."""
    with torch.no_grad():
        why = explainer.explain_batch(batch, details=True)
        activations = explainer.network.embed(batch).activations
        transfer = explainer.attach().transfer
        assert isinstance(transfer, ExactTransfer)
        distances, _ = reference.knn(why.embeddings, transfer.search.table, 1)
        torch.testing.assert_close(why.distances, distances, atol=1e-5, rtol=1e-4)
        maps = reference.sparse_cam(
            activations,
            why.neighbors,
            transfer.tables.channels,
            transfer.tables.weights,
            size=(batch.shape[2], batch.shape[3]),
        )
    torch.testing.assert_close(why.maps, maps, atol=AGREEMENT, rtol=0)
    if bool(why.flat.all()):
        raise AssertionError("every map is flat")


def explain(context: Context) -> Iterator[Row]:
    """explain_batch beside the forward pass: by batch and precision, and by rows."""
    for dtype in (torch.float32, torch.bfloat16):
        subject = Subject(context, dtype)
        explainer = subject.explainer(ROWS[0])
        for B in BATCHES:
            yield from _batch(subject, explainer, B)
    yield from _by_rows(context)
    yield from _best(context)
    if context.quick:
        return
    other = Subject(context, torch.bfloat16, name=OTHER)
    explainer = other.explainer(ROWS[0])
    for B in BATCHES:
        yield from _batch(other, explainer, B)


def _batch(subject: Subject, explainer: gcfast.Explainer, B: int) -> Iterator[Row]:
    case = f"{subject.title}, B {B}, {subject.precision}"
    device = subject.device
    written = subject.images(B)
    batch = last(written)
    # The default of explain_batch, settled: it may have chosen a graph by now, or not.
    eager = gcfast.Explainer(
        subject.model,
        subject.layer,
        explainer.database,
        cuda_graphs=False,
        reshape=explainer.network.reshape,
    )

    def beside(goals: tuple[str, str, str]) -> Iterator[Row]:
        check(eager, batch)
        default = settled(explainer, eager, written)
        forward = captured_forward(subject, batch)
        sides = (
            ("explain_batch", default, "model(x)", lambda: subject.forward(written)),
            ("explain_batch", default, "captured forward pass", forward),
            (
                "explain_batch, eager",
                lambda: eager.explain_batch(batch),
                "forward pass, channels-last",
                lambda: subject.forward(batch),
            ),
        )
        for (name, ours, other, theirs), goal in zip(sides, goals, strict=True):
            # The host launches faster in this mode, which a user enters round either.
            with torch.inference_mode():
                both, calls = alternate(ours, theirs, device)
            yield from pair_rows(case, (name, other), both, calls, goal)

    as_written = GOALS.get((subject.name, subject.precision), {}).get(B, "")
    yield from attempted(case, "explain_batch", beside((as_written, "<= 1.04", "<= 1.06")))


def settled(
    explainer: gcfast.Explainer, eager: gcfast.Explainer, batch: Tensor
) -> Callable[[], object]:
    """explain_batch once it has chosen a graph, or not; its maps are compared with eager ones."""
    for _ in range(TRIALS_UNTIMED + TRIALS + 2):
        maps = explainer.explain_batch(batch)
        wait(batch.device)
    torch.testing.assert_close(maps, eager.explain_batch(batch), atol=AGREEMENT, rtol=0)
    return functools.partial(explainer.explain_batch, batch)


def _best(context: Context) -> Iterator[Row]:
    """The settings of gcfast.BEST: class proxies, and maps refined by two earlier outputs."""
    subject = Subject(context, torch.float32)
    settings = dict(gcfast.BEST)
    explainer = explainer_with_rows(subject.model, subject.layer, ROWS[0], **settings)
    settings["cuda_graphs"] = False
    eager = gcfast.Explainer(subject.model, subject.layer, explainer.database, **settings)

    def rows(case: str, batch: Tensor) -> Iterator[Row]:
        default = settled(explainer, eager, batch)
        with torch.inference_mode():
            both, calls = alternate(default, captured_forward(subject, last(batch)), context.device)
        yield from pair_rows(case, ("BEST", "captured forward pass"), both, calls, "<= 1.10")

    for B in BATCHES[:4]:
        case = f"{subject.title}, B {B}, {subject.precision}, gcfast.BEST"
        yield from attempted(case, "explain_batch", rows(case, subject.images(B)))


def captured_forward(subject: Subject, batch: Tensor) -> Callable[[], object]:
    """The forward pass as a CUDA graph; where there is no GPU, the forward pass."""
    if not batch.is_cuda:
        return lambda: subject.forward(batch)
    stream = torch.cuda.Stream(batch.device)
    stream.wait_stream(torch.cuda.current_stream(batch.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            subject.forward(batch)
    torch.cuda.current_stream(batch.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.forward(batch)
    return graph.replay


def _by_rows(context: Context) -> Iterator[Row]:
    subject = Subject(context, torch.bfloat16)
    batch = last(subject.images(16))
    few = subject.explainer(ROWS[0])

    def rows(N: int) -> Iterator[Row]:
        many = subject.explainer(N)
        check(many, batch)
        both, calls = alternate(
            lambda: many.explain_batch(batch), lambda: few.explain_batch(batch), context.device
        )
        names = (f"explain_batch, {N:,} rows", f"{ROWS[0]:,} rows")
        yield from pair_rows(case, names, both, calls, "<= 1.05" if ROWS[-1] == N else "")

    for N in ROWS[1:2] if context.quick else ROWS[1:]:
        case = f"ResNet-50, B 16, bfloat16, {N:,} rows against {ROWS[0]:,}"
        yield from attempted(case, "explain_batch", rows(N))


def build(context: Context) -> Iterator[Row]:
    """Build beside one forward pass over the same images, from the host both times."""
    subject = Subject(context, torch.float32)
    an_image = [0.0]  # seconds, of the last build

    def rows(case: str, method: str, count: int) -> Iterator[Row]:
        distinct = min(count, BUILD_DISTINCT)
        batches = loader(distinct, BUILD_BATCH, BUILD_CLASSES) * (count // distinct)

        def forward() -> None:
            for batch, _ in batches:
                subject.forward(last(batch.to(context.device)))

        def built() -> None:
            gcfast.Explainer(subject.model, subject.layer, method=method).build(batches)

        both, calls = alternate(built, forward, context.device, rounds=3)
        an_image[0] = statistics.median(both.a) / calls / count
        goal = BUILD_GOALS.get(count, "")
        yield from pair_rows(case, ("build", "forward"), both, calls, goal)

    def paper(case: str) -> Iterator[Row]:
        batches = loader(2 * BUILD_BATCH, BUILD_BATCH, BUILD_CLASSES)
        on_device = [(batch.to(context.device), labels) for batch, labels in batches]
        paper_row(subject.model, subject.layer, on_device)
        wait(context.device)
        seconds = sorted(paper_row(subject.model, subject.layer, on_device) for _ in range(3))
        ratio = seconds[1] / an_image[0]
        text = f"{seconds[1] * 1e3:.1f} ms, {ratio:.0f} times build's (goal >= 100)"
        yield {"case": case, "side": "the paper's loop", "text": text, "seconds": seconds}

    runs = [("gradcam", count) for count in BUILD_IMAGES]
    for method, count in runs if context.quick else [*runs, ("gradcam++", BUILD_DISTINCT)]:
        case = f"ResNet-50, {count} images, {method}"
        yield from attempted(case, "build", rows(case, method, count))
    case = "a row: the paper's loop (3 forward, 1 backward pass a triplet)"
    yield from attempted(case, "the paper's loop", paper(case))


def peers(context: Context) -> Iterator[Row]:
    """torch-cam, captum and pytorch-grad-cam beside explain_batch, as bench/peers.py has them."""
    make_torchvision_importable()
    subject = Subject(context, torch.float32)
    explainer = subject.explainer(ROWS[0])
    batch = subject.images(16)
    other = subject.forward(images(1, seed=10).to(context.device)).clone()
    modules = {"torch-cam": "torchcam", "captum": "captum", "pytorch-grad-cam": "pytorch_grad_cam"}

    def rows(case: str, peer: str) -> Iterator[Row]:
        package, make = PEERS[peer]
        score: nn.Module = CosineScore(subject.model, other).to(context.device)
        run = make(score, layer_module(NAME, subject.model, subject.layer))
        both, calls = alternate(
            lambda: run(batch), lambda: explainer.explain_batch(batch), context.device
        )
        name = f"{peer} {metadata.version(package)}"
        goal = ">= 6" if peer == "pytorch-grad-cam" else ">= 2"
        yield from pair_rows(case, (name, "explain_batch"), both, calls, goal)

    for peer in PEERS:
        case = f"ResNet-50, B 16, float32, NCHW, {peer}"
        if importable(modules[peer]):
            yield from attempted(case, peer, rows(case, peer))
        else:
            yield {"case": case, "side": peer, "text": "not installed"}
