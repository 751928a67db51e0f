"""The bookkeeping of CUDA graphs, with a stand-in for the capture; graphs themselves need CUDA."""

import contextlib
import threading
import warnings

import pytest
import torch
from networks import Lambda, Net, common, loader, pictures
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcfast import Explainer
from gcfast.explain.cuda_graphs import GRAPHS_KEPT, TRIALS, TRIALS_UNTIMED, Graphs
from gcfast.explain.maps import Explained
from gcfast.explain.result import Finish
from gcfast.ops import _operation


class Recorder:
    """Replays by running the function again, into the memory of what it gave first."""

    made = ()

    def __init__(self, device):
        self.device = device
        self.records, self.replays, self.inside = 0, 0, 0
        Recorder.made = (*Recorder.made, self)

    def record(self, function):
        self.records += 1
        out = function()
        assert not torch.is_autocast_cache_enabled()
        recorder = self

        class Recording:
            def replay(self):
                assert recorder.inside == 1
                recorder.replays += 1
                for kept, new in zip(tree_leaves(out), tree_leaves(function()), strict=True):
                    if isinstance(kept, Tensor):
                        kept.copy_(new)

        return Recording(), out

    @contextlib.contextmanager
    def in_order(self):
        self.inside += 1
        yield
        self.inside -= 1

    def timed(self, function):
        trial = Trial()
        self.trials = [*getattr(self, "trials", ()), trial]
        return function(), trial


class Trial:
    """A measured run that ends when it is told to."""

    told = None

    def ratio(self):
        return self.told


class Case:
    """An explainer and the graphs of its forward pass."""

    def __init__(self, *, auto=False, **settings):
        Recorder.made = ()
        self.explainer = Explainer(common(norm=True).eval(), channels=4, triplets=5, **settings)
        self.explainer.build(loader(*pictures(12)))
        self.model = self.explainer.network.model
        self.graphs = Graphs(self.model, Recorder, auto=auto)

    def run(self, images, **options):
        attached = self.explainer.attach()
        finish = Finish(**({"size": (9, 7), "center": 0.0, "relu": True, "normalize": "max"}
                           | options))  # fmt: skip

        def function(images):
            return attached.explain(images, finish, waits=False)

        prepared = self.explainer.network.prepared
        got = self.graphs.run(
            images, function, Explained.copied, owner=attached, key=finish, prepared=prepared
        )
        wanted = function(images)
        for ours, theirs in zip(got[:4], wanted[:4], strict=True):
            assert torch.equal(ours, theirs)
        return got

    @property
    def counts(self):
        (recorder,) = Recorder.made
        return recorder.records, recorder.replays


def test_each_shape_is_captured_once_and_replayed():
    case = Case()
    first = case.run(pictures(3)[0])
    kept = first.maps.clone()
    case.run(pictures(3)[0])
    assert case.counts == (1, 2)
    # What a call returned is not what the next one writes to.
    assert torch.equal(first.maps, kept)
    case.run(pictures(2)[0])
    case.run(pictures(3, size=(8, 10))[0])
    case.run(pictures(3)[0])
    assert case.counts == (3, 5)
    case.run(pictures(3)[0], normalize="minmax")
    # What comes is copied into the graph's own images, whose memory format is the model's.
    case.run(pictures(3)[0].contiguous(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16):
        case.run(pictures(3)[0])
    assert case.counts == (5, 8)
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(
    "settings", [{"index": "Flat"}, {"index": "Flat", "k": 3}, {"refine": "auto"}]
)
def test_the_forward_pass_alone_is_captured_where_the_search_is_not(settings, monkeypatch):
    if "index" in settings:
        pytest.importorskip("faiss")
    case = Case(**settings)
    explainer = case.explainer
    if "index" not in settings:
        monkeypatch.setattr(Explainer, "_on_device", False)  # as with rows on demand
    given = [pictures(3)[0] + i for i in range(4)]
    wanted = [explainer.explain_batch(images, details=True) for images in given]
    monkeypatch.setattr(explainer, "_graphs_for", lambda _: case.graphs)
    streamed = list(explainer.explain_stream(given, details=True))
    one_by_one = [explainer.explain_batch(images, details=True) for images in given]
    assert case.counts == (1, 8)
    for got in (streamed, one_by_one):
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours.maps, theirs.maps)
            assert torch.equal(ours.embeddings, theirs.embeddings)
            assert torch.equal(ours.neighbors, theirs.neighbors)


class Copies(TorchDispatchMode):
    """Notes every operation that is not a view."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        self.made.append(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_copy_goes_in_and_one_comes_out(layout):
    graphs = Graphs(common(), Recorder)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)

    def run():
        return graphs.run(
            images,
            lambda images: Explained(images[:, 0], *[images[:, 0, 0]] * 3, None),
            Explained.copied_maps,
            owner=None,
            key=None,
            prepared=lambda images: images.contiguous(memory_format=torch.channels_last),
        )

    run()
    (captured,) = graphs._captured.values()
    assert captured.images.is_contiguous(memory_format=torch.channels_last)
    type(captured.recording).replay = lambda _: None
    with Copies() as seen:
        run()
    assert seen.made == ["copy_", "clone"]


def test_under_inference_mode_and_outside():
    case = Case()
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            case.run(pictures(3)[0])
    assert case.counts == (1, 3)


@pytest.mark.parametrize(
    "change", ["write", "replace", "buffer", "module", "function", "added", "move"]
)
def test_captured_again_when_a_weight_changes(change):
    case = Case()
    images = pictures(3)[0]
    case.run(images)
    backbone = case.model.backbone
    with torch.no_grad():
        if change == "write":
            backbone.last.weight.add_(0.5)
        elif change == "replace":
            backbone.last.weight = torch.nn.Parameter(torch.randn_like(backbone.last.weight))
        elif change == "buffer":
            backbone.norm.running_mean.add_(1)
        elif change == "module":
            backbone.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        elif change == "function":
            case.model.head[0] = Lambda(lambda maps: maps.amax((2, 3)))
        elif change == "added":
            case.model.head.append(torch.nn.ReLU())
        else:
            backbone.last.weight.data = backbone.last.weight.detach().clone()
    case.run(images)
    assert case.counts == (2, 2)
    case.run(images)
    assert case.counts == (2, 3)


def test_another_device_gets_a_recorder_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # refuses "meta"
    graphs = Graphs(torch.nn.Identity(), Recorder)
    Recorder.made = ()

    def function(images):
        return Explained(*[images + 1] * 4, None)

    for device in ("cpu", "cpu", "meta", "cpu"):
        images = torch.ones(1, 3, 2, 2, device=device)
        out = graphs.run(
            images, function, Explained.copied, owner=None, key=None, prepared=Tensor.contiguous
        )
        assert out.maps.device == images.device
    assert [r.device.type for r in Recorder.made] == ["cpu", "meta"]


def test_captured_again_for_another_database():
    case = Case()
    images = pictures(3)[0]
    case.run(images)
    case.explainer.build(loader(*pictures(10)))
    case.run(images)
    assert case.counts == (2, 2)
    assert len(case.graphs) == 1


def test_a_model_in_inference_tensors():
    case = Case()
    with torch.inference_mode():
        case.model.head[1].weight = torch.nn.Parameter(
            torch.randn(case.model.head[1].weight.shape), requires_grad=False
        )
    for _ in range(2):
        case.run(pictures(3)[0])
    assert case.counts == (1, 2)


def test_the_shapes_used_last_are_kept():
    case = Case()
    for count in range(1, GRAPHS_KEPT + 2):
        case.run(pictures(count)[0])
    assert len(case.graphs) == GRAPHS_KEPT
    case.run(pictures(GRAPHS_KEPT + 1)[0])
    assert case.counts[0] == GRAPHS_KEPT + 1
    case.run(pictures(1)[0])
    assert case.counts[0] == GRAPHS_KEPT + 2


def test_a_model_that_cannot_be_captured_runs_without(monkeypatch):
    case = Case()

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be captured .* runs without one: RuntimeError"):
        case.run(pictures(3)[0])
    case.run(pictures(3)[0])  # said once
    assert torch.is_autocast_cache_enabled()
    with torch.no_grad():
        case.model.backbone.last.weight.add_(0.5)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
        case.run(pictures(3)[0])  # another model, as far as we know


def test_threads_take_turns():
    case = Case()
    batches = [pictures(3)[0] for _ in range(4)]
    case.run(batches[0])
    errors = []

    def work(images):
        try:
            for _ in range(5):
                case.run(images)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(images,)) for images in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert case.counts == (1, 21)


def test_explain_batch_goes_through_the_graphs(monkeypatch):
    # What claims to be on a GPU would take kernels.
    monkeypatch.setattr(_operation, "uses_triton", lambda *_: False)
    case = Case()
    images = pictures(3)[0]
    wanted = case.explainer.explain_batch(images, details=True)
    case.explainer._graphs = case.graphs

    class OnGpu(torch.Tensor):
        is_cuda = True

    for _ in range(2):
        why = case.explainer.explain_batch(images.as_subclass(OnGpu), details=True)
        assert torch.equal(why.maps, wanted.maps)
        assert torch.equal(why.labels, wanted.labels)
        assert torch.equal(case.explainer.explain_batch(images.as_subclass(OnGpu)), wanted.maps)
    assert case.counts == (1, 4)


def test_bad_arguments():
    with pytest.raises(TypeError, match="`cuda_graphs` must be True, False or 'auto', got 1"):
        Explainer(common(), cuda_graphs=1)
    explainer = Explainer(common().eval(), channels=4, triplets=5, cuda_graphs=True)
    explainer.build(loader(*pictures(12)))
    with pytest.raises(ValueError, match="`cuda_graphs` must not be True for a model on cpu, got"):
        explainer.explain_batch(pictures(2)[0])


@pytest.mark.cuda
def test_graphs_on_a_gpu():
    model = common(norm=True).eval().cuda()
    explainer = Explainer(model, channels=4, triplets=5, cuda_graphs=True)
    explainer.build(loader(*pictures(12)))
    plain = Explainer(model, database=explainer.database)
    for count in (1, 4, 1, 4):
        images = pictures(count)[0].cuda()
        torch.testing.assert_close(explainer.explain_batch(images), plain.explain_batch(images))
    assert len(explainer._graphs) == 2
    with torch.no_grad():
        model.backbone.last.weight.add_(0.1)
    torch.testing.assert_close(explainer.explain_batch(images), plain.explain_batch(images))


# --- "auto"


@pytest.mark.parametrize(("ratio", "captures"), [(1.02, True), (3.0, False)])
def test_auto_captures_what_the_host_is_too_slow_for(ratio, captures):
    case = Case(auto=True)
    images = pictures(3)[0]
    for _ in range(TRIALS_UNTIMED + TRIALS + 2):
        case.run(images)
    (recorder,) = Recorder.made
    assert len(recorder.trials) == TRIALS  # none of the first calls, nor more than it takes
    assert case.counts == (0, 0)  # nothing waits for a run that has not ended
    for trial in recorder.trials[:-1]:
        trial.told = ratio
    case.run(images)
    assert case.counts == (0, 0)
    recorder.trials[-1].told = ratio
    for _ in range(3):
        case.run(images)
    assert case.counts == ((1, 3) if captures else (0, 0))
    assert len(recorder.trials) == TRIALS
    case.run(pictures(2)[0])  # another shape begins anew
    assert case.counts[0] == captures


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_auto_leaves_the_cpu_alone(index):
    if index != "exact":
        pytest.importorskip("faiss")
    explainer = Explainer(common().eval(), channels=4, triplets=5, index=index)
    explainer.build(loader(*pictures(12)))
    assert len(explainer._graphs) == 0
    for _ in range(8):
        explainer.explain_batch(pictures(2)[0])
    assert len(explainer._graphs) == 0
    assert Explainer(common(), cuda_graphs=False)._graphs is None


# --- a model's own numbers


class Switched(Net):
    def __init__(self):
        super().__init__(common().head)
        self.sign, self.on, self.names = 1, True, ["a"]

    def forward(self, images):
        return self.sign * super().forward(images) * len(self.names)


def switched():
    case = Case()
    model = Switched().eval()
    case.explainer = Explainer(model, channels=4, triplets=5)
    case.explainer.build(loader(*pictures(12)))
    case.model, case.graphs = model, Graphs(model, Recorder)
    return case


def test_captured_again_when_a_flag_changes():
    case = switched()
    images = pictures(3)[0]
    case.run(images)
    case.run(images)
    assert case.counts == (1, 2)
    case.model.sign = -1
    case.run(images)
    assert case.counts == (2, 3)
    case.model.names.append("b")
    case.run(images)
    assert case.counts == (3, 4)
    case.model.train()
    case.run(images)
    assert case.counts == (3, 5)


def test_a_model_that_counts_its_passes_is_not_captured():
    case = switched()

    class Counting(Switched):
        def forward(self, images):
            self.on = not self.on
            return super().forward(images)

    case.model.__class__ = Counting
    images = pictures(3)[0]
    with pytest.warns(RuntimeWarning, match="its forward pass changes a number of its own"):
        case.run(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run(images)
    assert case.counts[1] == 0
