"""explain_pair: the cosine of two images, split over the places of either one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from networks import (
    AFFINE_HEADS,
    CHANNELS,
    DIM,
    OTHER_HEADS,
    GeM,
    Lambda,
    Net,
    Normalize,
    Pool,
    TokenNet,
    common,
    loader,
    pictures,
)
from torch import Tensor, nn

import gcfast
from gcfast.method.held_norms import HeldNorms

RAW = {"normalize": None, "relu": False}
HEADS = AFFINE_HEADS | OTHER_HEADS
TOLERANCE = 1e-5


def two(count: int = 3, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    return pictures(count, size=size)[0], pictures(count, size=size)[0]


def of_timm(name: str, **settings: Any) -> nn.Module:
    library("timm")
    import timm

    return timm.create_model(name, num_classes=0, **settings).eval()  # type: ignore[no-any-return]


def of_torchvision() -> nn.Module:
    library("torchvision")
    import torchvision

    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()  # type: ignore[no-any-return]


def timm_gem() -> nn.Module:
    model = of_timm("resnet18")
    model.global_pool = GeM()
    return model


def activations(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """(what the layer gives, what the model gives)."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: kept.append(out))
    try:
        output = model(images)
    finally:
        handle.remove()
    return kept[0].detach(), output.detach()


@pytest.mark.parametrize("make", [of_torchvision, lambda: of_timm("resnet18")], ids=["tv", "timm"])
def test_of_a_resnet_by_hand(make: Callable[[], nn.Module]) -> None:
    model, (x, y) = make(), two(2, (64, 96))
    maps, u = activations(model, "layer4", x)
    target = F.normalize(model(y), dim=1).detach()
    wanted = torch.einsum("bchw,bc->bhw", maps, target) / (6 * u.norm(dim=1))[:, None, None]
    got = gcfast.Explainer(model).explain_pair(x, y, size=(2, 3), **RAW)
    torch.testing.assert_close(got.query_parts, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.query, got.query_parts)
    cosine = F.cosine_similarity(u, model(y)).detach()
    torch.testing.assert_close(got.similarity, cosine)
    for parts, rest in ((got.query_parts, got.query_rest), (got.match_parts, got.match_rest)):
        assert (parts.sum((1, 2)) - cosine).abs().max() < TOLERANCE
        assert rest.abs().max() < TOLERANCE  # the head has no bias


def test_of_generalized_mean_pooling_by_hand() -> None:
    model, (x, y) = timm_gem(), two(2, (64, 96))
    maps, u = activations(model, "layer4", x)
    target = F.normalize(model(y), dim=1).detach()
    cubes = maps.clamp(min=1e-6) ** 3
    shares = cubes / cubes.sum((2, 3), keepdim=True) * u[..., None, None]
    wanted = torch.einsum("bchw,bc->bhw", shares, target) / u.norm(dim=1)[:, None, None]
    got = gcfast.Explainer(model, "layer4").explain_pair(x, y, size=(2, 3), **RAW)
    torch.testing.assert_close(got.query_parts, wanted, rtol=1e-4, atol=1e-6)
    assert (got.query.sum((1, 2)) - got.similarity).abs().max() < TOLERANCE
    assert got.query_rest.abs().max() < TOLERANCE


VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": (32, 48)}


def biased(model: nn.Module) -> nn.Module:
    """The model with scales and biases that are not those of its beginning."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def test_of_a_vision_transformer_that_averages_by_hand() -> None:
    # The layer norm behind the average is linear once its deviation is held fast.
    model, (x, y) = (
        biased(of_timm("vit_tiny_patch16_224", global_pool="avg", **VIT)),
        two(2, (32, 48)),
    )
    one = gcfast.Explainer(model, "blocks.2")
    tokens, u = activations(model, "blocks.2", x)
    places = tokens[:, 1:]
    pooled, norm = places.mean(1), model.fc_norm
    deviation = (pooled.var(1, unbiased=False) + norm.eps).sqrt()
    centered = (places - places.mean(2, keepdim=True)) / deviation[:, None, None]
    each = centered * norm.weight + norm.bias
    torch.testing.assert_close(each.mean(1), u, rtol=1e-4, atol=1e-5)
    target = F.normalize(model(y), dim=1)
    wanted = (each * target[:, None]).sum(2).detach() / (24 * u.norm(dim=1, keepdim=True))
    got = one.explain_pair(x, y, size=(4, 6), **RAW)
    torch.testing.assert_close(got.query.flatten(1), wanted, rtol=1e-4, atol=1e-6)
    for maps in (got.query, got.match, got.query_parts, got.match_parts):
        assert (maps.sum((1, 2)) - got.similarity).abs().max() < TOLERANCE
    bias = (target * norm.bias).sum(1).detach() / u.norm(dim=1)
    torch.testing.assert_close(got.query_rest, bias, rtol=1e-4, atol=1e-5)


def test_of_a_vision_transformer_with_a_class_token() -> None:
    model, (x, y) = biased(of_timm("vit_tiny_patch16_224", **VIT)), two(2, (32, 48))
    one = gcfast.Explainer(model)
    got = one.explain_pair(x, y, size=(4, 6), **RAW)
    assert one.layer_name == "blocks.2.norm1"
    for maps, rest in ((got.query, got.query_rest), (got.match, got.match_rest)):
        assert (maps.sum((1, 2)) - got.similarity).abs().max() < TOLERANCE
        assert (rest / got.similarity).min() > 0.2  # the class token's own, which has no place
    apart = one.explain_pair(x, y, size=(4, 6), spread_rest=False, **RAW)
    torch.testing.assert_close(apart.query_parts, got.query_parts)
    spread = got.query_rest[:, None, None] / 24
    torch.testing.assert_close(apart.query, got.query - spread, rtol=1e-4, atol=1e-6)
    normalized = one.explain_pair(x, y, size=(4, 6), relu=False).query
    peaks = apart.query.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(normalized, apart.query / peaks)
    normalized = one.explain_pair(x, y, size=(4, 6), relu=False, spread_rest=True).query
    peaks = got.query.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(normalized, got.query / peaks)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_held_norms_have_the_values_of_norms(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    weight, bias = torch.rand(3, 5).to(dtype), torch.rand(3, 5).to(dtype)
    function = getattr(F, kind)
    both = {"layer_norm": ((weight, bias), (weight,), ()), "rms_norm": ((weight,), ())}
    for parameters in both[kind]:
        for eps in ({"eps": 1e-3}, {}):
            wanted = function(x, (3, 5), *parameters, **eps)
            with HeldNorms():
                got = function(x, (3, 5), *parameters, **eps)
                assert torch.equal(function(x.detach(), (3, 5), *parameters, **eps), wanted)
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted)
    with HeldNorms():
        got = function(x, (3, 5), weight)
    cotangent = torch.randn(4, 3, 5).to(dtype)
    (gradient,) = torch.autograd.grad(got, x, cotangent)
    sums, wanted = (
        (one * two).double().sum((1, 2)) for one, two in ((gradient, x), (cotangent, got))
    )
    assert (sums - wanted).abs().max() < (0.2 if dtype == torch.bfloat16 else 1e-5)  # linear
    wide = x.float() if dtype == torch.bfloat16 else x
    with HeldNorms(), torch.autocast("cpu", torch.bfloat16):
        got = function(wide, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert got.dtype == function(wide, (3, 5)).dtype


@pytest.mark.parametrize("head", HEADS)
def test_sums_to_the_cosine_behind_any_head(head: str) -> None:
    torch.manual_seed(1)
    model, (x, y) = Net(HEADS[head](CHANNELS)).eval(), two()
    got = gcfast.Explainer(model, "backbone").explain_pair(
        x, y, size=(4, 4), correspondence=True, **RAW
    )
    cosine = F.cosine_similarity(model(x), model(y)).detach()
    for maps in (got.similarity[:, None, None], got.query, got.match, got.query_parts):
        assert (maps.sum((1, 2)) - cosine).abs().max() < TOLERANCE
    assert got.correspondence is not None
    torch.testing.assert_close(got.correspondence.sum((3, 4)), got.query_parts)
    torch.testing.assert_close(got.correspondence.sum((1, 2)), got.match_parts)


@pytest.mark.parametrize("head", AFFINE_HEADS)
def test_a_bias_is_part_of_each_place(head: str) -> None:
    # The share of a place is that of its own embedding, the bias included.
    torch.manual_seed(1)
    model, (x, y) = Net(AFFINE_HEADS[head](CHANNELS)).eval(), two()
    parts = [model.head] if isinstance(model.head, Pool) else list(model.head)
    raw = nn.Sequential(*(part for part in parts if not isinstance(part, Normalize)))
    maps, _ = activations(model, "backbone", x)
    places = torch.stack([raw(maps[:, :, i, j, None, None]) for i in range(4) for j in range(4)], 1)
    u = raw(maps)
    target = F.normalize(model(y), dim=1)
    wanted = (places * target[:, None]).sum(2) / (16 * u.norm(dim=1, keepdim=True))
    got = gcfast.Explainer(model, "backbone").explain_pair(x, y, correspondence=True)
    torch.testing.assert_close(got.query_parts.flatten(1), wanted.detach(), rtol=1e-4, atol=1e-6)
    # and of two places that of their two embeddings
    others, _ = activations(model, "backbone", y)
    v = raw(others)
    other = torch.stack(
        [raw(others[:, :, i, j, None, None]) for i in range(4) for j in range(4)], 1
    )
    norms = 16 * 16 * u.norm(dim=1) * v.norm(dim=1)
    each = torch.einsum("bpd,bqd->bpq", places, other) / norms[:, None, None]
    assert got.correspondence is not None
    between = got.correspondence.flatten(3).flatten(1, 2)
    torch.testing.assert_close(between, each.detach(), rtol=1e-4, atol=1e-7)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda u: F.normalize(u, dim=1),
    "scaled": lambda u: 16 * F.normalize(u, dim=1),
    "twice": lambda u: F.normalize(F.normalize(u, dim=1), dim=1),
    "divided": lambda u: u / u.norm(dim=1, keepdim=True),
    "rsqrt": lambda u: u * u.square().sum(1, keepdim=True).rsqrt(),
    "four dimensions": lambda u: F.normalize(u[..., None, None], dim=1),
}


@pytest.mark.parametrize("head", ["linear", "mlp", "gem"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_the_models_own_changes_nothing(name: str, head: str) -> None:
    torch.manual_seed(1)
    inner = HEADS[head](CHANNELS)
    x, y = two()
    plain, ours = (
        gcfast.Explainer(model.eval(), "backbone", l2_normalize=not normalizes)
        for model, normalizes in (
            (Net(inner), False),
            (Net(nn.Sequential(inner, Lambda(NORMS[name]))), True),
        )
    )
    ours.network.model.backbone.load_state_dict(plain.network.model.backbone.state_dict())
    for count in (3, 1):
        got, wanted = (e.explain_pair(x[:count], y[:count]) for e in (ours, plain))
        for values, expected in zip(got[:-1], wanted[:-1], strict=True):
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_that_cannot_be_seen_is_refused() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor) -> Tensor:
            unit = F.normalize(u, dim=1)
            ctx.save_for_backward(unit, u.norm(dim=1, keepdim=True))
            return unit

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            unit, norms = ctx.saved_tensors
            return (gradient - unit * (gradient * unit).sum(1, keepdim=True)) / norms

    head = nn.Sequential(AFFINE_HEADS["linear"](CHANNELS), Lambda(Hidden.apply))
    x, y = two()
    one = gcfast.Explainer(Net(head).eval(), "backbone")
    for count in (3, 1):
        with pytest.raises(gcfast.UnsupportedModelError, match="divides its output by its norm"):
            one.explain_pair(x[:count], y[:count])


def test_images_of_other_sizes_and_one_by_one() -> None:
    one, x, y = gcfast.Explainer(TokenNet().eval(), "first"), *two()
    many = one.explain_pair(x, y, correspondence=True)
    for i in range(3):
        single = one.explain_pair(x[i : i + 1], y[i : i + 1], correspondence=True)
        for values, wanted in zip(single, many, strict=True):
            torch.testing.assert_close(values[0], wanted[i], rtol=1e-4, atol=1e-5)
    y = pictures(3, size=(12, 16))[0]
    got = gcfast.Explainer(common().eval(), "backbone").explain_pair(x, y, correspondence=True)
    assert [m.shape for m in (got.query, got.match)] == [(3, 8, 8), (3, 12, 16)]
    assert got.correspondence is not None
    assert got.correspondence.shape == (3, 4, 4, 6, 8)
    assert (got.match_parts.sum((1, 2)) - got.similarity).abs().max() < TOLERANCE


def test_told_from_a_third_image() -> None:
    one, x, y, z = gcfast.Explainer(common().eval(), "backbone"), *two(), pictures(3)[0]
    got = one.explain_pair(x, y, unlike=z)
    near, far = one.explain_pair(x, y), one.explain_pair(x, z)
    torch.testing.assert_close(got.similarity, near.similarity)
    torch.testing.assert_close(got.query_parts, near.query_parts - far.query_parts)
    other = one.explain_pair(y, z)
    torch.testing.assert_close(got.match_parts, near.match_parts - other.query_parts)
    difference = near.similarity - far.similarity
    assert (got.query_parts.sum((1, 2)) - difference).abs().max() < TOLERANCE
    vectors = F.normalize(one.network.model(z), dim=1).detach()
    by_vector = one.explain_pair(x, y, unlike=vectors)
    torch.testing.assert_close(by_vector.query_parts, got.query_parts)
    mean = vectors.mean(0)  # shorter than 1, and left so
    sums = one.explain_pair(x, y, unlike=mean).match_parts.sum((1, 2))
    unit = F.normalize(one.network.model(y), dim=1).detach()
    torch.testing.assert_close(sums, near.similarity - unit @ mean)
    alike = one.explain_pair(x, y, unlike=y, **RAW)
    assert alike.query.abs().max() < TOLERANCE


def test_center_subtracts_the_usual_share_from_the_maps() -> None:
    one, x, y = gcfast.Explainer(common().eval(), "backbone", channels=4), *two()
    with pytest.raises(gcfast.NoDatabaseError, match="`center` must be 0 without"):
        one.explain_pair(x, y, center=1.0)
    database = one.build(loader(*pictures(12)))
    plain, got = (one.explain_pair(x, y, center=c, size=4, **RAW) for c in (0.0, 1.0))
    torch.testing.assert_close(got.query_parts, plain.query_parts)
    u, target = one.network.model(x), F.normalize(one.network.model(y), dim=1)
    usual = (target @ one.network.model.head[1].weight) @ database.mean_activation
    wanted = plain.query - (usual / (16 * u.norm(dim=1)))[:, None, None]
    torch.testing.assert_close(got.query, wanted.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model, (x, y) = Net(nn.Sequential(GeM(), nn.Linear(CHANNELS, DIM), Normalize())).eval(), two()
    wanted = gcfast.Explainer(model, "backbone").explain_pair(x, y)
    one = gcfast.Explainer(model.to(dtype), "backbone")
    got = one.explain_pair(x.to(dtype), y.to(dtype))
    assert all(values.dtype == torch.float32 for values in got[:-1])
    assert (got.query_parts - wanted.query_parts).abs().max() < 0.02
    assert (got.query_parts.sum((1, 2)) - got.similarity).abs().max() < TOLERANCE


def test_no_pairs_and_wrong_ones() -> None:
    one, x, y = gcfast.Explainer(common().eval()), *two()
    empty = one.explain_pair(x[:0], y[:0], correspondence=True)
    assert [len(values) for values in empty] == [0] * 8
    assert empty.query.shape == (0, 8, 8)
    with pytest.raises(ValueError, match="`query` and `match` must have the same B, got 3, 2"):
        one.explain_pair(x, y[:2])
    with pytest.raises(ValueError, match="`match` and `unlike` must have the same B, got 3, 3, 1"):
        one.explain_pair(x, y, unlike=y[:1])
    with pytest.raises(ValueError, match=rf"`unlike` must .* with D = {DIM}, the embedding's"):
        one.explain_pair(x, y, unlike=torch.ones(DIM + 1))
    with pytest.raises(ValueError, match=r"`unlike` must .* with B = 3, got \[2, 6\]"):
        one.explain_pair(x, y, unlike=torch.ones(2, DIM))
    with pytest.raises(TypeError, match=r"`unlike` must be a torch.Tensor, got str"):
        one.explain_pair(x, y, unlike="z")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`match` must be a torch.Tensor, got list"):
        one.explain_pair(x, [y])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`correspondence` must be a bool, got 'yes'"):
        one.explain_pair(x, y, correspondence="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`spread_rest` must be a bool or None, got 1"):
        one.explain_pair(x, y, spread_rest=1)  # type: ignore[arg-type]
    bad = y.clone()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`images` must .*row 1"):
        one.explain_pair(x, bad)
