"""The Triton kernels of refine against the reference in float64."""

import math

import pytest
import torch
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops
from gcfast.kernels import launch
from gcfast.kernels.refine import launch_refine, refine_bytes


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


def _agrees(maps, finer, **config):
    got = (
        launch_refine(maps, finer, **config)
        if config
        else ops.refine(maps, finer, backend="triton")
    )
    truth = ops.refine(maps.double(), finer.double())
    same = ops.refine(maps, finer, backend="reference")
    assert_error_bounded(got, truth, same, 1e-5)


# Of a tile and more, whole and not: (B, C, h, w, H, W).
SHAPES = {
    "one of all": (1, 1, 1, 1, 1, 1),
    "7 to 14": (2, 17, 7, 7, 14, 14),
    "beyond a tile": (1, 70, 8, 8, 17, 16),
    "odd": (3, 9, 3, 5, 7, 11),
    "as fine": (2, 130, 5, 2, 5, 2),
    "coarser": (1, 4, 9, 9, 4, 5),
    "a map beyond a block": (1, 3, 17, 17, 9, 10),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_reference(shape, memory_format):
    B, C, h, w, H, W = shape
    finer = guarded((B, C, H, W)) + 2
    _agrees(guarded((B, h, w)), finer.contiguous(memory_format=memory_format))


@pytest.mark.parametrize("config", launch.REFINE_CONFIGS, ids=str)
def test_every_configuration_agrees(config):
    _agrees(guarded((2, 5, 5)), guarded((2, 70, 11, 9)), config=config)


def test_choices_are_among_those_listed():
    chosen = [launch.refine_config(is_last=is_last) for is_last in (False, True)]
    assert sorted(chosen) == sorted(launch.REFINE_CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    _agrees(guarded((2, 5, 5), dtype), guarded((2, 40, 10, 10), dtype))


def test_layouts():
    maps, finer = guarded((2, 4, 5)), guarded((2, 6, 8, 10))
    for other in (strided(finer), finer.mT.contiguous().mT, finer.expand(2, 6, 8, 10).flip(0)):
        _agrees(strided(maps), other)


def test_a_first_pixel_far_from_all_others():
    finer = torch.randn(1, 4, 40, 40)
    finer[:, :, 0, 0] = 1e4
    _agrees(torch.rand(1, 5, 5), finer)


def test_a_mean_far_from_zero():
    maps, finer = torch.rand(2, 5, 5), torch.randn(2, 4, 9, 9) + 1e4
    got = ops.refine(maps, finer, backend="triton")
    truth = ops.refine(maps.double(), finer.double())
    torch.testing.assert_close(got.double(), truth, atol=2e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf], ids=str)
def test_nan_and_infinity_make_their_own_map_nan(value):
    maps, finer = torch.rand(3, 4, 4), torch.randn(3, 6, 20, 20)
    maps[0, 1, 2] = value
    finer[1, 4, 17, 3] = value
    got = ops.refine(maps, finer, backend="triton")
    assert got[:2].isnan().all()
    torch.testing.assert_close(got[2], ops.refine(maps, finer, backend="reference")[2])


def test_flat_maps_and_what_is_the_same_everywhere():
    maps = torch.stack([torch.zeros(3, 3), -torch.ones(3, 3), torch.ones(3, 3) / 3, torch.eye(3)])
    finer = torch.randn(4, 5, 6, 6)
    finer[3] = torch.rand(5, 1, 1)
    got = ops.refine(maps, finer, backend="triton")
    assert got[:2].abs().sum() == 0
    torch.testing.assert_close(got[2], torch.ones(6, 6))
    torch.testing.assert_close(got, ops.refine(maps, finer, backend="reference"))


def test_strides_beyond_32_bits():
    # 2^31 elements from one image, channel or pixel to the next, in a buffer that is few long.
    finer = torch.arange(12.0).view(2, 3, 2)
    for strides in ((2**40, 2, 1, 1), (6, 2**40, 1, 1)):
        shape = tuple(1 if stride == 2**40 else size for stride, size in zip(
            strides, (2, 3, 2, 1), strict=True))  # fmt: skip
        _agrees(torch.rand(shape[0], 2, 1), finer.as_strided(shape, strides))


def test_bytes_counted():
    # Twice 40 channels of 784 two-byte pixels; 49 pixels of the map, and 784 of the result.
    assert refine_bytes(1, 40, 784, 49, itemsize=2) == 2 * 40 * 784 * 2 + 4 * 49 + 4 * 784
