"""The Triton kernel of sparse_cam against the reference in float64."""

import pytest
import torch
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops
from gcfast.kernels import launch
from gcfast.kernels.sparse_cam import launch_sparse_cam, sparse_cam_bytes

SLOW_LARGE = [pytest.param(66, n, marks=pytest.mark.slow) for n in ("max", "minmax", None)]


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


def _inputs(B, C, H, W, N, M, K, dtype=torch.float32):
    return {
        "activations": guarded((B, C, H, W), dtype),
        "neighbors": torch.randint(N, (B, K)),
        "channels": torch.stack([torch.randperm(C)[:M] for _ in range(N)]),
        "weights": guarded((N, M)),
        "offsets": guarded((N,)),
        "mixing": torch.softmax(torch.randn(B, K), 1) if K > 1 else None,
    }


def _double(inputs):
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _agrees(inputs, **options):
    # A source position is known to about a unit in its last place, wherever in the map it is.
    slack = 2e-6 + 1.2e-7 * max(inputs["activations"].shape[2:])
    got = ops.sparse_cam(**inputs, **options, backend="triton")
    truth = ops.sparse_cam(**_double(inputs), **options).double()
    assert got.shape == truth.shape
    same = ops.sparse_cam(**inputs, **options, backend="reference")
    assert_error_bounded(got, truth, same, slack)


# One for each window, whole and not: (B, C, H, W, N, M, K).
SHAPES = {
    "one of all": (1, 1, 1, 1, 1, 1, 1),
    "7 x 5": (3, 17, 7, 5, 11, 6, 1),
    "K M beyond a block": (1, 60, 8, 8, 5, 50, 2),
    "3 x 13": (2, 13, 3, 13, 5, 13, 3),
    "29 x 17": (1, 7, 29, 17, 3, 5, 1),
    "64 x 33": (1, 5, 64, 33, 3, 3, 1),
    "67 x 70": (1, 4, 67, 70, 3, 3, 2),
}
OPTIONS = {
    "up": {"size": (37, 31)},
    "wide": {"size": (5, 300), "normalize": "minmax", "center": 0.7},
    "down": {"size": (3, 2), "relu": False, "normalize": None, "center": -1.0},
    "one pixel": {"size": (1, 1), "relu": False},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_reference(shape, options):
    _agrees(_inputs(*shape), **options)


@pytest.mark.parametrize("config", launch.SPARSE_CAM_CONFIGS, ids=str)
def test_every_configuration_agrees(config):
    side = min(int(config.block_p**0.5), 11)
    inputs = _inputs(2, 9, side, side - 2, 4, 5, 2)
    got = launch_sparse_cam(**inputs, size=(23, 19), config=config, center=0.5)
    wanted = ops.sparse_cam(**inputs, size=(23, 19), center=0.5, backend="reference")
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6)


def test_choices_are_among_those_listed():
    for P in (1, 49, 64, 65, 196, 1000, 4096, 4097, 10**6):
        for enlarged in (0.01, 1, 3.5, 32):
            for OW in (1, 64, 65, 224, 1024):
                config = launch.sparse_cam_config(P, enlarged, OW)
                assert config in launch.SPARSE_CAM_CONFIGS
                assert config.block_p >= P or P > launch.SPARSE_CAM_MAX_PIXELS


def test_few_images_have_many_programs():
    config = launch.sparse_cam_config(49, 32, 224)
    rows = {B: launch.sparse_cam_rows(B, 224, config) for B in (1, 16, 64, 256, 1024)}
    assert rows == {1: 8, 16: 32, 64: 56, 256: 112, 1024: 224}
    assert launch.sparse_cam_rows(4096, 1, config) == config.block_oh


@pytest.mark.parametrize("rows", [8, 24, 48])
def test_programs_cover_the_output(rows, monkeypatch):
    monkeypatch.setattr("gcfast.kernels.sparse_cam.sparse_cam_rows", lambda *_: rows)
    _agrees(_inputs(2, 5, 7, 7, 3, 3, 1), size=(41, 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_activations_and_tables(dtype):
    inputs = _inputs(2, 64, 5, 5, 4, 50, 2, dtype)
    _agrees(inputs, size=(11, 11), center=0.5)
    for name in ("weights", "offsets", "mixing"):
        inputs[name] = inputs[name].to(dtype)
    _agrees(inputs, size=(11, 11), center=0.5)


def test_layouts():
    inputs = _inputs(2, 10, 4, 6, 5, 4, 2)
    activations = inputs.pop("activations")
    wanted = ops.sparse_cam(activations, **inputs, size=(12, 12), backend="triton")
    tokens = activations.flatten(2).transpose(1, 2).contiguous()
    tables = {
        name: strided(value)
        if value.is_floating_point()
        else value.repeat(1, 2)[:, : value.shape[1]]
        for name, value in inputs.items()
    }
    for other, table, options in (
        (activations.contiguous(memory_format=torch.channels_last), inputs, {}),
        (strided(activations), tables, {}),
        (activations.flip(0).flip(0)[:, :, :, :], tables, {}),
        (tokens, inputs, {"grid": (4, 6)}),
        (strided(tokens), inputs, {"grid": (4, 6)}),
        (torch.cat([tokens[:, :1], tokens], 1)[:, 1:], inputs, {"grid": (4, 6)}),
    ):
        got = ops.sparse_cam(other, **table, size=(12, 12), **options, backend="triton")
        assert torch.equal(got, wanted)


def test_offsets_beyond_32_bits():
    # A channel 2^31 elements behind another in a buffer that is one element long.
    inputs = _inputs(1, 3, 2, 2, 2, 3, 1)
    base = torch.tensor([2.0])
    far = base.as_strided((1, 3, 2, 2), (0, 0, 0, 0))
    inputs["activations"] = far
    _agrees(inputs, size=(4, 4), normalize=None)
    # The batch's stride is only multiplied by 0, however large; and the channel's by its id.
    huge = base.as_strided((1, 1, 2, 2), (2**40, 2**40, 0, 0))
    _agrees({**inputs, "activations": huge, "channels": torch.zeros(2, 1, dtype=torch.int64),
             "weights": torch.ones(2, 1)}, size=(4, 4), normalize=None)  # fmt: skip


# 66 pixels a side take several blocks.
@pytest.mark.parametrize(
    ("side", "normalize"),
    [(3, "max"), (3, "minmax"), (3, None), *SLOW_LARGE],
)
def test_hard_values(normalize, side):
    for value in (0.0, -5.0, 3e38, 1e-42):
        activations = torch.full((1, 2, side, side), value)
        activations[0, 0, 1, 1] = value / 2
        inputs = {
            "activations": activations,
            "neighbors": torch.tensor([[0]]),
            "channels": torch.tensor([[0]]),
            "weights": torch.ones(1, 1),
        }
        for relu in (True, False):
            options = {"size": (5, 5), "normalize": normalize, "relu": relu}
            got = ops.sparse_cam(**inputs, **options, backend="triton")
            wanted = ops.sparse_cam(**inputs, **options, backend="reference")
            torch.testing.assert_close(got, wanted, atol=1e-44, rtol=2e-6)
            assert normalize is None or got.abs().max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize(
    ("side", "normalize"),
    [(4, "max"), (4, "minmax"), (4, None), *SLOW_LARGE],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_are_where_the_reference_has_them(side, value, normalize):
    inputs = _inputs(2, 6, side, side, 3, 4, 1)
    inputs["channels"][:] = torch.arange(4)
    inputs["activations"][0, 2, 1, 3] = value
    inputs["activations"][1, 5] = value  # a channel that is not kept
    for relu in (True, False):
        options = {"size": (9, 9), "normalize": normalize, "relu": relu}
        got = ops.sparse_cam(**inputs, **options, backend="triton")
        wanted = ops.sparse_cam(**inputs, **options, backend="reference")
        assert torch.equal(got.isnan(), wanted.isnan())
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-5, equal_nan=True)


def test_missing_neighbours_weigh_nothing():
    inputs = _inputs(3, 8, 3, 3, 4, 3, 2)
    inputs["neighbors"] = torch.tensor([[2, -1], [-1, -1], [3, 3]])
    for mixing in (None, torch.tensor([[1.0, 0.5], [0.3, 0.7], [0.5, 0.5]])):
        inputs["mixing"] = mixing
        _agrees(inputs, size=(6, 6), normalize=None, center=1.0)


def test_ids_out_of_range_are_not_followed():
    # The guards on both sides of activations and table hold NaN.
    inputs = _inputs(2, 4, 3, 3, 4, 3, 2)
    inputs["neighbors"] = torch.tensor([[1, 4], [2**40, -7]])
    inputs["channels"][1] = torch.tensor([2, 4, -1])
    inputs["mixing"] = None
    got = launch_sparse_cam(**inputs, size=(3, 3), normalize=None, relu=False)
    wanted = inputs["weights"][1, 0] * inputs["activations"][0, 2]
    torch.testing.assert_close(got[0], wanted)
    assert torch.equal(got[1], torch.zeros(3, 3))


def test_output_dtypes():
    inputs = _inputs(2, 8, 3, 3, 4, 3, 1)
    full = ops.sparse_cam(**inputs, size=(6, 6), backend="triton")
    half = ops.sparse_cam(**inputs, size=(6, 6), dtype=torch.float16, backend="triton")
    assert torch.equal(half, full.half())
    eight = ops.sparse_cam(**inputs, size=(6, 6), dtype=torch.uint8, backend="triton")
    assert torch.equal(eight, (full * 255).round().byte())


def test_bytes_rounded_to_even():
    # 255 times these is 0.5, 1.5 and 2.5, exactly.
    activations = torch.tensor([[[[0.5 / 255, 1.5 / 255, 2.5 / 255, 1.0]]]])
    one = torch.zeros(1, 1, dtype=torch.int64)
    arguments = (activations, one, one, torch.ones(1, 1))
    got, wanted = (
        ops.sparse_cam(*arguments, size=(1, 4), dtype=torch.uint8, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(got, wanted)


def test_nothing_to_do():
    inputs = _inputs(2, 8, 3, 3, 4, 3, 1)
    none = {**inputs, "activations": torch.ones(0, 8, 3, 3), "neighbors": torch.ones(0, 1).long()}
    assert ops.sparse_cam(**none, size=(6, 5), backend="triton").shape == (0, 6, 5)


def test_bytes_counted():
    # 50 channels of 49 two-byte pixels with an 8-byte id and a 4-byte weight, and 224^2 floats.
    assert sparse_cam_bytes(1, 1, 50, 49, 224, 224, itemsize=2) == 50 * (98 + 12) + 224 * 224 * 4
