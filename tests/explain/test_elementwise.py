"""method="elementwise": cotangents by hand, maps by their formula, and every call that has maps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    AFFINE_HEADS,
    CHANNELS,
    DIM,
    OTHER_HEADS,
    Lambda,
    Net,
    TokenNet,
    common,
    loader,
    other,
    pictures,
)
from torch import Tensor, nn

import gcfast
from gcfast import reference
from gcfast.builder.given.on_demand import OnDemandDatabase
from gcfast.database.database import Database
from gcfast.method.elementwise import summed

IMAGES, CLASSES = 22, 4
HEADS = {
    "linear": AFFINE_HEADS["linear"],
    **{name: OTHER_HEADS[name] for name in ("gem", "mlp", "flatten")},
}


def built(
    model: nn.Module, layer: str = "backbone", **settings: Any
) -> tuple[gcfast.Explainer, Tensor, Tensor]:
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(model, layer, method="elementwise", **settings)
    one.build(loader(images, labels))
    return one, images, labels


def by_hand(model: Any, images: Tensor, cotangents: Tensor, size: Any = (8, 8)) -> Tensor:
    """relu(sum_c G A), by autograd through the whole head and the norm."""
    activations = model.backbone(images).detach().requires_grad_()
    embeddings = F.normalize(model.head(activations), dim=1)
    (gradients,) = torch.autograd.grad(embeddings, activations, cotangents)
    return reference.elementwise_cam(activations.detach(), gradients, size=size)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=3e-6, rtol=0)


def test_reference_by_hand() -> None:
    activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # [1, 2, 1, 2]
    gradients = torch.tensor([[[[1.0, -1.0]], [[0.5, 9.0]]]])
    raw = reference.elementwise_cam(activations, gradients, size=(1, 2), relu=False, normalize=None)
    assert raw.tolist() == [[[2.5, -2.0]]]
    assert reference.elementwise_cam(activations, gradients, size=(1, 2)).tolist() == [[[1, 0]]]


def mean_cotangent(f: Tensor, positives: Tensor, negatives: Tensor) -> Tensor | None:
    """-dL/df [D] of |f - p|^2 - |f - n|^2 + 0.2, the mean over all triplets of positive loss."""
    found = [
        2 * (p - n)
        for p in positives
        for n in negatives
        if (f - p).square().sum() - (f - n).square().sum() + 0.2 > 0
    ]
    return torch.stack(found).mean(0) if found else None


@pytest.mark.parametrize("evidence", ["for", "against"])
def test_a_row_keeps_the_mean_cotangent_of_its_triplets(evidence: str) -> None:
    one, _, labels = built(common(), triplets="all", evidence=evidence)
    database = one.database
    assert database is not None
    assert (database.m, database.cotangents.shape) == (0, (IMAGES, database.dim))
    f, compared = database.embeddings.double(), 0
    for row in range(IMAGES):
        same = (labels == labels[row]) & (torch.arange(IMAGES) != row)
        wanted = mean_cotangent(f[row], f[same], f[labels != labels[row]])
        if wanted is not None:
            got = database.cotangents[row].double() * (1 if evidence == "for" else -1)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
            compared += 1
    assert compared > IMAGES / 2
    assert (database.offsets == 0).all()
    assert "channels" not in one.info()["settings"]


@pytest.mark.parametrize("head", HEADS)
def test_maps_are_the_formula_whatever_the_head(head: str) -> None:
    model = Net(HEADS[head](CHANNELS))
    one, *_ = built(model)
    queries = pictures(7, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    assert one.database is not None
    close(why.maps, by_hand(model, queries, one.database.cotangents[why.neighbors[:, 0]]))
    assert not why.flat.all()


def test_closed_form_of_the_common_head() -> None:
    model = common()
    one, *_ = built(model)
    queries = pictures(7, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    assert one.database is not None
    with torch.no_grad():
        activations = model.backbone(queries)
        outputs = model.head(activations)
        weights = reference.head_grad_weights(
            one.database.cotangents[why.neighbors],
            model.head[1].weight,
            pixels=16,
            embeddings=why.embeddings,
            norms=outputs.norm(dim=1),
        )
        close(why.maps, reference.dense_cam(activations, weights, size=(8, 8)))


def test_class_token() -> None:
    model = TokenNet()
    one, images, _ = built(model, "first", reshape=gcfast.TokenGrid(prefix=1), triplets="all")
    assert one.database is not None
    tokens = (
        model.first(
            torch.cat(
                [
                    model.token.expand(IMAGES, -1, -1),
                    model.patch(images).flatten(2).transpose(1, 2),
                ],
                1,
            )
        )
        .detach()
        .requires_grad_()
    )
    mixed, _ = model.attention(tokens, tokens, tokens, need_weights=False)
    embeddings = F.normalize(model.last((tokens + mixed)[:, 0]), dim=1)
    (gradient,) = torch.autograd.grad(embeddings, tokens, one.database.cotangents)
    heat = (gradient * tokens).sum(2)[:, 1:].view(IMAGES, 4, 4).clamp(min=0)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-30)
    wanted = F.interpolate(heat[:, None], size=8, mode="bilinear")[:, 0].detach()
    close(one.explain_batch(images), wanted)  # the nearest row of each is its own


def test_own_maps_are_of_the_images_triplets() -> None:
    one, _, labels = built(common(), triplets="all")
    assert one.database is not None
    queries, asked = pictures(6, CLASSES)
    f = one.database.embeddings.double()
    own = F.normalize(one.network.model(queries), dim=1).detach().double()
    cotangents = [
        mean_cotangent(x, f[labels == label], f[labels != label])
        for x, label in zip(own, asked, strict=True)
    ]
    some = [i for i, c in enumerate(cotangents) if c is not None]
    assert len(some) > 3
    wanted = torch.stack([cotangents[i] for i in some]).float()
    got = one.explain_labelled(queries, asked)[some]
    close(got, by_hand(one.network.model, queries[some], wanted))


@pytest.mark.parametrize("k", [1, 4])
def test_an_index_lends_the_same(k: int, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    one, *_ = built(other(), k=k)
    assert one.database is not None
    one.database.save(tmp_path / "db", storage="float16")
    queries = pictures(9, CLASSES)[0]
    half = gcfast.load(tmp_path / "db", one.network.model, k=k)
    wanted = half.explain_batch(queries, details=True)
    torch.testing.assert_close(one.explain_batch(queries), wanted.maps, atol=5e-3, rtol=0)
    found = gcfast.load(tmp_path / "db", one.network.model, index="Flat", k=k)
    got = found.explain_batch(queries, details=True)
    assert torch.equal(got.neighbors, wanted.neighbors)
    torch.testing.assert_close(got.maps, wanted.maps, atol=1e-5, rtol=0)
    for batch, again in zip(queries.split(4), found.explain_stream(queries.split(4)), strict=True):
        torch.testing.assert_close(again, found.explain_batch(batch), atol=1e-6, rtol=0)


def test_neighbors_are_mixed_by_their_shares() -> None:
    one, *_ = built(common(), k=3)
    assert one.database is not None
    queries = pictures(5, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    from gcfast.search.faiss_search import temperature

    tau = temperature(one.database.embeddings, 3)
    shares = torch.softmax(-why.distances / tau, 1)
    mixed = (shares[..., None] * one.database.cotangents[why.neighbors]).sum(1)
    close(why.maps, by_hand(one.network.model, queries, mixed))
    far = built(common(), k=IMAGES + 3)[0].explain_batch(queries)  # the last three are none
    assert torch.isfinite(far).all()


def test_options_and_refined_maps() -> None:
    one, *_ = built(common())
    queries = pictures(3, CLASSES)[0]
    signed = one.explain_batch(queries, relu=False, normalize=None, size=4)
    assert (signed < 0).any()
    raw = one.explain_batch(queries, normalize=None, size=4)
    torch.testing.assert_close(raw, signed.clamp(min=0))
    fine = gcfast.Explainer(
        one.network.model, "backbone", one.database, method="elementwise",
        refine=["backbone.stem"],
    )  # fmt: skip
    finer = one.network.model.backbone.stem(queries).detach()
    wanted = gcfast.ops.refine(raw, finer)
    wanted = wanted / wanted.amax((1, 2), keepdim=True)
    close(fine.explain_batch(queries), wanted)
    assert one.explain_objects(queries, 2).maps.shape == (3, 2, 8, 8)


def test_the_model_is_left_as_it_was_and_under_any_mode() -> None:
    model = other().train()
    one, *_ = built(model)
    queries = pictures(6, CLASSES)[0]
    wanted = one.explain_batch(queries)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = one.explain_batch(queries.clone(), details=True)
        assert torch.equal(inside.maps, wanted)
        assert not inside.maps.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    model.requires_grad_(False)
    assert torch.equal(one.explain_batch(queries), wanted)


def test_graphs_are_freed_at_once() -> None:
    one, images, labels = built(other())
    assert one._graphs is None  # a replayed graph would have no backward pass

    def tensors(calls: int) -> int:
        for _ in range(calls):
            one.explain_batch(images)
            list(one.explain_stream([images, images]))
            one.explain_labelled(images, labels)
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    tensors(1)
    gc.collect()
    gc.disable()  # what waits for the collector keeps activations until it runs
    try:
        assert tensors(4) == tensors(1)
    finally:
        gc.enable()


def test_triplets_and_calibration() -> None:
    one, *_ = built(common())
    a, p, n = (pictures(2)[0] for _ in range(3))
    maps = one.explain_triplet(a, p, n)
    f = [F.normalize(one.network.model(x), dim=1).detach() for x in (a, p, n)]
    close(maps.anchor, by_hand(one.network.model, a, 2 * (f[1] - f[2])))
    close(maps.positive, by_hand(one.network.model, p, 2 * (f[0] - f[1])))
    close(maps.negative, by_hand(one.network.model, n, 2 * (f[2] - f[0])))
    torch.testing.assert_close(one.explain_toward(a, 2 * (f[1] - f[2])), maps.anchor)
    fidelity = one.calibrate(loader(*pictures(30, CLASSES)))
    assert fidelity.control is not None
    assert fidelity.control.mean() < fidelity.cosine.mean()


def test_real_labels() -> None:
    images, _ = pictures(12)
    objective = gcfast.RankLoss(nn.Linear(DIM, 2))
    settings = {"objective": objective, "l2_normalize": False}
    one = gcfast.Explainer(common(), "backbone", method="elementwise", **settings)
    database = one.build([(images, torch.rand(12).tolist())])
    assert database.cotangents.abs().sum() > 0
    assert not one.explain_batch(images, details=True).flat.all()


def test_a_build_takes_one_pass_and_appends_merges_and_cuts(tmp_path: Path) -> None:
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(other(), "backbone", method="elementwise", triplets="all")
    ids = [str(i) for i in range(IMAGES)]
    fresh = one.build(iter([(images, labels, ids)]))
    written = one.build([(images, labels, ids)], out=tmp_path / "db")
    assert torch.equal(written.cotangents, fresh.cotangents)
    assert written.report == fresh.report
    halves = [(images[part], labels[part], ids[part]) for part in (slice(12), slice(12, None))]
    first = one.build(halves[:1])
    grown = one.append(halves[1:])
    # New rows have drawn from all; they are the last.
    torch.testing.assert_close(grown.cotangents[12:], fresh.cotangents[12:], atol=1e-6, rtol=0)
    assert torch.equal(grown.cotangents[:12], first.cotangents)
    second = one.build(halves[1:])
    merged = Database.merge(first, second)
    assert torch.equal(merged.cotangents, torch.cat([first.cotangents, second.cotangents]))
    cut = written.remove(ids[:5])
    assert torch.equal(cut.cotangents, fresh.cotangents[5:])
    assert cut.report["zero_rows"] == fresh.report["zero_rows"]
    assert torch.equal(cut.relabel({"7": 0}).cotangents, cut.cotangents)
    opened = gcfast.load(tmp_path / "db", one.network.model)
    assert opened.settings.method == "elementwise"
    assert len(opened.explain_batch(images)) == IMAGES


def test_embeddings_and_labels_alone_are_enough() -> None:
    model = other()
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(model, "backbone", method="elementwise")
    wanted = one.build([(images, labels)])
    maps = one.explain_batch(images, normalize=None)
    embeddings = wanted.embeddings
    got = one.build_from_embeddings(
        embeddings, labels, sample=images[:5], check=(images, range(IMAGES))
    )
    assert torch.equal(got.cotangents, wanted.cotangents)
    assert not got.relative
    assert torch.equal(one.explain_batch(images, normalize=None), maps)
    lazy = one.build_from_embeddings(
        embeddings, labels, sample=images[:5], check=(images, range(IMAGES)), rows="on-demand"
    )
    torch.testing.assert_close(one.explain_batch(images[:3], normalize=None), maps[:3])
    assert isinstance(lazy, OnDemandDatabase)
    assert lazy.made == 3
    torch.testing.assert_close(lazy.cotangents, wanted.cotangents)
    with pytest.raises(ValueError, match="method='gradcam' and 'elementwise' do without"):
        gcfast.Explainer(model, "backbone", method="proxy").build_from_embeddings(
            embeddings, labels, sample=images[:5], check=(images, range(IMAGES))
        )


def test_centers_lend_the_mean_of_their_rows(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    one, *_ = built(common())
    assert one.database is not None
    small = one.database.compress(3)
    for center in range(3):
        rows = [int(name) for name in small.members_of(center)]
        mean = one.database.cotangents[rows].mean(0)
        torch.testing.assert_close(small.cotangents[center], mean)
    small.save(tmp_path / "small")
    again = gcfast.load(tmp_path / "small", one.network.model)
    assert torch.isfinite(again.explain_batch(pictures(3)[0])).all()


def test_half_precision_keeps_its_digits() -> None:
    activations, gradients = torch.rand(2, 3, 2, 2).half(), torch.rand(2, 3, 2, 2)
    wanted = (activations.double() * gradients.double()).sum(1, keepdim=True)
    torch.testing.assert_close(summed(activations, gradients).double(), wanted)
    model = common().bfloat16()
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(model, "backbone", method="elementwise")
    one.build([(images.bfloat16(), labels)])
    assert not one.explain_batch(images.bfloat16(), details=True).flat.all()


def test_what_has_no_meaning_is_refused() -> None:
    one, images, labels = built(common())
    assert one.database is not None
    with pytest.raises(ValueError, match="`channels` must be left out with method='elementwise'"):
        gcfast.Explainer(common(), method="elementwise", channels=5)
    with pytest.raises(ValueError, match="`cuda_graphs` must be 'auto' or False with method"):
        gcfast.Explainer(common(), method="elementwise", cuda_graphs=True)
    with pytest.raises(ValueError, match="to be exported: its maps need a backward pass"):
        one.export()
    message = "`center` must be left out with method='elementwise', whose rows have no channels"
    for call in (
        one.explain_batch,
        lambda x, **o: next(one.explain_stream([x], **o)),
        lambda x, **o: one.explain_labelled(x, labels, **o),
        lambda x, **o: one.explain_triplet(x, x, x, **o),
        lambda x, **o: one.explain_toward(x, torch.ones(DIM), **o),
    ):
        with pytest.raises(ValueError, match=message):
            call(images, center=0.5)
    plain = gcfast.Explainer(one.network.model, "backbone", channels=5)
    with pytest.raises(gcfast.ModelMismatchError, match="'elementwise', not with 'gradcam': give"):
        plain.database = one.database
    database = plain.build(loader(images, labels))
    with pytest.raises(gcfast.ModelMismatchError, match="'gradcam', not with 'elementwise': give"):
        one.database = database
    with pytest.raises(gcfast.GcfastError, match="no cotangents: build one with method='elem"):
        _ = database.cotangents
    nothing = Net(Lambda(lambda maps: maps.mean((2, 3)) * 0 + 1))
    wrong = gcfast.Explainer(nothing, "backbone", method="elementwise")
    with pytest.raises(ValueError, match="gradient does not reach the layer 'backbone' at its pl"):
        wrong.build(loader(images, labels))
    queries = images.clone()
    queries[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`images`"):
        one.explain_batch(queries)
