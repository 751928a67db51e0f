"""ops.refine: a map by what an earlier layer's output says of the hot pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops


def formula(maps, finer):
    """The formula of the docstring, one image and one channel after another, in float64."""
    refined = []
    for one, x in zip(maps.double().clamp(min=0), finer.double(), strict=True):
        u = F.interpolate((one / one.max())[None, None], size=x.shape[1:], mode="bilinear")[0, 0]
        cubes = u**3
        hot = torch.stack([(cubes * channel).sum() / cubes.sum() for channel in x])
        mean = torch.stack([channel.mean() for channel in x])
        variance = torch.stack([(channel - channel.mean()).square().mean() for channel in x])
        v = (hot - mean) / (variance + 0.1 * variance.mean())
        f = sum(a * (channel - m) for a, channel, m in zip(v, x, mean, strict=True)).clamp(min=0)
        refined.append(u * f / f.max())
    return torch.stack(refined)


SHAPES = {  # (B, C, h, w, H, W)
    "7 to 14": (2, 9, 7, 7, 14, 14),
    "odd": (3, 5, 3, 4, 7, 11),
    "as fine": (2, 3, 5, 2, 5, 2),
    "coarser": (1, 4, 6, 6, 3, 4),
    "a row": (2, 2, 1, 3, 1, 9),
    "several tiles": (5, 500, 4, 4, 20, 20),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_formula(shape):
    B, C, h, w, H, W = shape
    maps, finer = guarded((B, h, w)), guarded((B, C, H, W)) + 2
    got = ops.refine(maps, finer)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(maps, finer), atol=1e-5, rtol=1e-4)
    double = ops.refine(maps.double(), finer.double())
    torch.testing.assert_close(double, formula(maps, finer), atol=1e-12, rtol=1e-9)


def test_by_hand():
    # u = (1, 0), so h = (3, 5); means (2, 5), variances (1, 0), their mean .5.
    maps = torch.tensor([[[4.0, -7.0]]])
    finer = torch.tensor([[[[3.0, 1.0]], [[5.0, 5.0]]]])
    # v = (1 / 1.05, 0), f = relu((1, -1) / 1.05), the map (1, 0).
    torch.testing.assert_close(ops.refine(maps, finer), torch.tensor([[[1.0, 0.0]]]))
    # Three pixels (1, .5, 0), cubes (1, .125, 0) / 1.125: h = .889, m = 1/3, s = 2/9;
    # f is in proportion to (1 - 1/3, 0, 0), the channel being hot at the first pixel alone.
    maps, finer = torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]])
    torch.testing.assert_close(ops.refine(maps, finer), torch.tensor([[[1.0, 0.0, 0.0]]]))
    # Cold where the map is hot: v is negative, and f in proportion to (2/3, -1/3, -1/3) again.
    torch.testing.assert_close(ops.refine(maps, 1 - finer), torch.tensor([[[1.0, 0.0, 0.0]]]))
    # Two steps up (1, 2, 2): h = 1.111, m = 5/3, so f is (2/3, 0, 0), and the middle is lost.
    finer = torch.tensor([[[[1.0, 2.0, 2.0]]]])
    torch.testing.assert_close(ops.refine(maps, finer), torch.tensor([[[1.0, 0.0, 0.0]]]))
    # (2, 1, 0) is the map itself: f is (1, 0, -1), clamped.
    finer = torch.tensor([[[[2.0, 1.75, 0.0]]]])  # f in proportion to (.75, .5, -1.25)
    torch.testing.assert_close(ops.refine(maps, finer), torch.tensor([[[1.0, 1 / 3, 0.0]]]))


def test_a_map_without_a_positive_value_stays_flat():
    maps = torch.stack([torch.zeros(3, 3), torch.full((3, 3), -2.0), torch.rand(3, 3)])
    got = ops.refine(maps, torch.randn(3, 4, 6, 6))
    assert got[:2].abs().sum() == 0
    assert got[2].max() > 0


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-30, 7e37])
def test_what_is_the_same_everywhere_says_nothing(value):
    # Rounding divided by its own maximum would be a map of noise.
    even = torch.full((1, 3, 5), value)
    got = ops.refine(even, torch.randn(1, 4, 9, 7) + 100)
    torch.testing.assert_close(got, torch.ones(1, 9, 7))
    maps = torch.rand(1, 3, 5) + 0.1
    u = F.interpolate((maps / maps.max())[None], size=(9, 7), mode="bilinear")[0]
    constant = torch.tensor([0.1, 300.7, -0.3])[:, None, None].expand(1, 3, 9, 7)
    torch.testing.assert_close(ops.refine(maps * value, constant), u)


def test_scales_do_not_matter():
    maps, finer = torch.rand(2, 4, 4), torch.randn(2, 6, 8, 8)
    wanted = ops.refine(maps, finer)
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(ops.refine(maps * scale, finer), wanted)
    for scale in (2.0**-30, 2.0**30):
        torch.testing.assert_close(ops.refine(maps, finer * scale), wanted)


def test_a_mean_far_from_zero_costs_little():
    maps, finer = torch.rand(2, 4, 4), torch.randn(2, 6, 8, 8)
    shifted = (finer * 2**10).round() / 2**10 + 1000  # exact
    got = ops.refine(maps, shifted)
    torch.testing.assert_close(got.double(), formula(maps, shifted), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_make_their_own_map_nan(value):
    maps, finer = torch.rand(3, 4, 4), torch.randn(3, 6, 8, 8)
    wanted = ops.refine(maps, finer)
    maps[0, 1, 2] = value
    finer[1, 4, 7, 3] = value
    got = ops.refine(maps, finer)
    assert got[:2].isnan().all()
    assert torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_sums_in_float32(dtype):
    maps, finer = guarded((2, 5, 5), dtype), guarded((2, 64, 10, 10), dtype)
    truth = formula(maps, finer)
    assert_error_bounded(ops.refine(maps, finer), truth, truth.to(dtype), 1e-5)


def test_layouts_agree():
    maps, finer = torch.rand(2, 4, 4), torch.randn(2, 6, 8, 6)
    wanted = ops.refine(maps, finer)
    for other in (
        finer.contiguous(memory_format=torch.channels_last),
        strided(finer),
        finer.mT.contiguous().mT,
    ):
        torch.testing.assert_close(ops.refine(strided(maps), other), wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_takes_no_copy_of_the_output(memory_format):
    finer = torch.randn(8, 256, 32, 32).contiguous(memory_format=memory_format)  # 8 MiB
    maps = torch.rand(8, 4, 4)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        ops.refine(maps, finer)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert max(sizes) < finer.numel() * 4 // 2


def test_no_images():
    assert ops.refine(torch.ones(0, 2, 2), torch.ones(0, 3, 4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"maps": torch.ones(2, 3)}, ValueError, r"`maps` must have shape \[B, h, w\]"),
        ({"maps": torch.ones(2, 3, 3).int()}, TypeError, "`maps` must have dtype .* got int32"),
        ({"maps": torch.ones(2, 0, 3)}, ValueError, r"`maps` must have pixels, got \[2, 0, 3\]"),
        ({"finer": torch.ones(3, 4, 6, 6)}, ValueError, r"`finer` must have .* with B = 2"),
        ({"finer": torch.ones(2, 4, 6, 0)}, ValueError, "`finer` must have pixels"),
        ({"finer": torch.ones(2, 0, 6, 6)}, ValueError, "`finer` must have pixels"),
        ({"finer": torch.ones(2, 1, 6, 6, device="meta")}, ValueError, "`finer` must be on the"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of"),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {"maps": torch.ones(2, 3, 3), "finer": torch.ones(2, 4, 6, 6), **change}
    with pytest.raises(error, match=words):
        ops.refine(**arguments)
