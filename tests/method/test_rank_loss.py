"""The loss over ranked pairs with real-valued labels, from its gradient to the database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import norm_error
from loops import Oracle, channel_weights, dense
from networks import CHANNELS, DIM, Net, common, loader, other, pictures
from torch import Tensor, nn

import gcfast
from gcfast.explain.calibration import transfer_fidelity
from gcfast.method import pairs as triplets_module
from gcfast.method.objectives import LINEAR_LIMIT, Partners, objective_from
from gcfast.method.pairs import PairSource
from gcfast.method.partners import Anchors

N = 9
PRICES = torch.tensor([310.5, 95.0, 120.25, 310.5, 88.0, 500.0, 260.0, 95.0, 41.5])


def rank_loss(dim: int = DIM) -> tuple[nn.Linear, gcfast.RankLoss]:
    linear = nn.Linear(dim, 2)
    nn.init.normal_(linear.weight)
    return linear, gcfast.RankLoss(linear)


def built(
    model: nn.Module, objective: gcfast.RankLoss, labels: Any = PRICES, **settings: Any
) -> tuple[gcfast.Explainer, Tensor]:
    images, _ = pictures(N)
    settings = {"l2_normalize": False, "channels": "all", **settings}
    explainer = gcfast.Explainer(model, "backbone", objective=objective, **settings)
    explainer.build(loader(images, labels, 4))
    return explainer, images


def test_the_cotangent_is_the_gradient_of_the_cross_entropy() -> None:
    linear, objective = rank_loss(5)
    anchor, others = torch.randn(3, 5), torch.randn(3, 7, 5)
    above = torch.rand(3, 7) < 0.5
    got, valid = objective.cotangent(anchor, Partners(None, None, others, above))
    assert valid.all()
    for b in range(3):
        for t in range(7):
            leaf = anchor[b : b + 1].clone().requires_grad_()
            loss = F.cross_entropy(linear(leaf - others[b, t]), above[b, t : t + 1].long())
            (wanted,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(got[b, t], wanted[0], rtol=1e-5, atol=1e-6)
            pair = objective.pair_loss(anchor[b : b + 1], others[b, t][None], above[b, t : t + 1])
            torch.testing.assert_close(pair[0], loss.detach())


def test_values_by_hand() -> None:
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0], [2.0]]))
        linear.bias.zero_()
    objective = gcfast.RankLoss(linear)
    # Equal embeddings: the network does not know, σ(0) = 1/2; the direction is 2 − (−1) = 3.
    one, other_one = torch.zeros(1, 1), torch.zeros(1, 2, 1)
    got, _ = objective.cotangent(
        one, Partners(None, None, other_one, torch.tensor([[True, False]]))
    )
    assert got.flatten().tolist() == [-1.5, 1.5]
    # Where the network is sure and right the gradient is small, not rounded to 0.
    sure = torch.full((1, 1), 10.0)
    got, _ = objective.cotangent(
        sure, Partners(None, None, torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    )
    assert got.item() == pytest.approx(-3 * torch.tensor(-30.0, dtype=torch.float64).exp().item())


@pytest.mark.parametrize("partners", ["all", "lower", "higher"])
@pytest.mark.parametrize("evidence", ["for", "against"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("make", [common, other], ids=["closed form", "autograd"])
def test_rows_equal_the_loop_over_every_pair(
    make: Callable[[], Net], l2_normalize: bool, method: str, evidence: str, partners: str
) -> None:
    model = make()
    linear, _ = rank_loss()
    objective = gcfast.RankLoss(linear, partners)
    explainer, images = built(
        model,
        objective,
        triplets="all",
        method=method,
        evidence=evidence,
        l2_normalize=l2_normalize,
    )
    database = explainer.database
    assert database is not None
    assert database.manifest["closed_form"] is (make is common)
    oracle = Oracle(model, "backbone", l2_normalize=l2_normalize)
    embeddings = [oracle.run(image)[1].detach() for image in images]
    double = nn.Linear(DIM, 2).double()
    double.load_state_dict(linear.state_dict())
    got = dense(database, CHANNELS)
    # The dearest has no pair with a dearer one, the cheapest none with a cheaper one.
    dropped = {"all": None, "lower": 8, "higher": 5}[partners]
    index = {int(name): at for at, name in enumerate(database.ids)}
    assert set(range(N)) - set(index) == ({dropped} if dropped else set())
    assert database.report["skipped_no_triplet"] == N - len(index)
    for row in (0, 4, 7):
        activations, embedding = oracle.run(images[row])
        each = []
        for j in range(N):
            if PRICES[j] == PRICES[row] or (PRICES[j] > PRICES[row] and partners == "lower"):
                continue
            if PRICES[j] < PRICES[row] and partners == "higher":
                continue
            logits = double((embedding - embeddings[j].double())[None])
            loss = F.cross_entropy(logits, (PRICES[row : row + 1] > PRICES[j]).long())
            (gradient,) = torch.autograd.grad(loss, activations, retain_graph=True)
            each.append(channel_weights(gradient[0], activations.detach()[0], method, evidence))
        counts = {"all": {0: 7, 4: 8, 7: 7}, "lower": {0: 6, 4: 1, 7: 2}}
        counts["higher"] = {r: counts["all"][r] - counts["lower"][r] for r in (0, 4, 7)}
        assert database.triplet_counts[index[row]] == len(each) == counts[partners][row]
        wanted = torch.stack(each).mean(0)
        assert norm_error(got[index[row]][None], wanted[None]) < 1e-5


def test_evidence_for_a_dear_one_is_what_makes_it_dear() -> None:
    linear = nn.Linear(DIM, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([-torch.ones(DIM), torch.ones(DIM)]))
        linear.bias.zero_()
    model = common()
    explainer, _ = built(model, gcfast.RankLoss(linear), triplets="all")
    database = explainer.database
    assert database is not None
    # The channels' effect on the score (w_1 − w_0)·f, whose layer's weights are known.
    project = model.head[1].weight.detach()
    effect = 2 * project.sum(0)
    weights = dense(database, CHANNELS)
    assert float(F.cosine_similarity(weights[5], effect, dim=0)) > 0.9999  # sold for most
    assert float(F.cosine_similarity(weights[8], -effect, dim=0)) > 0.9999  # and for least


def source(rows: int = 20) -> tuple[PairSource, Anchors]:
    _, objective = rank_loss(4)
    embeddings = torch.randn(rows, 4)
    prices = torch.randint(6, (rows,)).double() / 4  # with ties
    anchors = Anchors(embeddings, prices, torch.arange(rows))
    return PairSource(objective, embeddings, prices, hardest=True), anchors


def test_pairs_are_those_of_other_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, anchors = source()
    counts = (anchors.labels[:, None] != anchors.labels).sum(1)
    assert torch.equal(pairs.count(anchors), counts)
    mean = pairs.mean(anchors)
    assert torch.equal(mean.counts, counts)
    monkeypatch.setattr(triplets_module, "LIST_CHUNK", 7)
    parts = list(pairs.all(anchors))
    assert len(parts) == 3
    total = sum(torch.where(p.valid[..., None], p.values, 0.0).sum(1) for p in parts)
    torch.testing.assert_close(mean.values[:, 0], total / counts[:, None])


def test_draws_are_uniform_and_depend_on_seed_and_row_alone() -> None:
    pairs, anchors = source()
    together = pairs.draw(anchors, 4, seed=3)
    for row in (0, 7, 19):
        alone = pairs.draw(Anchors(*(part[row : row + 1] for part in anchors)), 4, seed=3)
        torch.testing.assert_close(alone.values[0], together.values[row])
    assert not torch.equal(pairs.draw(anchors, 4, seed=4).values, together.values)

    one = Anchors(*(part[:1] for part in anchors))
    (listed,) = pairs.all(one)
    count = int(listed.counts[0])
    slopes = listed.values[0, :, 0]
    assert len(slopes.unique()) == count
    seen = torch.zeros(count)
    for seed in range(300):
        drawn = pairs.draw(one, 6, seed=seed).values[0, :, 0]
        seen += torch.isclose(drawn[:, None], slopes[None], rtol=1e-6, atol=0).sum(0)
    expected = 1800 / count
    assert float(((seen - expected) ** 2 / expected).sum()) < 3 * count
    # Where there are no more pairs than draws, each is used once.
    every = pairs.draw(one, count + 5, seed=0)
    assert torch.equal(every.values[0, :count], listed.values[0])
    assert every.valid.sum() == count


def test_a_database_of_prices_is_saved_and_explains(tmp_path: Path) -> None:
    _, objective = rank_loss()
    explainer, images = built(common(), objective, channels=5, triplets=50)
    database = explainer.database
    assert database is not None
    assert database.labels.dtype == torch.float64
    assert database.labels.tolist() == PRICES.tolist()
    assert database.label_name(310.5) == "310.5"
    assert database.label_name(1234567.0) == "1234567"
    assert database.label_name(float("nan")) == ""
    database.save(tmp_path / "houses.gcfast")
    again = gcfast.load(tmp_path / "houses.gcfast", explainer.network.model)
    assert again.settings.objective.describe() == objective.describe()
    assert repr(again.settings.objective) == f"RankLoss(D={DIM}, partners='all')"
    why = again.explain_batch(images, details=True)
    torch.testing.assert_close(why.maps, explainer.explain_batch(images))
    assert why.neighbors[:, 0].tolist() == list(range(N))
    assert why.labels.dtype == torch.float64
    assert why.labels[:, 0].tolist() == PRICES.tolist()
    assert again.explain_batch(images[:0], details=True).labels.dtype == torch.float64
    more = gcfast.load(tmp_path / "houses.gcfast", explainer.network.model, k=12)
    assert more.explain_batch(images[:1], details=True).labels[0].isnan().sum() == 12 - N


def test_prices_are_streamed_and_appended_to(tmp_path: Path) -> None:
    _, objective = rank_loss()
    images, _ = pictures(N)
    settings = {"objective": objective, "l2_normalize": False, "channels": "all"}
    whole = gcfast.Explainer(common(), "backbone", **settings)
    in_memory = whole.build(loader(images, PRICES, 4))
    streamed = whole.build(loader(images, PRICES, 4), out=tmp_path / "prices")
    assert torch.equal(in_memory.weights, streamed.weights)
    assert torch.equal(streamed.labels, PRICES.double())
    longer = whole.append(loader(images[:3], PRICES[:3] + 1, 3))
    assert torch.equal(longer.labels, torch.cat([PRICES, PRICES[:3] + 1]).double())


def test_prices_come_through_an_index_too() -> None:
    pytest.importorskip("faiss")
    explainer, images = built(common(), rank_loss()[1])
    wanted = explainer.explain_batch(images, details=True)
    through = gcfast.Explainer(
        explainer.network.model, database=explainer.database, l2_normalize=False, index="Flat", k=2
    )
    why = through.explain_batch(images, details=True)
    assert why.labels.dtype == torch.float64
    assert torch.equal(why.labels[:, :1], wanted.labels)
    beyond = gcfast.Explainer(
        explainer.network.model, database=explainer.database, l2_normalize=False, index="Flat", k=11
    )
    assert beyond.explain_batch(images, details=True).labels[:, N:].isnan().all()


def test_a_centre_has_the_mean_price_of_its_rows() -> None:
    pytest.importorskip("faiss")
    explainer, _ = built(common(), rank_loss()[1])
    assert explainer.database is not None
    small = explainer.database.compress(2)
    members = small.members_of
    for centre in range(2):
        rows = [int(name) for name in members(centre)]
        assert float(small.labels[centre]) == pytest.approx(float(PRICES[rows].double().mean()))


def test_own_maps_of_an_image_whose_price_is_known() -> None:
    model = common()
    _, objective = rank_loss()
    explainer, images = built(model, objective, triplets="all")
    own = explainer.explain_labelled(images, PRICES)
    # Every row is its own nearest, and has the same pairs: ties are with itself alone or a twin.
    torch.testing.assert_close(own, explainer.explain_batch(images), rtol=1e-4, atol=1e-4)
    cheap = explainer.explain_labelled(images[:1], [0])
    dear = explainer.explain_labelled(images[:1], [1e6])
    assert not torch.allclose(cheap, dear, atol=0.05)


def test_transfer_of_images_with_prices_is_measured() -> None:
    explainer, _ = built(common(), rank_loss()[1], channels=5)
    fresh, _ = pictures(6)
    # Prices that no row has are as good as any.
    measured = transfer_fidelity(explainer, [(fresh, [1.5, 99.0, 250.0, 300.25, 410.0, 95.0])])
    assert len(measured) == 6
    assert measured.unknown == 0
    assert bool(((measured.cosine >= -1) & (measured.cosine <= 1.0001)).all())


def test_prices_may_be_whole_numbers_or_arrays() -> None:
    for labels in (PRICES.long(), PRICES.numpy(), [float(p) for p in PRICES]):
        explainer, _ = built(common(), rank_loss()[1], labels)
        assert explainer.database is not None
        assert explainer.database.labels.dtype == torch.float64


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (["a"] * N, TypeError, "`labels` must be numbers for a RankLoss, got 'a'"),
        ([True] * N, TypeError, "`labels` must be numbers for a RankLoss, got True"),
        ([float("nan")] * N, ValueError, "`labels` must be finite for a RankLoss, got nan"),
        ([1.5] * N, ValueError, "`loader` must give at least two different labels, .* got one"),
    ],
)
def test_labels_that_are_no_prices(labels: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        built(common(), rank_loss()[1], labels)


def test_linear_layers_that_cannot_rank() -> None:
    with pytest.raises(TypeError, match=r"`linear` must be a torch.nn.Linear, got Conv2d"):
        gcfast.RankLoss(nn.Conv2d(4, 2, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`partners` must be one of 'all', .* got 'dearer'"):
        gcfast.RankLoss(nn.Linear(4, 2), "dearer")
    with pytest.raises(ValueError, match="`linear` must have 2 outputs, got 3"):
        gcfast.RankLoss(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"at most 16384 weights .* got 16386"):
        gcfast.RankLoss(nn.Linear(LINEAR_LIMIT // 2 + 1, 2))
    broken = nn.Linear(4, 2)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`linear` must have finite weights, got NaN"):
        gcfast.RankLoss(broken)
    with pytest.raises(ValueError, match=r"rank embeddings of D = 6, .* layer takes 4"):
        built(common(), rank_loss(4)[1])


def test_a_layer_without_bias_and_one_that_is_trained_on() -> None:
    linear = nn.Linear(DIM, 2, bias=False)
    objective = gcfast.RankLoss(linear)
    before = objective.describe()
    assert before["bias"] == [0.0, 0.0]
    with torch.no_grad():
        linear.weight.add_(1)
    assert objective.describe() == before
    assert objective_from(before).describe() == before


def test_the_other_kind_of_labels_is_refused() -> None:
    model = common()
    explainer, images = built(model, rank_loss()[1])
    classes = gcfast.Explainer(
        model, "backbone", explainer.database, l2_normalize=False, channels=5
    )
    with pytest.raises(ValueError, match=r"`objective` must be one over real numbers, .*classes"):
        classes.explain_labelled(images, [0] * N)
    classes.build(loader(*pictures(N)))
    explainer.database = classes.database  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"`objective` must be one over classes, .*real numbers"):
        explainer.explain_labelled(images, PRICES)
    with pytest.raises(ValueError, match="must be over triplets to explain one, got RankLoss"):
        explainer.explain_triplet(images, images, images)
