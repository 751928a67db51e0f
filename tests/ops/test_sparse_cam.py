"""ops.sparse_cam: gather, weighted sum, ReLU, normalisation, upsampling."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops


def _dense(activations, neighbors, channels, weights, mixing, offsets, options):
    """The definition with one dense weight vector an image, in float64."""
    B, _, H, W = activations.shape
    maps = torch.zeros(B, H, W, dtype=torch.float64)
    for b in range(B):
        for k, row in enumerate(neighbors[b].tolist()):
            if row < 0:
                continue
            share = 1.0 if mixing is None else float(mixing[b, k])
            for channel, weight in zip(channels[row].tolist(), weights[row].tolist(), strict=True):
                maps[b] += share * weight * activations[b, channel].double()
            maps[b] -= share * options.get("center", 0.0) * float(offsets[row])
        if options.get("relu", True):
            maps[b].clamp_(min=0)
        normalize = options.get("normalize", "max")
        if normalize == "minmax":
            maps[b] -= maps[b].min()
        if normalize is not None and maps[b].abs().max() > 0:
            maps[b] /= maps[b].abs().max()
    return F.interpolate(maps[:, None], size=options["size"], mode="bilinear", align_corners=False)[
        :, 0
    ]


def _inputs(B, C, H, W, N, M, K, dtype=torch.float32):
    channels = torch.stack([torch.randperm(C)[:M] for _ in range(N)])
    return {
        "activations": guarded((B, C, H, W), dtype),
        "neighbors": torch.randint(N, (B, K)),
        "channels": channels,
        "weights": guarded((N, M)),
        "offsets": guarded((N,)),
        "mixing": torch.softmax(torch.randn(B, K), 1) if K > 1 else None,
    }


OPTIONS = [
    {"size": (20, 31)},
    {"size": (3, 2), "center": 0.7},
    {"size": (9, 9), "relu": False, "normalize": None},
    {"size": (224, 5), "relu": False},
    {"size": (8, 8), "normalize": "minmax", "center": 1.0},
    {"size": (1, 1)},
]
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (3, 17, 5, 7, 11, 6, 1), (2, 13, 3, 4, 5, 13, 3)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, options):
    inputs = _inputs(*shape)
    mixing, offsets = inputs["mixing"], inputs["offsets"]
    wanted = _dense(
        *(inputs[n] for n in ("activations", "neighbors", "channels", "weights")),
        mixing,
        offsets,
        options,
    )
    got = ops.sparse_cam(**inputs, **options)
    assert got.dtype == torch.float32
    assert (got.double() - wanted).abs().max() < 2e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_sums_in_float32(dtype):
    inputs = _inputs(2, 64, 5, 5, 4, 50, 1, dtype)
    options = {"size": (11, 11)}
    truth = _dense(
        *(inputs[n] for n in ("activations", "neighbors", "channels", "weights")),
        None,
        inputs["offsets"],
        options,
    )
    same = truth.to(dtype)
    assert_error_bounded(ops.sparse_cam(**inputs, **options), truth, same, 1e-6)


def test_layouts_agree():
    inputs = _inputs(2, 10, 4, 6, 5, 4, 2)
    wanted = ops.sparse_cam(**inputs, size=(12, 12))
    activations = inputs.pop("activations")
    for other in (
        activations.contiguous(memory_format=torch.channels_last),
        strided(activations),
    ):
        assert torch.equal(ops.sparse_cam(other, **inputs, size=(12, 12)), wanted)
    tokens = activations.flatten(2).transpose(1, 2).contiguous()
    got = ops.sparse_cam(tokens, **inputs, size=(12, 12), grid=(4, 6))
    assert torch.equal(got, wanted)


def test_by_hand():
    activations = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]], [[9.0, 9.0]]]])
    table = {"channels": torch.tensor([[1, 0]]), "weights": torch.tensor([[0.5, -1.0]])}
    got = ops.sparse_cam(activations, torch.tensor([[0]]), **table, size=(1, 4), normalize=None)
    # 0.5 * (4, 0) - (1, 2) = (1, -2) -> relu (1, 0); half-pixel centres: 1, .75, .25, 0.
    torch.testing.assert_close(got, torch.tensor([[[1.0, 0.75, 0.25, 0.0]]]))
    signed = ops.sparse_cam(activations, torch.tensor([[0]]), **table, size=(1, 2), relu=False)
    torch.testing.assert_close(signed, torch.tensor([[[0.5, -1.0]]]))


def test_a_missing_neighbour_weighs_nothing():
    inputs = _inputs(2, 8, 3, 3, 4, 3, 2)
    inputs["neighbors"] = torch.tensor([[2, -1], [-1, -1]])
    inputs["mixing"] = torch.tensor([[1.0, 0.5], [0.3, 0.7]])
    got = ops.sparse_cam(**inputs, size=(6, 6), normalize=None, center=1.0)
    alone = {**inputs, "neighbors": torch.tensor([[2], [2]]), "mixing": None}
    torch.testing.assert_close(got[0], ops.sparse_cam(**alone, size=(6, 6), normalize=None,
                                                      center=1.0)[0])  # fmt: skip
    assert got[1].abs().sum() == 0


@pytest.mark.parametrize("normalize", ["max", "minmax", None])
def test_a_flat_map_is_zeros(normalize):
    activations = torch.zeros(2, 3, 4, 4)
    activations[1] = -5
    got = ops.sparse_cam(
        activations,
        torch.tensor([[0], [0]]),
        torch.tensor([[0, 2]]),
        torch.ones(1, 2),
        size=(7, 7),
        normalize=normalize,
    )
    assert got.abs().sum() == 0


def test_channels_left_out_do_not_leak():
    activations = torch.ones(1, 3, 2, 2)
    activations[0, 1] = float("nan")
    activations[0, 2] = float("inf")
    got = ops.sparse_cam(
        activations, torch.tensor([[0]]), torch.tensor([[0]]), torch.ones(1, 1), size=(2, 2)
    )
    assert torch.equal(got, torch.ones(1, 2, 2))


def test_nan_in_a_kept_channel_shows():
    activations = torch.ones(1, 2, 2, 2)
    activations[0, 0, 0, 0] = float("nan")
    table = {"channels": torch.tensor([[0]]), "weights": torch.ones(1, 1)}
    got = ops.sparse_cam(activations, torch.tensor([[0]]), **table, size=(2, 2))
    assert got.isnan().any()


def test_autocast_does_not_reach_the_sums():
    inputs = _inputs(2, 64, 5, 5, 4, 50, 1)
    wanted = ops.sparse_cam(**inputs, size=(11, 11))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.sparse_cam(**inputs, size=(11, 11)), wanted)


def test_output_dtypes():
    inputs = _inputs(2, 8, 3, 3, 4, 3, 1)
    full = ops.sparse_cam(**inputs, size=(6, 6))
    assert torch.equal(ops.sparse_cam(**inputs, size=(6, 6), dtype=torch.float16), full.half())
    eight = ops.sparse_cam(**inputs, size=(6, 6), dtype=torch.uint8)
    assert torch.equal(eight, (full * 255).round().byte())


def test_no_images_and_no_rows():
    inputs = _inputs(2, 8, 3, 3, 4, 3, 1)
    none = {**inputs, "activations": torch.ones(0, 8, 3, 3), "neighbors": torch.ones(0, 1).long()}
    assert ops.sparse_cam(**none, size=(6, 5)).shape == (0, 6, 5)
    empty = {
        "activations": inputs["activations"],
        "neighbors": torch.full((2, 1), -1),
        "channels": torch.empty(0, 3, dtype=torch.int64),
        "weights": torch.empty(0, 3),
    }
    assert torch.equal(ops.sparse_cam(**empty, size=(6, 5)), torch.zeros(2, 6, 5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activations": torch.ones(2, 8)}, ValueError, r"\[B, C, H, W\], got \[2, 8\]"),
        ({"activations": torch.ones(2, 9, 8)}, ValueError, r"`grid` must be \(H, W\).* P = 9"),
        ({"neighbors": torch.zeros(2, 1)}, TypeError, "`neighbors` must have dtype int64"),
        ({"neighbors": torch.tensor([[0], [4]])}, ValueError, r"`neighbors` must lie in \[-1, 4\)"),
        (
            {"neighbors": torch.tensor([[0], [-2]])},
            ValueError,
            r"`neighbors` must lie in \[-1, 4\)",
        ),
        ({"channels": torch.full((4, 3), 8)}, ValueError, r"`channels` must lie in \[0, 8\)"),
        ({"weights": torch.ones(4, 2)}, ValueError, r"`weights` must have shape \[N, M\]"),
        ({"offsets": None, "center": 1.0}, ValueError, "`offsets` must be given"),
        ({"center": float("nan")}, ValueError, "`center` must be finite, got nan"),
        ({"normalize": "sum"}, ValueError, "`normalize` must be one of 'max', 'minmax', None"),
        ({"size": (0, 3)}, ValueError, r"`size` must be \(OH, OW\), both at least 1"),
        ({"dtype": torch.uint8, "normalize": None}, ValueError, r"maps outside \[0, 1\]"),
        ({"dtype": torch.float64}, ValueError, "`dtype` must be one of"),
        ({"mixing": torch.ones(2, 2)}, ValueError, r"`mixing` must have shape \[B, K\]"),
        ({"weights": torch.ones(4, 3, device="meta")}, ValueError, "`weights` must be on the dev"),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {**_inputs(2, 8, 3, 3, 4, 3, 1), "size": (6, 6), **change}
    with pytest.raises(error, match=words):
        ops.sparse_cam(**arguments)
