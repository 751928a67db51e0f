"""Explainer.export: one graph without hooks, equal to explain_batch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import AFFINE_HEADS, CHANNELS, DIM, OTHER_HEADS, Net, TokenNet, loader, pictures
from torch import nn

from gcfast import Explainer, TokenGrid
from gcfast.errors import UnsupportedModelError


class InPlace(nn.Module):
    """BatchNorm, and a ReLU that writes over the layer that is explained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, CHANNELS, 3, padding=1, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(CHANNELS, DIM)

    def forward(self, images):
        maps = self.act(self.last(F.relu(self.norm(self.first(images)))))
        return self.fc(maps.mean((2, 3)))


class DictOut(nn.Module):
    """A dictionary of outputs, and a layer that the model indexes and that gives a tuple."""

    class Stage(nn.Sequential):
        def forward(self, images):
            return super().forward(images), "beside it"

    def __init__(self) -> None:
        super().__init__()
        self.stage = self.Stage(nn.Conv2d(3, CHANNELS, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(CHANNELS, DIM)

    def forward(self, images):
        maps, _ = self.stage(images)
        assert isinstance(self.stage, self.Stage)
        assert len(self.stage) == 2
        scale = self.stage[0].weight.shape[0] / CHANNELS
        return {"other": maps, "embedding": self.fc(maps.mean((2, 3))) * scale}


CASES = {
    "in place": (InPlace, {"layer": "last"}, {}),
    "dict": (DictOut, {"layer": "stage", "output_key": "embedding"}, {"size": (20, 13)}),
    "tokens": (
        TokenNet,
        {"layer": "first", "reshape": TokenGrid(prefix=1)},
        {"normalize": "minmax", "center": 0.5},
    ),
    "gem": (lambda: Net(OTHER_HEADS["gem"](CHANNELS)), {}, {"relu": False, "size": 5}),
    "k = 3": (lambda: Net(AFFINE_HEADS["linear"](CHANNELS)), {"k": 3}, {"center": 1.0}),
    "raw": (
        lambda: Net(AFFINE_HEADS["linear"](CHANNELS)),
        {"l2_normalize": False},
        {"normalize": None},
    ),
}


def _explainer(name, device="cpu", **more):
    make, settings, options = CASES[name]
    explainer = Explainer(make().eval().to(device), channels=4, triplets=5, **settings, **more)
    explainer.build(loader(*pictures(12)))
    return explainer, options


@pytest.mark.parametrize("name", CASES)
def test_equals_explain_batch(name):
    explainer, options = _explainer(name)
    images = pictures(4)[0]
    wanted = explainer.explain_batch(images, **options, details=True)
    module = explainer.export(**options, details=True)
    torch.compiler.reset()  # exported modules are all one function, whose graphs it limits
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        maps, embeddings, neighbors, distances, labels = run(images)
        torch.testing.assert_close(maps, wanted.maps, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(embeddings, wanted.embeddings)
        assert torch.equal(neighbors, wanted.neighbors)
        torch.testing.assert_close(distances, wanted.distances)
        assert torch.equal(labels, wanted.labels)


@pytest.mark.parametrize("name", ["in place", "dict", "gem", "k = 3"])
def test_torch_export_with_any_batch(name):
    explainer, options = _explainer(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        explainer.export(**options), (pictures(4)[0],), dynamic_shapes=({0: batch},)
    )
    for count in (4, 7):
        images = pictures(count)[0]
        wanted = explainer.explain_batch(images, **options)
        torch.testing.assert_close(program.module()(images), wanted, atol=1e-6, rtol=1e-5)
    names = {str(n.target) for m in program.graph_module.modules() for n in m.graph.nodes}
    assert {"gcfast.knn.default", "gcfast.sparse_cam.default"} <= names


def test_torch_export_of_tokens():
    # The attention of this model takes the number of images as a constant.
    explainer, options = _explainer("tokens")
    images = pictures(4)[0]
    program = torch.export.export(explainer.export(**options), (images,))
    wanted = explainer.explain_batch(images, **options)
    torch.testing.assert_close(program.module()(images), wanted, atol=1e-6, rtol=1e-5)


def test_compiled_for_any_batch_without_a_graph_break():
    explainer, _ = _explainer("in place")
    torch.compiler.reset()  # exported modules are all one function, whose graphs it limits
    compiled = torch.compile(explainer.export(), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 5):
        images = pictures(count)[0]
        torch.testing.assert_close(compiled(images), explainer.explain_batch(images))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # of the compiler, about the card
@pytest.mark.parametrize("name", ["in place", "k = 3"])
def test_compiled_on_a_gpu(name, device):
    explainer, options = _explainer(name, device=device)
    images = pictures(4)[0].to(device)
    wanted = explainer.explain_batch(images, **options)
    torch.compiler.reset()  # exported modules are all one function, whose graphs it limits
    compiled = torch.compile(explainer.export(**options), fullgraph=True)
    torch.testing.assert_close(compiled(images), wanted, atol=1e-3, rtol=1e-3)


def test_shares_the_parameters_and_leaves_the_model_alone():
    explainer, _ = _explainer("in place")
    model = explainer.network.model
    module = explainer.export()
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert type(model.last) is nn.Conv2d
    assert not model.last._forward_hooks
    assert not any(m.training for m in module.train().modules())
    images = pictures(2)[0]
    before = module(images)
    with torch.no_grad():
        model.last.weight.mul_(-1)
    assert not torch.equal(module(images), before)


def test_a_pass_decides_channels_last_and_copies():
    explainer, _ = _explainer("in place")
    assert explainer.export()._channels_last
    fresh = Explainer(explainer.network.model, database=explainer.database)
    module = fresh.export()
    assert not module._channels_last
    images = pictures(3)[0]
    torch.testing.assert_close(module(images), explainer.explain_batch(images))


def test_an_image_of_nan_gets_a_map_of_nan():
    explainer, _ = _explainer("in place")
    images = pictures(3)[0]
    images[1] = float("nan")
    maps = explainer.export()(images)
    assert maps[1].isnan().all()
    torch.testing.assert_close(maps[::2], explainer.explain_batch(images[::2]))


def test_index_must_be_exact():
    explainer, _ = _explainer("in place", index="Flat")
    with pytest.raises(ValueError, match="`index` must be 'exact' to be exported, got 'Flat'"):
        explainer.export()


def test_a_model_that_cannot_be_copied():
    explainer, _ = _explainer("in place")
    explainer.network.model.generator = (i for i in range(3))
    with pytest.raises(UnsupportedModelError, match=r"copy\.deepcopy can copy, to be exported"):
        explainer.export()


def test_a_layer_that_runs_twice():
    explainer, _ = _explainer("in place")
    module = explainer.export()
    images = pictures(2)[0]
    module.model.forward = lambda images: (module.model.last(torch.ones(2, 8, 8, 8)),
                                           InPlace.forward(module.model, images))[1]  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"`layer` must run once .* which ran 2 times"):
        module(images)


def test_bad_options():
    explainer, _ = _explainer("in place")
    with pytest.raises(ValueError, match="`normalize` must be one of"):
        explainer.export(normalize="sum")


def test_an_exported_program_leaves_the_module_as_it_was() -> None:
    explainer, options = _explainer("in place")
    module, images = explainer.export(**options), pictures(4)[0]
    wanted = module(images)
    for _ in range(2):
        program = torch.export.export(module, (images,))
        torch.testing.assert_close(module(images), wanted)
        torch.testing.assert_close(program.module()(images), wanted)


def test_pickled_and_copied() -> None:
    explainer, options = _explainer("in place")
    module, images = explainer.export(**options), pictures(4)[0]
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(other(images), module(images))
        torch.testing.assert_close(other(images), module(images))
