"""What bench/exported.py measures with: correlations, and which nodes are quantized."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

pytest.importorskip("efficientnet_lite_pytorch")  # of the extra [bench]
bench = importlib.import_module("exported")


def test_correlations_by_hand() -> None:
    ramp = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    one = torch.stack([ramp, ramp, ramp, torch.zeros(2, 2)])
    other = torch.stack([2 * ramp + 5, -ramp, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), ramp])
    got = bench.correlations(one, other)
    torch.testing.assert_close(got[:3], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    assert got[3].isnan()


def test_only_the_network_is_quantized(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])
    chain = [("Conv", ["x", "w"]), ("Clip", ["a"]), ("Conv", ["b", "w"]), ("Clip", ["c"]),
             ("Clip", ["d"]), ("Add", ["e", "e"])]  # fmt: skip
    outputs = ["a", "b", "c", "d", "e", "y"]
    nodes = [
        helper.make_node(kind, inputs, [output], name=f"{kind}-{output}")
        for (kind, inputs), output in zip(chain, outputs, strict=True)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 2, 2]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    wanted = ["Conv-a", "Clip-b", "Conv-c", "Clip-d"]
    assert bench.network_nodes(tmp_path / "net.onnx") == wanted
