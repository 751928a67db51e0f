"""ops.grad_weights: the average of gradients over space and triplets, Grad-CAM and Grad-CAM++."""

import pytest
import torch
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 17, 5, 7), (3, 1, 5, 13, 11), (0, 2, 3, 2, 2), (2, 4, 1, 1, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _loop(gradients, valid, activations, method):
    """The definition, one number at a time over images, triplets and channels, in float64."""
    B, T, C, _, _ = gradients.shape
    out = torch.zeros(B, C, dtype=torch.float64)
    for b in range(B):
        for k in range(C):
            values = []
            for t in range(T):
                if not valid[b, t]:
                    continue
                g = gradients[b, t, k].double()
                if method == "gradcam":
                    values.append(float(g.mean()))
                else:
                    total = max(0.0, float(activations[b, k].double().sum()))
                    values.append(sum(max(0.0, v) / (2 + max(0.0, v) * total) for v in g.flatten()))
            out[b, k] = sum(values) / max(len(values), 1)
    return out


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, dtype, method):
    B, T, C, H, W = shape
    gradients, activations = guarded(shape, dtype), guarded((B, C, H, W), dtype)
    valid = torch.rand(B, T) < 0.7
    truth = _loop(gradients, valid, activations, method)
    got = ops.grad_weights(gradients, valid, activations=activations, method=method)
    assert got.dtype == torch.float32
    assert got.shape == (B, C)
    same = truth.to(dtype)  # as good as plain PyTorch could be in the inputs' dtype
    assert_error_bounded(got, truth, same, 1e-6)


@pytest.mark.parametrize("method", ops.METHODS)
def test_strides_do_not_matter(method):
    gradients, activations = torch.randn(2, 3, 5, 4, 6), torch.rand(2, 5, 4, 6)
    wanted = ops.grad_weights(gradients, activations=activations, method=method)
    got = ops.grad_weights(
        strided(gradients),
        activations=activations.contiguous(memory_format=torch.channels_last),
        method=method,
    )
    torch.testing.assert_close(got, wanted)


def test_by_hand():
    gradients = torch.tensor([[[[[1.0, 2.0]], [[-4.0, 0.0]]], [[[3.0, 6.0]], [[2.0, 2.0]]]]])
    activations = torch.tensor([[[[0.5, 0.5]], [[0.0, 0.0]]]])  # sums 1 and 0
    both = ops.grad_weights(gradients)
    torch.testing.assert_close(both, torch.tensor([[3.0, 0.0]]))
    first = ops.grad_weights(gradients, torch.tensor([[True, False]]))
    torch.testing.assert_close(first, torch.tensor([[1.5, -2.0]]))
    plus = ops.grad_weights(gradients, activations=activations, method="gradcam++")
    # Channel 0: (1/3 + 2/4 + 3/5 + 6/8) / 2; channel 1: (0 + 0 + 2/2 + 2/2) / 2.
    torch.testing.assert_close(plus, torch.tensor([[(1 / 3 + 0.5 + 0.6 + 0.75) / 2, 1.0]]))


def test_no_valid_triplet_gives_zeros_and_hides_nan():
    gradients = torch.full((2, 2, 3, 2, 2), float("nan"))
    gradients[1, 0] = 1
    valid = torch.tensor([[False, False], [True, False]])
    got = ops.grad_weights(gradients, valid)
    torch.testing.assert_close(got, torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_nan_in_a_valid_triplet_is_kept():
    gradients = torch.zeros(1, 1, 2, 2, 2)
    gradients[0, 0, 1, 0, 0] = float("nan")
    assert ops.grad_weights(gradients).isnan().tolist() == [[False, True]]


def test_negative_activations_keep_the_denominator_positive():
    gradients = torch.full((1, 1, 1, 2, 2), 3.0)
    activations = torch.full((1, 1, 2, 2), -1 / 6)  # 2 + 3 * sum would be 0
    got = ops.grad_weights(gradients, activations=activations, method="gradcam++")
    torch.testing.assert_close(got, torch.tensor([[4 * 3 / 2]]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gradients": [1.0]}, TypeError, "`gradients` must be a torch.Tensor, got list"),
        ({"gradients": torch.ones(2, 3, 4, 4)}, ValueError, r"shape \[B, T, C, H, W\], got"),
        ({"gradients": torch.ones(2, 3, 4, 5, 5).long()}, TypeError, "got int64"),
        ({"gradients": torch.ones(2, 3, 4, 0, 5)}, ValueError, "must have pixels"),
        ({"valid": torch.ones(2, 3)}, TypeError, "`valid` must have dtype bool, got float32"),
        ({"valid": torch.ones(2, 4).bool()}, ValueError, r"\[B, T\] with T = 3, got \[2, 4\]"),
        ({"method": "cam"}, ValueError, "`method` must be one of 'gradcam', 'gradcam\\+\\+'"),
        ({"activations": None, "method": "gradcam++"}, ValueError, "`activations` must be given"),
        (
            {"activations": torch.ones(2, 4, 5, 5, device="meta"), "method": "gradcam++"},
            ValueError,
            "`activations` must be on the device of `gradients`, cpu, got meta",
        ),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {"gradients": torch.ones(2, 3, 4, 5, 5), **change}
    gradients, valid = arguments.pop("gradients"), arguments.pop("valid", None)
    with pytest.raises(error, match=words):
        ops.grad_weights(gradients, valid, **arguments)
