"""ops.knn beside torch.matmul + topk, which holds all B x N distances."""

import pytest
import torch

from gcfast import ops

B, D = 32, 128


def whole_matrix(queries: torch.Tensor, table: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    return (squares - 2 * queries @ table.T).topk(1, largest=False).indices


@pytest.mark.parametrize("side", ["gcfast", "matmul + topk"])
@pytest.mark.parametrize("rows", [10_000, 100_000])
def test_nearest(benchmark, rows, side):
    benchmark.group = f"B = {B}, D = {D}, N = {rows}, K = 1, float32"
    torch.manual_seed(0)
    queries, table = torch.randn(B, D), torch.randn(rows, D)
    squares = table.square().sum(1)
    wanted = torch.cdist(queries.double(), table.double()).argmin(1)
    if side == "gcfast":
        _, found = benchmark(ops.knn, queries, table, 1, squares=squares)
    else:
        found = benchmark(whole_matrix, queries, table, squares)
    assert torch.equal(found[:, 0], wanted)
