"""ops.top_m: the highest channels, ordered, ties to the lower one."""

import pytest
import torch
from helpers import guarded, strided

from gcfast import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 257, 257), (0, 4, 2)], ids=str)
def test_matches_a_python_sort(shape, dtype):
    B, C, m = shape
    weights = guarded((B, C), dtype)
    if C > 4:
        weights[:, 1::3] = weights[:, :1]  # ties in every row
    channels, kept = ops.top_m(weights, m)
    assert channels.dtype == torch.int64
    assert kept.dtype == dtype
    for b in range(B):
        order = sorted(range(C), key=lambda k: (-float(weights[b, k]), k))[:m]
        assert channels[b].tolist() == order
    assert torch.equal(weights.gather(1, channels), kept)


@pytest.mark.parametrize(
    "row",
    [[0.0] * 6, [-3.0, -1.0, -2.0, -1.0, -5.0, -9.0], [3e38, -3e38, 3e38, 0.0, -0.0, 1e-45]],
    ids=["all-zero", "all-negative", "huge"],
)
def test_order_of_hard_rows(row):
    channels, kept = ops.top_m(torch.tensor([row]), 4)
    order = sorted(range(len(row)), key=lambda k: (-row[k], k))[:4]
    assert channels[0].tolist() == order
    assert kept[0].tolist() == [torch.tensor(row[k]).item() for k in order]


def test_strided_input():
    weights = torch.randn(3, 9)
    for got, wanted in zip(ops.top_m(strided(weights), 4), ops.top_m(weights, 4), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("weights", "m", "error", "words"),
    [
        (torch.ones(3), 1, ValueError, r"`weights` must have shape \[B, C\], got \[3\]"),
        (torch.ones(2, 3), 4, ValueError, "`m` must be at most C = 3, got 4"),
        (torch.ones(2, 3), 0, ValueError, "`m` must be at least 1, got 0"),
        (torch.ones(2, 3), True, TypeError, "`m` must be an int, got True"),
        (torch.ones(2, 3).int(), 1, TypeError, "`weights` must have dtype .* got int32"),
    ],
    ids=["rank", "m-above-C", "m-zero", "m-bool", "dtype"],
)
def test_bad_input(weights, m, error, words):
    with pytest.raises(error, match=words):
        ops.top_m(weights, m)
