"""ops.dense_cam: as sparse_cam of a table that keeps every channel; the kernel as the reference."""

import pytest
import torch
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops
from gcfast.kernels import launch
from gcfast.kernels.dense_cam import dense_cam_bytes

BACKENDS = ["reference", "triton"]
OPTIONS = {
    "up": {"size": (37, 31)},
    "wide": {"size": (5, 300), "normalize": "minmax"},
    "signed": {"size": (3, 2), "relu": False, "normalize": None},
    "byte": {"size": (9, 8), "dtype": torch.uint8},
}
# For each size of block, whole and not: (B, C, H, W).
SHAPES = {
    "one of all": (1, 1, 1, 1),
    "7 x 5": (3, 70, 7, 5),
    "column": (2, 5, 9, 1),
    "row": (2, 5, 1, 6),
    "14 x 15": (2, 33, 14, 15),
    "29 x 17": (1, 34, 29, 17),
}


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


def _sparse(activations, weights, **options):
    """The same by sparse_cam in float64."""
    B, C = weights.shape
    channels = torch.arange(C).expand(B, C)
    rows = torch.arange(B)[:, None]
    return ops.sparse_cam(activations.double(), rows, channels, weights.double(), **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_sparse_cam_of_all_channels(shape, options, backend):
    activations, weights = guarded(shape), guarded(shape[:2])
    got = ops.dense_cam(activations, weights, **options, backend=backend)
    wanted = _sparse(activations, weights, **options)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if got.dtype == torch.uint8:
        assert (got.int() - wanted.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(got, wanted.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    activations, weights = torch.randn(2, 10, 4, 6), torch.randn(2, 10)
    wanted = ops.dense_cam(activations, weights, size=(12, 12), backend=backend)
    last = activations.contiguous(memory_format=torch.channels_last)
    apart = torch.stack([activations, activations], 3)[:, :, :, 0]  # rows with a row between them
    for other in (last, strided(activations), apart):
        got = ops.dense_cam(other, strided(weights), size=(12, 12), backend=backend)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    tokens = activations.flatten(2).transpose(1, 2).contiguous()
    got = ops.dense_cam(tokens, weights, size=(12, 12), grid=(4, 6), backend=backend)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_sums_in_float32(dtype, backend):
    activations, weights = guarded((2, 64, 5, 5), dtype), guarded((2, 64), dtype)
    truth = _sparse(activations, weights, size=(11, 11))
    got = ops.dense_cam(activations, weights, size=(11, 11), backend=backend)
    assert_error_bounded(got, truth, truth.to(dtype), 2e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [5, 18])
def test_nan_stays_in_its_image(side, backend):
    activations, weights = torch.rand(3, 6, side, side), torch.rand(3, 6)
    weights[1] = torch.nan
    maps = ops.dense_cam(activations, weights, size=(9, 9), backend=backend)
    assert torch.isnan(maps[1]).all()
    assert torch.isfinite(maps[[0, 2]]).all()
    flat = ops.dense_cam(activations, -torch.ones(3, 6), size=(9, 9), backend=backend)
    assert (flat == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend):
    none = ops.dense_cam(torch.rand(0, 6, 3, 3), torch.rand(0, 6), size=(9, 9), backend=backend)
    assert none.shape == (0, 9, 9)
    without = ops.dense_cam(torch.rand(2, 0, 3, 3), torch.rand(2, 0), size=(4, 4), backend=backend)
    assert (without == 0).all()


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (torch.rand(2, 5), {}, ValueError, r"`weights` must have shape \[B, C\]"),
        (torch.rand(2, 6).long(), {}, TypeError, "`weights` must have dtype"),
        (torch.rand(2, 6), {"size": (0, 3)}, ValueError, "`size` must be"),
        (torch.rand(2, 6), {"dtype": torch.uint8, "normalize": None}, ValueError, "`dtype`"),
        (torch.rand(2, 6), {"normalize": "mean"}, ValueError, "`normalize` must be"),
    ],
)
def test_arguments_are_checked(weights, options, error, message, device):
    with pytest.raises(error, match=message):
        ops.dense_cam(torch.rand(2, 6, 3, 3), weights.to(device), **{"size": (4, 4)} | options)


def test_few_images_share_their_channels_out():
    for B, P, slices in ((1, 49, 32), (16, 49, 32), (256, 49, 2), (1024, 49, 1), (4, 4096, 1)):
        config = launch.dense_cam_config(B, 2048, P, 132)
        assert -(-2048 // config.channels) == slices
        assert config.channels % config.block_c == 0
        assert config.block_p >= P or P > launch.SPARSE_CAM_MAX_PIXELS


def test_slices_add_up(monkeypatch):
    monkeypatch.setattr("gcfast.kernels.dense_cam.multiprocessors", lambda _: 132)
    activations, weights = torch.randn(1, 64 * 18 + 1, 3, 3), torch.randn(1, 64 * 18 + 1)
    got = ops.dense_cam(activations, weights, size=(9, 9), backend="triton")
    torch.testing.assert_close(
        got, _sparse(activations, weights, size=(9, 9)).float(), atol=1e-5, rtol=0
    )


def test_bytes():
    assert dense_cam_bytes(2, 3, 49, 10, 20) == 2 * (3 * (49 * 4 + 4) + 10 * 20 * 4)
