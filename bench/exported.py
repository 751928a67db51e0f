"""Exported graphs: their speed next to explain_batch, and what INT8 changes in the maps.

    python bench/exported.py [--data COCO] [--network efficientnet-lite0 …] [--aoti] [--json FILE]

Speed, on the CPU, NCHW images, one after the other in pairs: explain_batch / the ONNX graph in ONNX
Runtime, with as many threads; with --aoti explain_batch / the package that AOTInductor compiled,
which takes minutes. Maps are compared before anything is timed.

INT8, with --data: EfficientNet-Lite0 with ImageNet weights on photographs in COCO's layout (as
`bench/photographs.py` has them: rows are crops, queries whole photographs, two folds by picture).
The graph is quantized by ONNX Runtime, statically (QDQ, calibrated on the rows' crops): the
network up to its last convolution, while search and maps stay in float32. Rows come from the
float32 network in both cases, so that the queries alone differ.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from paired import Paired, conditions, paired
from photographs_data import Backbone, load_photographs
from photographs_maps import Fold, Loader, folds
from scenes_network import to_input
from subjects import CONVOLUTIONAL, explainer_with_rows, images, network
from torch import Tensor

import gcfast

MAP_TOLERANCE = 1e-4  # of real networks; 2e-5 was the largest difference seen
BATCH = 32
DETAILS = ["maps", "embeddings", "neighbors", "labels"]
QUANTIZED = ("Conv", "Clip", "Relu", "Add", "Mul", "Sigmoid", "GlobalAveragePool")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def difference(maps: Tensor | NDArray[np.float32], wanted: Tensor) -> float:
    worst = float((torch.as_tensor(maps) - wanted).abs().max())
    assert worst <= MAP_TOLERANCE, worst
    return worst


def told(name: str, ratio: Paired) -> dict[str, Any]:
    print(f"  {name}: {ratio}", flush=True)
    return ratio.record()


def speed(arguments: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """How many times as fast as explain_batch the exported graphs are."""
    model, layer = network(name)
    explainer = explainer_with_rows(model, layer, arguments.rows)
    batch = images(arguments.batch, seed=9)
    wanted = explainer.explain_batch(batch)
    print(f"{name}, B = {arguments.batch}, N = {arguments.rows}")

    def against(run: Callable[[], object]) -> Paired:
        return paired(lambda: explainer.explain_batch(batch), run, rounds=arguments.rounds)

    path = folder / f"{name}.onnx"
    explainer.export_onnx(path, images=batch)
    graph, feeds = session(path), {"images": batch.numpy()}
    record: dict[str, Any] = {
        "onnx_bytes": path.stat().st_size,
        "onnx_map_error": difference(graph.run(None, feeds)[0], wanted),
        "onnx": told("explain_batch / ONNX Runtime", against(lambda: graph.run(None, feeds))),
    }
    if arguments.aoti:
        package = folder / f"{name}.pt2"
        explainer.export_aoti(package, images=batch)
        run = torch._inductor.aoti_load_package(os.fspath(package))
        record |= {
            "aoti_map_error": difference(run(batch), wanted),
            "aoti": told("explain_batch / AOTInductor", against(lambda: run(batch))),
        }
    return record


class Crops(CalibrationDataReader):
    """The rows' crops, batch by batch."""

    def __init__(self, fold: Fold) -> None:
        self.batches: Iterator[Any] = iter(Loader(fold))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch[0].numpy()}


def network_nodes(path: Path) -> list[str]:
    """The nodes up to the last convolution and what follows it directly, of kinds that INT8 has."""
    nodes = onnx.load(path).graph.node
    last = max(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    after = set(nodes[last].output)
    names = [node.name for node in nodes[: last + 1] if node.op_type in QUANTIZED]
    return names + [
        n.name for n in nodes[last + 1 :] if n.op_type == "Clip" and n.input[0] in after
    ]


def quantized(path: Path, fold: Fold) -> Path:
    prepared, out = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        out,
        Crops(fold),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=network_nodes(prepared),
    )
    return out


def queries_of(fold: Fold) -> Tensor:
    return to_input(np.stack([query.image for query in fold.queries]))


def outputs(run: onnxruntime.InferenceSession, queries: Tensor) -> dict[str, Tensor]:
    parts = [run.run(DETAILS, {"images": part.numpy()}) for part in queries.split(BATCH)]
    columns = zip(*parts, strict=True)
    return {n: torch.from_numpy(np.concatenate(c)) for n, c in zip(DETAILS, columns, strict=True)}


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's of each pair of maps [B]; NaN where one is flat."""
    one, other = (maps.flatten(1).double() for maps in (one, other))
    one, other = (maps - maps.mean(1, keepdim=True) for maps in (one, other))
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))


def int8(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What of the maps and neighbours INT8 keeps, and how fast it is."""
    same_row, same_class, cosines, correlation, errors = [], [], [], [], []
    ratios: dict[str, Any] = {}
    for number, fold in enumerate(folds(load_photographs(arguments.data, arguments.limit))):
        explainer = gcfast.Explainer(Backbone().eval(), "head")
        explainer.build(Loader(fold))
        queries = queries_of(fold)
        path = folder / f"fold{number}.onnx"
        explainer.export_onnx(path, images=queries, details=True)
        graph, small = session(path), session(quantized(path, fold))
        wanted, got = outputs(graph, queries), outputs(small, queries)
        eager = explainer.explain_batch(queries[:BATCH])
        errors.append(difference(wanted["maps"][:BATCH], eager))
        same_row.append(got["neighbors"][:, 0] == wanted["neighbors"][:, 0])
        same_class.append(got["labels"][:, 0] == wanted["labels"][:, 0])
        cosines.append((got["embeddings"] * wanted["embeddings"]).sum(1))
        correlation.append(correlations(got["maps"], wanted["maps"]))
        if not number:
            feeds = {"images": queries[: arguments.batch].numpy()}
            ratios["float32"] = told(
                "ONNX Runtime, float32 / INT8",
                paired(
                    lambda g=graph, f=feeds: g.run(["maps"], f),
                    lambda g=small, f=feeds: g.run(["maps"], f),
                    rounds=arguments.rounds,
                ),
            )
            ratios["bytes"] = [path.stat().st_size, path.with_suffix(".int8.onnx").stat().st_size]
    row, label = torch.cat(same_row), torch.cat(same_class)
    values, cosine = torch.cat(correlation), torch.cat(cosines)
    known = ~values.isnan()

    def spread(chosen: Tensor) -> dict[str, Any]:
        kept = values[chosen & known]
        low, median = kept.quantile(torch.tensor([0.05, 0.5], dtype=torch.float64)).tolist()
        return {"maps": len(kept), "median": median, "5th percentile": low}

    record = {
        "queries": len(row),
        "flat": int((~known).sum()),
        "same_neighbor": float(row.double().mean()),
        "same_label": float(label.double().mean()),
        "embedding_cosine_median": float(cosine.median()),
        "correlation": spread(torch.ones_like(row)),
        "correlation_same_neighbor": spread(row),
        "float32_map_error": max(errors),
        "speed": ratios,
    }
    print({name: value for name, value in record.items() if name != "speed"})
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="*", default=CONVOLUTIONAL, choices=CONVOLUTIONAL)
    parser.add_argument("--data", type=Path, help="photographs in COCO's layout; none: no INT8")
    parser.add_argument("--limit", type=int, help="photographs taken at most")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the database, for speed")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--aoti", action="store_true", help="also compile, which takes minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "conditions": conditions() | {"onnxruntime": onnxruntime.__version__},
        "batch": arguments.batch,
        "rows": arguments.rows,
    }
    print(record["conditions"])
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            name: partial(speed, arguments, name, Path(folder)) for name in arguments.network
        }
        if arguments.data is not None:
            parts["int8"] = partial(int8, arguments, Path(folder))
        for name, part in parts.items():
            record[name] = part()
            if arguments.json is not None:  # compiling takes long: what is done is kept
                arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
