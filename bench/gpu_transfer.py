"""Explaining a stream beside the forward pass, with many rows: on the card or in the host's memory.

"exact" keeps the whole table on the card and reads it there. A FAISS index is on the card; what it
finds is gathered from the host's memory into pinned buffers, while the next batch is in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from gpu_end_to_end import AGREEMENT, Subject, alternate, check, last, pair_rows, wait
from gpu_runner import Context, Row, attempted, timed
from subjects import images
from torch import Tensor

import gcfast
from gcfast.database.shards import FIELDS
from gcfast.explain.cuda_graphs import TRIALS, TRIALS_UNTIMED
from gcfast.search.transfer import ExactTransfer

ROWS = (1_000_000, 10_000_000)
BATCH, DISTINCT, BATCHES = 64, 4, 32  # images of a batch, different batches, batches of a stream
LISTS = (1024, 4096)  # of the inverted file, for each number of rows
NPROBE = 16
TRAINING_ROWS = 2**18
CHUNK = 2**20  # rows that are made at once
CHECKED = 8  # images whose maps are compared with the reference's
GOAL = "<= 1.05"


def transfer(context: Context) -> Iterator[Row]:
    """explain_stream beside the forward pass over the same batches, and the transfer alone."""
    subject = Subject(context, torch.bfloat16)
    built = subject.explainer(BATCH).database
    assert built is not None
    batches = [
        last(images(BATCH, seed=i).to(context.device, subject.dtype)) for i in range(DISTINCT)
    ]
    for N, lists in list(zip(ROWS, LISTS, strict=True))[: 1 if context.quick else None]:
        case = f"{subject.title}, B {BATCH}, {subject.precision}, {N:,} rows"
        database = with_rows(built, N, context.device)
        size = sum(getattr(database, name).nbytes for name in FIELDS)
        share = size / context.memory_bytes
        text = f"{size / 1e9:.2f} GB, {share:.0%} of the card's memory"
        yield {
            "case": case,
            "side": "database",
            "text": text,
            "bytes": size,
            "share_of_card": share,
        }
        exact = gcfast.Explainer(subject.model, subject.layer, database)
        yield from attempted(
            f"{case}, exact", "exact", _exact(context, subject, exact, batches, case)
        )
        for factory in ("Flat", f"IVF{lists},Flat"):
            yield from attempted(
                f"{case}, {factory}",
                factory,
                _indexed(context, subject, exact, factory, batches, f"{case}, {factory}"),
            )


def _exact(
    context: Context, subject: Subject, exact: gcfast.Explainer, batches: list[Tensor], case: str
) -> Iterator[Row]:
    check(exact, batches[0][:CHECKED])
    yield from _beside(context, subject, exact, batches, f"{case}, exact")


def _indexed(
    context: Context,
    subject: Subject,
    exact: gcfast.Explainer,
    factory: str,
    batches: list[Tensor],
    case: str,
) -> Iterator[Row]:
    assert exact.database is not None
    index = filled(exact.database, factory, context.device)
    ours = gcfast.Explainer(subject.model, subject.layer, exact.database, index=index)
    same = same_rows(ours, exact, batches[0], lossless=factory == "Flat")
    text = f"{same:.1%} of the rows are the nearest"
    yield {"case": case, "side": "found", "text": text, "recall": same}
    yield from _beside(context, subject, ours, batches, case)


def _beside(
    context: Context, subject: Subject, ours: gcfast.Explainer, batches: list[Tensor], case: str
) -> Iterator[Row]:
    for _ in range(TRIALS_UNTIMED + TRIALS + 2):  # it has chosen a CUDA graph by then, or not
        maps = ours.explain_batch(batches[0])
        wait(context.device)
    torch.testing.assert_close(
        next(iter(ours.explain_stream(batches))), maps, atol=AGREEMENT, rtol=0
    )
    stream = batches * (BATCHES // DISTINCT)
    both, calls = alternate(
        lambda: drained(ours.explain_stream(stream)),
        lambda: drained(map(subject.forward, stream)),
        context.device,
    )
    names = (f"explain_stream, {BATCHES} batches", "forward pass, channels-last")
    yield from pair_rows(case, names, both, calls, GOAL)
    embeddings = ours.explain_batch(batches[0], details=True).embeddings
    found = ours.attach().transfer
    with torch.no_grad():
        taken = context.measure([lambda: found(embeddings)], graph=False)
    yield timed(case, "search and gather of a batch", taken)


def drained(given: Iterable[object]) -> None:
    for _ in given:
        pass


def with_rows(built: gcfast.Database, rows: int, device: torch.device) -> gcfast.Database:
    """A database of N rows in the host's memory: those that were built, moved at random.

    As ``subjects.explainer_with_rows``, but the numbers are drawn on the device, since 10^7 rows
    take the host half a minute.
    """
    generator = torch.Generator(device).manual_seed(0)
    own = built.embeddings.to(device)
    picked, embeddings = torch.empty(rows, dtype=torch.int64), torch.empty(rows, built.dim)
    for first in range(0, rows, CHUNK):
        part = slice(first, min(first + CHUNK, rows))
        count = part.stop - first
        pick = torch.randint(len(own), (count,), generator=generator, device=device)
        noise = 0.05 * torch.randn((count, built.dim), generator=generator, device=device)
        embeddings[part] = torch.nn.functional.normalize(own[pick].float() + noise, dim=1)
        picked[part] = pick
    tensors = {
        name: embeddings if name == "embeddings" else getattr(built, name)[picked]
        for name in FIELDS
    }
    ids = [str(i) for i in range(rows)]
    return gcfast.Database(tensors, ids, built.manifest, classes=built.classes)


def filled(database: gcfast.Database, factory: str, device: torch.device) -> Any:
    """A FAISS index of the rows on the device, made there: the host takes minutes for 10^7."""
    import faiss

    index = faiss.index_factory(database.dim, factory)
    if device.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    rows = database.embeddings.numpy()
    index.train(np.ascontiguousarray(rows[:: max(1, len(rows) // TRAINING_ROWS)]))
    index.add(rows)
    if hasattr(index, "nprobe"):
        index.nprobe = NPROBE
    return index


def same_rows(
    ours: gcfast.Explainer, exact: gcfast.Explainer, batch: Tensor, *, lossless: bool
) -> float:
    """The share of images whose row is the nearest one; raises where a distance is wrong."""
    why = ours.explain_batch(batch, details=True)
    search = exact.attach().transfer
    assert isinstance(search, ExactTransfer)
    with torch.no_grad():
        nearest, neighbors = search.search(why.embeddings, 1)
        rows = search.search.table[why.neighbors[:, 0]]
        measured = (rows - why.embeddings).double().square().sum(1, keepdim=True).float()
    torch.testing.assert_close(why.distances, measured, atol=1e-5, rtol=1e-4)
    if lossless:
        torch.testing.assert_close(why.distances, nearest, atol=1e-5, rtol=1e-4)
    elif bool((why.distances < nearest - 1e-4).any()):
        raise AssertionError("an index found rows nearer than the nearest")
    return float((why.neighbors == neighbors).float().mean())
