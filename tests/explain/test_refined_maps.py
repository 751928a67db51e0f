"""Explainers with ``refine``: the plain map at the layer's resolution, refined by the formula."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import AFFINE_HEADS, CHANNELS, DIM, OTHER_HEADS, Net, loader, pictures
from torch import nn

from gcfast import BEST, Explainer, TokenGrid

SIZE = (16, 16)
METHODS = {
    "batch": lambda one, images, options: one.explain_batch(images, **options),
    "details": lambda one, images, options: one.explain_batch(images, details=True, **options).maps,
    "stream": lambda one, images, options: torch.cat(
        list(one.explain_stream(images.split(2), **options))
    ),
    "labelled": lambda one, images, options: one.explain_labelled(images, [0, 1, 2], **options),
    "triplet": lambda one, images, options: one.explain_triplet(
        images, images.roll(1, 0), images.roll(2, 0), **options
    ).positive.roll(-1, 0),
    "toward": lambda one, images, options: one.explain_toward(
        images, torch.linspace(-1, 1, DIM), **options
    ),
    "pair": lambda one, images, options: (
        one.explain_pair(
            images.roll(1, 0), images, unlike=images.roll(2, 0), spread_rest=True, **options
        ).match
    ),
}


class Stage(nn.Module):
    """A convolution behind a ReLU that may write over what the stage before gave."""

    def __init__(self, into: int, out: int, stride: int, *, in_place: bool) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=in_place)
        self.conv = nn.Conv2d(into, out, 3, stride, padding=1)

    def forward(self, maps):
        return self.conv(self.act(maps))


class Pyramid(nn.Module):
    """[B, 3, 16, 16] through 16 x 16, 8 x 8 and 4 x 4 to [B, D]."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = Stage(8, 10, 2, in_place=in_place)
        self.last = Stage(10, CHANNELS, 2, in_place=in_place)
        self.spare = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(CHANNELS, DIM)

    def forward(self, images):
        return self.fc(F.relu(self.last(self.middle(self.stem(images)))).mean((2, 3)))


def outputs(model, images):
    """What the model gives at 8 x 8 and at 16 x 16, by hand."""
    stem = model.stem(images)
    return [model.middle(stem.clone()).detach(), stem.detach()]


def formula(maps, finer):
    """The map [B, h, w] by one output, in float64."""
    u = maps.double() / maps.double().amax((1, 2), keepdim=True)
    u = F.interpolate(u[:, None], size=finer.shape[2:], mode="bilinear")[:, 0]
    x, cubes = finer.double(), u**3
    hot = torch.einsum("bchw,bhw->bc", x, cubes) / cubes.sum((1, 2))[:, None]
    mean, variance = x.mean((2, 3)), x.var((2, 3), unbiased=False)
    v = (hot - mean) / (variance + 0.1 * variance.mean(1, keepdim=True))
    f = torch.einsum("bc,bchw->bhw", v, x - mean[..., None, None]).clamp(min=0)
    return u * f / f.amax((1, 2), keepdim=True)


def finished(maps, normalize, size):
    if normalize == "minmax":
        maps = maps - maps.amin((1, 2), keepdim=True)
    if normalize is not None:
        maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)
    return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]


def pair(model=None, *, images=None, refine="auto", **settings):
    """(an explainer that refines nothing, one that does with the same database)."""
    torch.manual_seed(3)
    model = (Pyramid() if model is None else model).eval()
    images, labels = pictures(12, size=SIZE) if images is None else images
    drawn = {} if settings.get("method") == "proxy" else {"channels": 5, "triplets": 6}
    settings = {"layer": "last", **drawn, **settings}
    plain = Explainer(model, **settings)
    plain.build(loader(images, labels))
    return plain, Explainer(model, database=plain.database, refine=refine, **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"refine": ["middle", "stem"], "k": 3}, {"center": 1.0, "normalize": "minmax"}),
        ({"method": "proxy"}, {}),
        ({"method": "gradcam++", "evidence": "against"}, {"normalize": None, "size": (5, 20)}),
    ],
    ids=["auto", "names", "proxy", "raw"],
)
def test_is_the_plain_map_refined(method, settings, options):
    if (method, settings) == ("triplet", {"method": "proxy"}):
        pytest.skip("has no gradient")
    plain, refined = pair(**settings)
    images = pictures(3, size=SIZE)[0]
    raw = {"normalize": None, "size": (4, 4), "center": options.get("center", 0.0)}
    wanted = METHODS[method](plain, images, raw)
    for output in outputs(plain.network.model, images):
        wanted = formula(wanted, output)
    wanted = wanted.nan_to_num(0)  # a flat map
    wanted = finished(wanted, options.get("normalize", "max"), options.get("size", SIZE))
    got = METHODS[method](refined, images, options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-4)


HEADS = AFFINE_HEADS | OTHER_HEADS


@pytest.mark.parametrize("head", HEADS)
def test_the_best_settings_take_any_head(head):
    torch.manual_seed(3)
    model = Net(HEADS[head](CHANNELS)).eval()
    one = Explainer(model, "backbone", **BEST)
    database = one.build(loader(*pictures(12, size=SIZE)))
    images = pictures(3, size=SIZE)[0]
    got = one.explain_batch(images)
    assert (one.settings.method, one.info()["refine"]) == ("proxy", ["backbone.norm"])
    plain = Explainer(model, database=database, method="proxy")
    wanted = plain.explain_batch(images, normalize=None, size=(8, 8))
    with torch.inference_mode():
        wanted = formula(wanted, model.backbone.stem(images)).nan_to_num(0)
    torch.testing.assert_close(got.double(), finished(wanted, "max", SIZE), atol=2e-4, rtol=1e-4)


def test_through_an_index():
    pytest.importorskip("faiss")
    _, exact = pair()
    flat = Explainer(exact.network.model, "last", exact.database, index="Flat", refine="auto")
    images = pictures(4, size=SIZE)[0]
    wanted = exact.explain_batch(images)
    torch.testing.assert_close(flat.explain_batch(images), wanted)
    got = torch.cat(list(flat.explain_stream(images.split(2))))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("first", ["explain_batch", "explain_labelled"])
def test_layers_that_are_written_over_are_copied(first):
    _, wanted = pair(Pyramid())
    in_place = Pyramid(in_place=True).eval()
    in_place.load_state_dict(wanted.network.model.state_dict())
    one = Explainer(in_place, "last", wanted.database, channels=5, triplets=6, refine="auto")
    images = pictures(3, size=SIZE)[0]
    arguments = {"explain_batch": (images,), "explain_labelled": (images, [0, 1, 2])}
    for method in (first, *arguments):
        got = getattr(one, method)(*arguments[method])
        torch.testing.assert_close(got, getattr(wanted, method)(*arguments[method]))
    assert [network.clone for network in one.network.finer] == [True, True]
    assert [network.clone for network in wanted.network.finer] == [False, False]


@pytest.mark.parametrize("in_place", [False, True])
def test_exported_equals_explain_batch(in_place):
    _, one = pair(Pyramid(in_place=in_place))
    images = pictures(3, size=SIZE)[0]
    with pytest.raises(ValueError, match=r"`refine` must be known from a pass .* explain_batch on"):
        one.export()
    wanted = one.explain_batch(images)
    exported = one.export()
    torch.testing.assert_close(exported(images), wanted)
    program = torch.export.export(exported, (images,))
    assert str(program).count("gcfast.refine.default(") == 2
    torch.testing.assert_close(program.module()(images), wanted)
    torch.compiler.reset()  # exported modules are all one function, whose graphs it limits
    compiled = torch.compile(exported, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(exported))(images), wanted)


def test_exported_with_two_runs_of_one_module():
    class Shared(Pyramid):
        def forward(self, images):
            maps = self.last.act(self.middle(self.last.act(self.stem(images))))
            return self.fc(self.last.conv(maps).mean((2, 3)))

    _, one = pair(Shared(), layer="last.conv", refine=["last.act@2", "last.act@1"])
    images = pictures(3, size=SIZE)[0]
    wanted = one.explain_batch(images)
    torch.testing.assert_close(one.export()(images), wanted)


def test_objects_and_a_second_search():
    plain, refined = pair()
    images = pictures(3, size=SIZE)[0]
    for requery in (False, True):
        plain, refined = (
            Explainer(
                plain.network.model, "last", plain.database, channels=5, triplets=6,
                requery=requery, refine=refine,
            )
            for refine in (None, "auto")
        )  # fmt: skip
        low = plain.explain_objects(images, normalize=None, size=(4, 4))
        got = refined.explain_objects(images)
        assert torch.equal(got.neighbors, low.neighbors)  # by the maps before they are refined
        for number in range(2):
            wanted = low.maps[:, number]
            for output in outputs(plain.network.model, images):
                wanted = formula(wanted, output)
            wanted = finished(wanted.nan_to_num(0), "max", SIZE)
            ours = got.maps[:, number].double()
            torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(refined.explain_batch(images), got.maps[:, 0])


def test_half_precision():
    _, one = pair()
    images = pictures(3, size=SIZE)[0]
    wanted = one.explain_batch(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = one.explain_batch(images)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().mean() < 0.05  # the network's rounding


def test_a_flat_map_stays_flat_and_nan_shows():
    _, one = pair()
    images = pictures(3, size=SIZE)[0]
    why = one.explain_batch(images, center=1e6, details=True)
    assert why.flat.all()
    assert why.maps.abs().sum() == 0
    one.explain_batch(images)
    images[1, 0, 3, 3] = torch.nan
    got = one.export()(images)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_signed_maps_are_refused_wherever_they_are_asked_for():
    _, one = pair()
    images = pictures(3, size=SIZE)[0]
    calls = [(method, (one, images)) for method in METHODS.values()]
    calls.append((lambda one, _, options: one.export(**options), (one, images)))
    calls.append((lambda one, i, options: one.explain_objects(i, **options), (one, images)))
    for call, arguments in calls:
        with pytest.raises(ValueError, match=r"`relu` must be True with `refine`, .* got False"):
            call(*arguments, {"relu": False})


def test_says_which_layers_refine():
    plain, one = pair()
    assert plain.info()["refine"] is None
    assert "refine" not in repr(plain)
    assert one.info()["refine"] == "auto"
    one.explain_batch(pictures(1, size=SIZE)[0])
    assert one.info()["refine"] == ["middle", "stem"]
    assert "refine=['middle', 'stem']" in repr(one)
    named = Explainer(one.network.model, "last", refine=one.network.model.middle)
    assert named.info()["refine"] == ["middle"]


def test_pickled_with_its_layers(tmp_path):
    _, one = pair()
    images = pictures(3, size=SIZE)[0]
    one.database.save(tmp_path / "db")
    again = pickle.loads(pickle.dumps(one))
    wanted = one.explain_batch(images)
    torch.testing.assert_close(again.explain_batch(images), wanted)
    again = pickle.loads(pickle.dumps(one))  # this time with layers that are known
    assert again.info()["refine"] == ["middle", "stem"]
    torch.testing.assert_close(again.explain_batch(images), wanted)


def test_calibration_measures_refined_maps():
    plain, one = pair()
    held_out = loader(*pictures(12, size=SIZE))
    ours, theirs = one.calibrate(held_out), plain.calibrate(held_out)
    assert not torch.equal(ours.cosine, theirs.cosine)
    assert not torch.equal(ours.control, theirs.control)


def test_tokens_that_do_not_cover_the_image():
    # Patches of 2 x 2 on 9 x 9 leave a row and a column out, for both layers alike.
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, CHANNELS, 2, stride=2)
            self.first, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

        def forward(self, images):
            tokens = self.first(self.patch(images).flatten(2).mT)
            return self.last(tokens.relu()).relu().mean(1)

    settings = {"layer": "last", "reshape": TokenGrid(prefix=0)}
    plain, one = pair(Tokens(), images=pictures(12, size=(9, 9)), refine="first", **settings)
    images = pictures(3, size=(9, 9))[0]
    wanted = plain.explain_batch(images, normalize=None, size=(4, 4))
    tokens = one.network.model.first(one.network.model.patch(images).flatten(2).mT)
    wanted = formula(wanted, tokens.detach().mT.unflatten(2, (4, 4)))
    wanted = F.pad(finished(wanted, "max", (8, 8)), (0, 1, 0, 1))
    torch.testing.assert_close(one.explain_batch(images).double(), wanted, atol=2e-4, rtol=1e-4)
    elsewhere = Explainer(one.network.model, database=one.database, refine="patch", **settings)
    with pytest.raises(ValueError, match=r"cover what those of 'last' cover .* got 'patch'"):
        elsewhere.explain_batch(images)
