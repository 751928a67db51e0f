"""explain_toward: vectors of the embedding space pulled back to the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import AFFINE_HEADS, CHANNELS, DIM, OTHER_HEADS, Net, common, loader, other, pictures
from torch import Tensor

import gcfast
from gcfast import ops

HEADS = AFFINE_HEADS | OTHER_HEADS
RAW = {"normalize": None, "relu": False, "size": (4, 4)}


def by_hand(model: Net, images: Tensor, cotangents: Tensor, method: str, kept: int) -> Tensor:
    """Raw maps, by autograd through the whole head and the norm."""
    maps = model.backbone(images).detach().requires_grad_()
    embeddings = F.normalize(model.head(maps).flatten(1), dim=1)
    (gradient,) = torch.autograd.grad((embeddings * cotangents).sum(), maps)
    weights = ops.grad_weights(gradient[:, None], activations=maps.detach(), method=method)
    dropped = weights.topk(CHANNELS - kept, largest=False).indices
    return torch.einsum("bc,bchw->bhw", weights.scatter(1, dropped, 0.0), maps.detach())


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "proxy"])
@pytest.mark.parametrize("head", HEADS)
def test_equals_autograd(head: str, method: str) -> None:
    torch.manual_seed(2)
    model, images = Net(HEADS[head](CHANNELS)).eval(), pictures(3)[0]
    cotangents = torch.randn(3, model(images).shape[1])
    channels = {} if method == "proxy" else {"channels": 5}
    one = gcfast.Explainer(model, "backbone", method=method, **channels)
    got = one.explain_toward(images, cotangents, **RAW)
    method, kept = ("gradcam", CHANNELS) if method == "proxy" else (method, 5)
    wanted = by_hand(model, images, cotangents, method, kept)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_another_image_and_one_to_tell_it_from_is_a_triplet() -> None:
    model = other().eval()
    one = gcfast.Explainer(model, "backbone", channels=5, objective=gcfast.DistanceDifference())
    a, p, n = pictures(9)[0].split(3)
    near, far = (F.normalize(model(i), dim=1).detach() for i in (p, n))
    wanted = one.explain_triplet(a, p, n).anchor
    torch.testing.assert_close(one.explain_toward(a, near - far), wanted, rtol=1e-4, atol=1e-5)
    # Whatever the sign of the explainer's rows: the direction is in the vector.
    against = gcfast.Explainer(model, "backbone", channels=5, evidence="against")
    torch.testing.assert_close(against.explain_toward(a, near - far), wanted, rtol=1e-4, atol=1e-5)


def test_one_vector_for_all_and_its_length() -> None:
    one, images = gcfast.Explainer(common().eval(), "backbone", channels=5), pictures(3)[0]
    vector = torch.randn(DIM)
    wanted = one.explain_toward(images, vector.expand(3, DIM))
    torch.testing.assert_close(one.explain_toward(images, vector), wanted)
    torch.testing.assert_close(one.explain_toward(images, 7 * vector.double()), wanted)
    nothing = one.explain_toward(images, torch.zeros(DIM))
    assert torch.equal(nothing, torch.zeros(3, 8, 8))


def test_center_needs_a_database() -> None:
    one, images = gcfast.Explainer(common().eval(), "backbone", channels=5), pictures(3)[0]
    vector = torch.randn(DIM)
    with pytest.raises(gcfast.NoDatabaseError, match="`center` must be 0 without"):
        one.explain_toward(images, vector, center=1.0)
    one.build(loader(*pictures(12)))
    plain, centered = (one.explain_toward(images, vector, center=c, **RAW) for c in (0.0, 1.0))
    shift = (plain - centered).flatten(1)
    assert (shift - shift[:, :1]).abs().max() < 1e-6
    assert shift.abs().min() > 0


@pytest.mark.parametrize(
    ("cotangents", "error", "words"),
    [
        ([0.0] * DIM, TypeError, "`cotangents` must be a torch.Tensor, got list"),
        (torch.ones(DIM, dtype=torch.int64), TypeError, "must be floating point, got int64"),
        (torch.ones(DIM + 1), ValueError, rf"or \[B, D\] with D = {DIM}, the .* got \[{DIM + 1}\]"),
        (torch.ones(2, DIM), ValueError, rf"or \[B, D\] with B = 3, got \[2, {DIM}\]"),
        (torch.ones(3, DIM, 1), ValueError, r"`cotangents` must have shape \[D\] or \[B, D\]"),
        (torch.full((DIM,), torch.nan), ValueError, "`cotangents` must be finite"),
        (torch.ones(DIM, device="meta"), ValueError, "on the images' device, cpu, got meta"),
    ],
    ids=["list", "int", "D", "B", "rank", "nan", "device"],
)
def test_other_vectors_are_refused(cotangents: Any, error: type[Exception], words: str) -> None:
    one = gcfast.Explainer(common().eval(), "backbone", channels=5)
    with pytest.raises(error, match=words):
        one.explain_toward(pictures(3)[0], cotangents)
    assert one.explain_toward(torch.empty(0, 3, 8, 6), torch.ones(DIM)).shape == (0, 8, 6)
