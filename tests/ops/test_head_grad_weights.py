"""ops.head_grad_weights: the closed form against autograd through the head."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import guarded, norm_error, strided

from gcfast import ops, reference
from gcfast.kernels.head_grad_weights import launch_head_grad_weights
from gcfast.kernels.launch import HEAD_GRAD_WEIGHTS_CONFIGS

SHAPES = [(1, 1, 1, 1, (1, 2)), (3, 5, 17, 7, (3, 5)), (2, 4, 64, 13, (7, 7)), (0, 2, 4, 3, (2, 2))]


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


@pytest.fixture(params=["reference", "triton"])
def head_grad_weights(request):
    """The operation by each backend."""
    return functools.partial(ops.head_grad_weights, backend=request.param)


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
@pytest.mark.usefixtures("poisoned")
def test_equals_autograd(shape, normalize, method, head_grad_weights):
    B, T, C, D, grid = shape
    activations = guarded((B, C, *grid)).clamp(min=0)
    weight, bias, cotangents = guarded((D, C)), guarded((D,)), guarded((B, T, D))
    valid = torch.rand(B, T) < 0.7
    wanted = _autograd(activations, weight, bias, cotangents, valid, normalize, method)

    raw = activations.double().mean((2, 3)) @ weight.double().T + bias.double()
    got = head_grad_weights(
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


def test_by_hand(head_grad_weights):
    # u = (3, 4), |u| = 5, f = (.6, .8); c = (1, 0): c' = (1 - .36, -.48) / 5.
    got = head_grad_weights(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        pixels=2,
        embeddings=torch.tensor([[0.6, 0.8]]),
        norms=torch.tensor([5.0]),
    )
    torch.testing.assert_close(got, torch.tensor([[0.064, -0.048, 0.016]]))


def test_strides_and_low_precision(head_grad_weights):
    cotangents, weight = torch.randn(2, 3, 8), torch.randn(8, 5)
    wanted = head_grad_weights(cotangents, weight, pixels=4)
    got = head_grad_weights(strided(cotangents), weight.T.contiguous().T, pixels=4)
    torch.testing.assert_close(got, wanted)
    half = head_grad_weights(cotangents.half(), weight.half(), pixels=4)
    assert half.dtype == torch.float32
    exact = head_grad_weights(cotangents.half().float(), weight.half().float(), pixels=4)
    torch.testing.assert_close(half, exact)


def _arguments(B, T, C, D, valid=0.6):
    """Cotangents, weight, valid and the rest of a call, with NaN where nothing may be read."""
    valid = torch.rand(B, T) < valid
    cotangents = guarded((B, T, D)).masked_fill(~valid[..., None], float("nan"))
    rest = {
        "embeddings": F.normalize(guarded((B, D)), dim=1),
        "norms": torch.rand(B) + 0.5,
        "activation_sums": 9 * torch.randn(B, C),  # of both signs: some are clamped
    }
    return (cotangents, guarded((D, C)), valid), {**rest, "pixels": 6}


def _in_double(args, rest):
    def double(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    return [double(a) for a in args], {name: double(v) for name, v in rest.items()}


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("config", HEAD_GRAD_WEIGHTS_CONFIGS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_block_agrees(config, method):
    # Two blocks of rows, channels and D each, none of them full.
    args, rest = _arguments(B=17 if method == "gradcam" else 2, T=67, C=71, D=37)
    wanted, doubled = _in_double(args, rest)
    truth = reference.head_grad_weights(*wanted, method=method, **doubled)
    got = launch_head_grad_weights(*args, method=method, config=config, **rest)
    # Worst seen: 2e-7 in float32; in bfloat16 halves 2.4e-5 under the interpreter, which truncates.
    assert norm_error(got, truth) < (5e-5 if config.is_split else 1e-6)


@pytest.mark.parametrize("method", ops.METHODS)
def test_what_is_not_valid_is_not_read(method, head_grad_weights):
    args, rest = _arguments(B=3, T=5, C=9, D=7)
    args[2][1] = False  # an image without any: not even its norm matters
    args[0][1] = float("nan")
    rest["norms"][1], rest["embeddings"][1] = 0, float("nan")
    got = head_grad_weights(*args, method=method, **rest)
    assert got[1].tolist() == [0.0] * 9
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("method", ops.METHODS)
def test_nan_in_a_valid_triplet_is_kept(method, head_grad_weights):
    args, rest = _arguments(B=2, T=3, C=5, D=4, valid=1)
    args[0][1, 2, 0] = float("nan")
    got = head_grad_weights(*args, method=method, **rest)
    assert got.isnan().tolist() == [[False] * 5, [True] * 5]


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 5, 0), (0, 3, 5, 4)], ids=str)
def test_nothing_to_add(shape, method, head_grad_weights):
    B, T, C, D = shape
    args = (torch.ones(B, T, D), torch.ones(D, C))
    got = head_grad_weights(*args, pixels=4, activation_sums=torch.ones(B, C), method=method)
    assert torch.equal(got, torch.zeros(B, C))


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize(
    ("precision", "allowed"),
    # float32: worst seen on the CPU 2e-7. TF32, its rounding emulated there: 3e-4 at D = 128.
    [("ieee", 2e-6), ("tf32", 1e-3)],
)
def test_precision(precision, allowed, method):
    args, rest = _arguments(B=2, T=5, C=64, D=128)
    wanted, doubled = _in_double(args, rest)
    truth = reference.head_grad_weights(*wanted, method=method, **doubled)
    got = ops.head_grad_weights(*args, method=method, precision=precision, backend="triton", **rest)
    assert norm_error(got, truth) < allowed


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize(
    ("weight", "is_copied"),
    [
        (torch.empty(4, 32), False),
        (torch.empty(4, 5), True),
        (torch.empty(32, 4).T, True),
        (torch.empty(4, 32).half(), True),
    ],
    ids=["as it is", "odd", "transposed", "float16"],
)
def test_the_product_reads_whole_vectors_of_float32(weight, is_copied, method, monkeypatch):
    given = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **_: given.append(args)

    for name in ("_head_weight_kernel", "_head_project_kernel", "_head_product_kernel"):
        monkeypatch.setattr(f"gcfast.kernels.head_grad_weights.{name}", Kernel())
    sums = torch.ones(2, weight.shape[1])
    launch_head_grad_weights(
        torch.empty(2, 3, 4), weight, pixels=2, activation_sums=sums, method=method
    )
    assert len(given) == 2 + is_copied
    factor = given[-1][2]
    assert (factor is not weight) == is_copied
    assert factor.dtype == torch.float32
    assert factor.stride()[-2] % 16 == 0


def test_beyond_2_31_elements():
    # On the CPU only the pages that are written take memory.
    buffer = torch.empty(2**31 + 2**20, dtype=torch.float16)
    cotangents = buffer.as_strided((2, 3, 4), (2**31, 4, 1))
    cotangents[0], cotangents[1] = 0, 2
    weight = torch.ones(4, 5)
    for method, wanted in (("gradcam", 8 / 2), ("gradcam++", 2 * 4 / 2)):
        got = ops.head_grad_weights(
            cotangents,
            weight,
            pixels=2,
            activation_sums=torch.zeros(2, 5),
            method=method,
            backend="triton",
        )
        assert torch.equal(got, torch.tensor([[0.0], [wanted]]).expand(2, 5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cotangents": torch.ones(2, 4)}, ValueError, r"`cotangents` must have shape \[B, T, D\]"),
        ({"weight": torch.ones(5, 6)}, ValueError, r"\[D, C\] with D = 4, got \[5, 6\]"),
        ({"pixels": 0}, ValueError, "`pixels` must be at least 1, got 0"),
        ({"pixels": 2.0}, TypeError, "`pixels` must be an int, got 2.0"),
        ({"embeddings": torch.ones(2, 4)}, ValueError, "`embeddings` and `norms` must be given"),
        ({"method": "gradcam++"}, ValueError, "`activation_sums` must be given"),
        ({"precision": "half"}, ValueError, "`precision` must be one of 'ieee', 'tf32', got 'half"),
        (
            {"embeddings": torch.ones(2, 4), "norms": torch.ones(3)},
            ValueError,
            r"`norms` must have shape \[B\] with B = 2",
        ),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words, device):
    arguments = {"cotangents": torch.ones(2, 3, 4), "weight": torch.ones(4, 6), "pixels": 9}
    arguments.update(change)
    for name, value in arguments.items():
        arguments[name] = value.to(device) if torch.is_tensor(value) else value
    with pytest.raises(error, match=words):
        ops.head_grad_weights(arguments.pop("cotangents"), arguments.pop("weight"), **arguments)
