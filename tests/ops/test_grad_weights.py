"""ops.grad_weights: the average of gradients over space and triplets, Grad-CAM and Grad-CAM++."""

import functools

import pytest
import torch
from helpers import assert_error_bounded, guarded, strided

from gcfast import ops, reference
from gcfast.kernels.grad_weights import launch_grad_weights
from gcfast.kernels.launch import RUN_BYTES, grad_weights_config

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 17, 5, 7), (3, 1, 5, 13, 11), (0, 2, 3, 2, 2), (2, 4, 1, 1, 3)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "gaps": strided,
    "channels last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "triplets first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "transposed": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def _on_device(device):
    with device:
        yield


@pytest.fixture(params=BACKENDS)
def grad_weights(request):
    """The operation by each backend."""
    return functools.partial(ops.grad_weights, backend=request.param)


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
@pytest.mark.usefixtures("poisoned")
def test_matches_the_definition(shape, dtype, method, grad_weights):
    B, T, C, H, W = shape
    gradients = guarded(shape, dtype)
    activations = guarded((B, C, H, W), dtype)
    valid = torch.rand(B, T) < 0.7
    truth = _loop(gradients, valid, activations, method)
    got = grad_weights(gradients, valid, activations=activations, method=method)
    assert got.dtype == torch.float32
    assert got.shape == (B, C)
    same = truth.to(dtype)  # as good as plain PyTorch could be in the inputs' dtype
    assert_error_bounded(got, truth, same, 1e-6)


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout, method, grad_weights):
    gradients = LAYOUTS[layout](torch.randn(2, 3, 5, 4, 6))
    activations = torch.rand(2, 5, 4, 6)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    wanted = reference.grad_weights(
        gradients.clone(memory_format=torch.contiguous_format),
        valid,
        activations=activations,
        method=method,
    )
    got = grad_weights(
        gradients,
        valid.T.contiguous().T,
        activations=activations.contiguous(memory_format=torch.channels_last),
        method=method,
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("contiguous", (2, 9, 21, 7, 7)),
        ("contiguous", (1, 5, 3, 33, 35)),  # too many pixels for the run kernel
        ("channels last", (2, 9, 21, 7, 7)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_parts_of_the_triplets_add_up(layout, shape, method):
    B, T, C, H, W = shape
    gradients = LAYOUTS[layout](torch.randn(shape))
    activations = torch.rand(B, C, H, W)
    valid = torch.rand(B, T) < 0.6
    truth = reference.grad_weights(
        gradients.double(), valid, activations=activations.double(), method=method
    )
    is_run = layout == "contiguous"
    config = grad_weights_config(B, T, C, H * W, 4, is_run=is_run, is_last=not is_run, sms=1)
    for splits in (1, 4, 100):
        got = launch_grad_weights(
            gradients,
            valid,
            activations=activations,
            method=method,
            config=config._replace(splits=splits),
        )
        torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-6)


def test_many_multiprocessors_split_few_images():
    shape = {"T": 50, "C": 2048, "P": 49, "itemsize": 4, "is_run": True, "is_last": False}
    assert grad_weights_config(B=64, sms=132, **shape).splits == 1
    few = grad_weights_config(B=1, sms=132, **shape)
    assert few.splits == 4  # 103 programs; no part shorter than three blocks of triplets
    assert grad_weights_config(B=1, sms=132, **{**shape, "T": 1}).splits == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("P", [1, 4, 49, 100, 196, 784, 1024])
def test_blocks_of_a_run_start_where_vectors_do(P, itemsize):
    config = grad_weights_config(
        B=8, T=50, C=2048, P=P, itemsize=itemsize, is_run=True, is_last=False, sms=132
    )
    assert config.channels * P * itemsize <= RUN_BYTES
    assert config.channels * P * itemsize % 16 == 0
    assert config.align * itemsize == 16
    # At least half of the lanes have something to read.
    assert config.channels * P * itemsize > RUN_BYTES // 2


def test_an_odd_number_of_many_pixels_is_read_unaligned():
    config = grad_weights_config(
        B=8, T=50, C=2048, P=729, itemsize=2, is_run=True, is_last=False, sms=132
    )
    assert (config.channels, config.align) == (2, 2)


@pytest.mark.parametrize("no_triplets", [0, 3])
def test_no_triplet_at_all(no_triplets, grad_weights):
    gradients = torch.ones(2, no_triplets, 3, 2, 2)
    valid = torch.zeros(2, no_triplets, dtype=torch.bool)
    assert grad_weights(gradients, valid).tolist() == [[0.0] * 3] * 2


def test_by_hand(grad_weights):
    gradients = torch.tensor([[[[[1.0, 2.0]], [[-4.0, 0.0]]], [[[3.0, 6.0]], [[2.0, 2.0]]]]])
    activations = torch.tensor([[[[0.5, 0.5]], [[0.0, 0.0]]]])  # sums 1 and 0
    both = grad_weights(gradients)
    torch.testing.assert_close(both, torch.tensor([[3.0, 0.0]]))
    first = grad_weights(gradients, torch.tensor([[True, False]]))
    torch.testing.assert_close(first, torch.tensor([[1.5, -2.0]]))
    plus = grad_weights(gradients, activations=activations, method="gradcam++")
    # Channel 0: (1/3 + 2/4 + 3/5 + 6/8) / 2; channel 1: (0 + 0 + 2/2 + 2/2) / 2.
    torch.testing.assert_close(plus, torch.tensor([[(1 / 3 + 0.5 + 0.6 + 0.75) / 2, 1.0]]))


def test_no_valid_triplet_gives_zeros_and_hides_nan(grad_weights):
    gradients = torch.full((2, 2, 3, 2, 2), float("nan"))
    gradients[1, 0] = 1
    valid = torch.tensor([[False, False], [True, False]])
    got = grad_weights(gradients, valid)
    torch.testing.assert_close(got, torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_nan_in_a_valid_triplet_is_kept(grad_weights):
    gradients = torch.zeros(1, 1, 2, 2, 2)
    gradients[0, 0, 1, 0, 0] = float("nan")
    assert grad_weights(gradients).isnan().tolist() == [[False, True]]


def test_negative_activations_keep_the_denominator_positive(grad_weights):
    gradients = torch.full((1, 1, 1, 2, 2), 3.0)
    activations = torch.full((1, 1, 2, 2), -1 / 6)  # 2 + 3 * sum would be 0
    got = grad_weights(gradients, activations=activations, method="gradcam++")
    torch.testing.assert_close(got, torch.tensor([[4 * 3 / 2]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
def test_an_activation_sum_that_overflows_hides_nothing(grad_weights):
    gradients = torch.tensor([[[[[1.0, 2.0, 3.0]]]], [[[[1.0, 0.0, 3.0]]]]])
    activations = torch.full((2, 1, 1, 3), 3e38)  # sum inf: g / inf is 0, 0 * inf is NaN
    got = grad_weights(gradients, activations=activations, method="gradcam++")
    assert got.nan_to_num(nan=-1).tolist() == [[0.0], [-1.0]]
    hidden = grad_weights(
        gradients[None, :, 0].transpose(0, 1),
        torch.tensor([[True], [False]]),
        activations=activations,
        method="gradcam++",
    )
    assert hidden.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_beyond_2_31_elements(layout, method):
    # On the CPU only the pages that are written take memory.
    buffer = torch.empty(2**31 + 2**20, dtype=torch.float16)
    C, H, W = 8, 3, 3
    inner = (1, W * C, C) if layout == "channels last" else (H * W, W, 1)
    gradients = buffer.as_strided((2, 2, C, H, W), (2**31, C * H * W, *inner))
    gradients[0], gradients[1] = 0, 2
    got = ops.grad_weights(
        gradients, activations=torch.zeros(2, C, H, W), method=method, backend="triton"
    )
    wanted = 2.0 if method == "gradcam" else 9.0
    assert torch.equal(got, torch.tensor([[0.0], [wanted]]).expand(2, C))


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
            "`activations` must be on the device of `gradients`, (cpu|cuda:0), got meta",
        ),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {"gradients": torch.ones(2, 3, 4, 5, 5), **change}
    gradients, valid = arguments.pop("gradients"), arguments.pop("valid", None)
    with pytest.raises(error, match=words):
        ops.grad_weights(gradients, valid, **arguments)
