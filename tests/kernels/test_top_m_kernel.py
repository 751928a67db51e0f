"""The Triton kernel of top_m against the reference, which sorts."""

import pytest
import torch
from helpers import guarded, strided

from gcfast import ops
from gcfast.kernels import launch
from gcfast.kernels.top_m import launch_top_m, top_m_bytes


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


def _agrees(weights, m, **config):
    got = launch_top_m(weights, m, **config) if config else ops.top_m(weights, m, backend="triton")
    wanted = ops.top_m(weights, m, backend="reference")  # "auto" is the kernel on a GPU
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "m", "dtype"),
    [
        ((1, 1), 1, torch.float32),
        ((3, 17), 5, torch.float16),
        ((1, 257), 5, torch.bfloat16),
        ((1, 1031), 65, torch.float32),
        ((0, 4), 2, torch.float32),
    ],
    ids=str,
)
def test_agrees_with_the_reference(shape, m, dtype):
    _agrees(guarded(shape, dtype), m)


@pytest.mark.parametrize("config", launch.TOP_M_CONFIGS, ids=str)
def test_every_configuration_agrees(config):
    _agrees(torch.randn(1, config.block_c - 1), 50, config=config)


def test_ties_go_to_the_lower_channel():
    weights = torch.randint(-2, 3, (1, 260)).float()
    weights[:, ::3] = -0.0
    _agrees(weights, 33)
    _agrees(torch.zeros(1, 40), 30)
    # The sign of a zero is kept.
    kept = ops.top_m(torch.tensor([[-0.0, 0.0]]), 2, backend="triton")[1]
    assert kept.signbit().tolist() == [[True, False]]


@pytest.mark.parametrize(
    "row",
    [
        [-3.0, -1.0, -2.0, -1.0, -5.0, -9.0],
        [3e38, -3e38, 3e38, 0.0, -0.0, 1e-45],
        [float("inf"), -float("inf"), 1.0, -float("inf"), float("inf"), -1e-45],
        [1.0, float("nan"), float("inf"), -float("nan"), 2.0, 0.0],
    ],
    ids=["all-negative", "huge", "infinite", "nan"],
)
def test_order_of_hard_rows(row):
    _agrees(torch.tensor([row]), 6)


def test_strides():
    weights = torch.randn(2, 70)
    _agrees(strided(weights), 9)
    _agrees(weights[:, :3].T[:2], 2)
    # Rows 2^33 elements apart in memory that is not there: only the first is read.
    far = torch.randn(1, 70).as_strided((1, 70), (2**33, 1))
    _agrees(far, 9)


def test_beyond_the_kernel_a_library_sort(monkeypatch):
    monkeypatch.setattr("gcfast.kernels.top_m._top_m_kernel", None)
    _agrees(torch.randn(1, 8193), 3)
    _agrees(torch.randn(1, 300), 257)


def test_choices_are_among_those_listed():
    for C in (1, 256, 257, 2048, 8192):
        for M in (1, 64, 65, 256):
            config = launch.top_m_config(C, M)
            assert config in launch.TOP_M_CONFIGS
            assert config.block_c >= C
            assert config.block_m >= M


def test_bytes_counted():
    assert top_m_bytes(2, 2048, 50) == 2 * (2048 * 4 + 50 * 12)
