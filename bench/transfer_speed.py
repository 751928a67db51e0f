"""The transfer engine against FAISS's Python API and NumPy; explain_stream against the forward.

    python bench/transfer_speed.py [--rows 1000000] [--index Flat IVF HNSW32] [--json FILE]

"search + gather": the engine (search, exact distances, order, labels, rows) against index.search
and four indexing operations (labels, rows). "gather": row numbers drawn beforehand, both sides
given them; the engine also measures the rows, so NumPy is timed without and with that; "alone" is
the engine's time less that of measuring without gathering. Rows are drawn anew for each call, so
that they come from memory. FAISS and NumPy timed against themselves tell the noise. The copy
bandwidth is that of torch.Tensor.copy_ of 256 MiB, reads and writes counted. Answers are compared
before anything is timed; a comparison gets as many rounds as fit into about SECONDS.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import conditions, paired
from subjects import explainer_with_rows, images, network
from tables import Known, filled, numpy_gather, queries, shard, views

import gcfast
from gcfast.database.shards import Shard
from gcfast.search.transfer import make_engine

D, M = 128, 50
SECONDS = 30.0
LEAST_ROUNDS = 5


def rounds_for(call: Any, most: int) -> int:
    """How many pairs of calls like this one fit into SECONDS."""
    start = time.perf_counter()
    call()
    return max(LEAST_ROUNDS, min(most, int(SECONDS / 2 / (time.perf_counter() - start))))


def same_up_to_ties(engine: Any, index: Any, table: Shard, asked: np.ndarray[Any, Any]) -> None:
    """The engine's rows are FAISS's, or as near (FAISS's own distances are rounded otherwise)."""
    rows, distances = engine.transfer(asked, k=1)[:2]
    _, found = index.search(asked, 1)
    theirs = table.embeddings[torch.from_numpy(found[:, 0])].double().numpy()
    theirs = ((theirs - asked) ** 2).sum(1)
    different = rows[:, 0] != found[:, 0]
    np.testing.assert_allclose(distances[different, 0], theirs[different], rtol=1e-4, atol=1e-6)


def search_and_gather(
    table: Shard, names: list[str], batches: list[int], rounds: int, threads: int
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    arrays = views(table)
    for name in names:
        start = time.perf_counter()
        index = filled(name, table.embeddings)
        print(f"{name}: made in {time.perf_counter() - start:.0f} s")
        engine = make_engine(index, [table], threads=threads)
        for batch in batches:
            asked = queries(table, batch)
            same_up_to_ties(engine, index, table, asked)

            def by_hand(index: Any = index, asked: Any = asked) -> Any:
                _, found = index.search(asked, 1)
                return numpy_gather(arrays, found[:, 0])

            measured = paired(
                lambda engine=engine, asked=asked: engine.transfer(asked, k=1),
                by_hand,
                rounds=rounds_for(by_hand, rounds),
                warmup=1,
            )
            itself = paired(by_hand, by_hand, rounds=len(measured.a))
            print(f"  search + gather, B = {batch}: engine / by hand {measured}")
            print(f"    by hand / by hand {itself}")
            record[f"{name}, B = {batch}"] = measured.record() | {"noise": itself.record()}
    return record


def gather(table: Shard, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    arrays, asked = views(table), queries(table, batch)
    count = len(table.labels)
    known = Known(D, count)
    engine = make_engine(known, [table], threads=threads)
    generator = np.random.default_rng(0)

    def drawn() -> np.ndarray[Any, Any]:
        known.rows = generator.integers(0, count, batch)
        return known.rows

    def measured_by_numpy() -> None:
        ids = drawn()
        numpy_gather(arrays, ids)
        ((arrays["embeddings"][ids] - asked) ** 2).sum(1)

    for one, two in zip(
        (lambda r: (r[4], r[5], r[6], r[2][:, 0]))(engine_call(engine, drawn, asked)),
        numpy_gather(arrays, known.rows),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)

    plain = paired(
        lambda: engine_call(engine, drawn, asked),
        lambda: numpy_gather(arrays, drawn()),
        rounds=rounds,
    )
    with_distances = paired(
        lambda: engine_call(engine, drawn, asked), measured_by_numpy, rounds=rounds
    )
    measuring = paired(
        lambda: engine_call(engine, drawn, asked),
        lambda: (drawn(), engine.search(asked, k=1)),
        rounds=rounds,
    )
    drawing = float(np.median(paired(drawn, drawn, rounds=rounds).a))
    alone = float(np.median([a - b for a, b in zip(measuring.a, measuring.b, strict=True)]))
    by_numpy = float(np.median(plain.b)) - drawing
    row_bytes = M * 12 + 12  # channels, weights, offset and label of a row
    copy = copy_bandwidth()
    speed = 2 * batch * row_bytes / alone
    print(f"  gather, B = {batch}: engine with distances / NumPy without {plain}")
    print(f"  gather, B = {batch}: engine / NumPy, both with distances {with_distances}")
    print(
        f"  gather alone, B = {batch}: NumPy / engine {by_numpy / alone:.2f}; "
        f"{speed / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s: {speed / copy:.0%}"
    )
    return {
        "with_distances_to_numpy_without": plain.record(),
        "with_distances_to_numpy_with": with_distances.record(),
        "alone_seconds": alone,
        "numpy_seconds": by_numpy,
        "copy_bytes_per_second": copy,
    }


def engine_call(engine: Any, drawn: Any, asked: np.ndarray[Any, Any]) -> Any:
    drawn()
    return engine.transfer(asked, k=1)


def copy_bandwidth() -> float:
    source, target = torch.ones(2**26), torch.empty(2**26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def stream(
    name: str, kind: str, rows: int, batch: int, batches: int, rounds: int
) -> dict[str, Any]:
    model, layer = network(name)
    database = explainer_with_rows(model, layer, rows).database
    assert database is not None
    index = filled(kind, database.embeddings)
    explainer = gcfast.Explainer(model, layer, database, index=index)
    given = [
        images(batch, seed=i).contiguous(memory_format=torch.channels_last) for i in range(batches)
    ]
    with torch.inference_mode():
        for maps, wanted in zip(explainer.explain_stream(given), given, strict=True):
            assert torch.equal(maps, explainer.explain_batch(wanted))
        streamed = paired(
            lambda: [None for _ in explainer.explain_stream(given)],
            lambda: [model(x) for x in given],
            rounds=rounds,
        )
        looped = paired(
            lambda: [explainer.explain_batch(x) for x in given],
            lambda: [model(x) for x in given],
            rounds=rounds,
        )
    print(f"  {name}, {kind}, {batches} batches of {batch}: explain_stream / forward {streamed}")
    print(f"  {name}, {kind}, {batches} batches of {batch}: explain_batch / forward {looped}")
    return {"stream": streamed.record(), "batch": looped.record()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--index", nargs="*", default=["Flat", "IVF", "HNSW32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--stream", nargs="*", default=["IVF", "HNSW32"], help="indices")
    parser.add_argument("--network", default="efficientnet-lite0")
    parser.add_argument("--stream-batch", type=int, default=32)
    parser.add_argument("--stream-batches", type=int, default=6)
    parser.add_argument("--stream-rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"conditions": conditions(), "rows": arguments.rows}
    record["engine_threads"] = arguments.threads
    print(record)

    with tempfile.TemporaryDirectory() as folder:
        table = shard(Path(folder), arguments.rows, D, M)
        record["gather"] = {
            batch: gather(table, batch, 10 * arguments.rounds, arguments.threads)
            for batch in arguments.batch
        }
        record["search + gather"] = search_and_gather(
            table, arguments.index, arguments.batch, arguments.rounds, arguments.threads
        )
        del table
    record["stream"] = {
        kind: stream(
            arguments.network,
            kind,
            arguments.rows,
            arguments.stream_batch,
            arguments.stream_batches,
            arguments.stream_rounds,
        )
        for kind in arguments.stream
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
