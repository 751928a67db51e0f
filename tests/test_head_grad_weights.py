"""ops.head_grad_weights: the closed form against autograd through the head."""

import pytest
import torch
import torch.nn.functional as F
from helpers import guarded, norm_error, strided

from gcfast import ops

SHAPES = [(1, 1, 1, 1, (1, 2)), (3, 5, 17, 7, (3, 5)), (2, 4, 64, 13, (7, 7)), (0, 2, 4, 3, (2, 2))]


def _autograd(activations, weight, bias, cotangents, valid, normalize, method):
    """One backward pass a triplet through pooling, linear layer and norm, in float64."""
    per_triplet = []
    for t in range(valid.shape[1]):
        leaf = activations.double().requires_grad_()
        output = leaf.mean((2, 3)) @ weight.double().T + bias.double()
        output = F.normalize(output, dim=1) if normalize else output
        (gradient,) = torch.autograd.grad(output, leaf, cotangents[:, t].double())
        per_triplet.append(gradient)
    gradients = torch.stack(per_triplet, 1)
    return ops.grad_weights(gradients, valid, activations=activations.double(), method=method)


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_autograd(shape, normalize, method):
    B, T, C, D, grid = shape
    activations = guarded((B, C, *grid)).clamp(min=0)
    weight, bias, cotangents = guarded((D, C)), guarded((D,)), guarded((B, T, D))
    valid = torch.rand(B, T) < 0.7
    wanted = _autograd(activations, weight, bias, cotangents, valid, normalize, method)

    raw = activations.double().mean((2, 3)) @ weight.double().T + bias.double()
    got = ops.head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=grid[0] * grid[1],
        embeddings=F.normalize(raw, dim=1).float() if normalize else None,
        norms=raw.norm(dim=1).float() if normalize else None,
        activation_sums=activations.sum((2, 3)),
        method=method,
    )
    assert got.dtype == torch.float32
    if B:
        # An anchor without a valid triplet is all zeros on both sides.
        assert norm_error(got[valid.any(1)], wanted[valid.any(1)]) < 1e-5  # worst seen 5e-7
        assert got[~valid.any(1)].abs().sum() == 0


def test_by_hand():
    # u = (3, 4), |u| = 5, f = (.6, .8); c = (1, 0): c' = (1 - .36, -.48) / 5.
    got = ops.head_grad_weights(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        pixels=2,
        embeddings=torch.tensor([[0.6, 0.8]]),
        norms=torch.tensor([5.0]),
    )
    torch.testing.assert_close(got, torch.tensor([[0.064, -0.048, 0.016]]))


def test_strides_and_low_precision():
    cotangents, weight = torch.randn(2, 3, 8), torch.randn(8, 5)
    wanted = ops.head_grad_weights(cotangents, weight, pixels=4)
    got = ops.head_grad_weights(strided(cotangents), weight.T.contiguous().T, pixels=4)
    torch.testing.assert_close(got, wanted)
    half = ops.head_grad_weights(cotangents.half(), weight.half(), pixels=4)
    assert half.dtype == torch.float32
    exact = ops.head_grad_weights(cotangents.half().float(), weight.half().float(), pixels=4)
    torch.testing.assert_close(half, exact)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cotangents": torch.ones(2, 4)}, ValueError, r"`cotangents` must have shape \[B, T, D\]"),
        ({"weight": torch.ones(5, 6)}, ValueError, r"\[D, C\] with D = 4, got \[5, 6\]"),
        ({"pixels": 0}, ValueError, "`pixels` must be at least 1, got 0"),
        ({"pixels": 2.0}, TypeError, "`pixels` must be an int, got 2.0"),
        ({"embeddings": torch.ones(2, 4)}, ValueError, "`embeddings` and `norms` must be given"),
        ({"method": "gradcam++"}, ValueError, "`activation_sums` must be given"),
        (
            {"embeddings": torch.ones(2, 4), "norms": torch.ones(3)},
            ValueError,
            r"`norms` must have shape \[B\] with B = 2",
        ),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {"cotangents": torch.ones(2, 3, 4), "weight": torch.ones(4, 6), "pixels": 9}
    arguments.update(change)
    with pytest.raises(error, match=words):
        ops.head_grad_weights(arguments.pop("cotangents"), arguments.pop("weight"), **arguments)
