"""explain_batch as a GPU runs it: the kernels, and nothing that waits for the device."""

import functools

import pytest
import torch
from networks import CHANNELS, OTHER_HEADS, Net, common, loader, pictures
from torch.utils._python_dispatch import TorchDispatchMode

from gcfast import Explainer, ops, reference
from gcfast.explain import attached
from gcfast.explain.maps import Explained
from gcfast.explain.result import Finish
from gcfast.ops import _operation

# What must see values, and so waits for a device: the size of a result, a number for Python, or a
# copy to the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


class NoWaiting(TorchDispatchMode):
    """Raises at an operation that would wait for a CUDA device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("index", "index_put"):  # by a mask it is nonzero
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), name
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(args[0], torch.Tensor):
            assert out.device == args[0].device
        return out


def _explainer(model=None, device="cpu", **settings):
    model = (model or common()).eval().to(device)
    explainer = Explainer(model, channels=4, triplets=5, **settings)
    explainer.build(loader(*pictures(12)))
    explainer.explain_batch(pictures(1)[0].to(device))  # the first pass looks at the model
    return explainer


def _run(explainer, images, **options):
    finish = {"size": (9, 7), "center": 0.0, "relu": True, "normalize": "max"} | options
    return explainer.attach().explain(images, Finish(**finish), waits=False)


@pytest.mark.parametrize(("k", "refine"), [(1, None), (3, None), (1, "auto")])
def test_nothing_waits_for_the_device(k, refine, monkeypatch):
    # What the reference does on a device.
    monkeypatch.setattr(reference, "_smallest", reference._smallest_by_sort)
    explainer = _explainer(k=k, refine=refine)
    images = pictures(4)[0]
    with NoWaiting():
        out = _run(explainer, images, center=1.0)
        why = out.explanation(explainer.attach().transfer.labels)
    wanted = explainer.explain_batch(images, size=(9, 7), center=1.0, details=True)
    assert torch.equal(why.maps, wanted.maps)
    assert torch.equal(why.neighbors, wanted.neighbors)
    assert torch.equal(why.labels, wanted.labels)
    assert torch.equal(why.flat, wanted.flat)


@pytest.mark.parametrize(("k", "most"), [(1, 13), (3, 18)])
def test_class_proxies_neither_wait_nor_launch_much(k, most, monkeypatch):
    monkeypatch.setattr(reference, "_smallest", reference._smallest_by_sort)
    explainer = Explainer(common().eval(), method="proxy", k=k)
    explainer.build(loader(*pictures(12)))
    images = pictures(4)[0].contiguous(memory_format=torch.channels_last)
    wanted = explainer.explain_batch(images, size=(9, 7))
    with NoWaiting():
        out = _run(explainer, images)
    assert torch.equal(out.maps, wanted)
    with Launches() as model:
        explainer.network.embed(images)
    found = explainer.attach().transfer.search(torch.randn(4, explainer.database.dim), k)
    monkeypatch.setattr(ops.knn, "trusted", lambda *_, **__: found)
    monkeypatch.setattr(ops.dense_cam, "trusted", lambda *_, **__: wanted)
    with Launches() as whole:
        _run(explainer, images)
    assert len(whole.made) - len(model.made) <= most, whole.made[len(model.made) :]


@pytest.mark.parametrize("refine", [None, "auto"])
def test_the_kernels_give_what_the_reference_gives(refine, monkeypatch, device):
    explainer = _explainer(k=2, refine=refine, device=device)
    images = pictures(2)[0].to(device)
    monkeypatch.setattr(_operation, "uses_triton", lambda *_: False)
    wanted = _run(explainer, images, size=(5, 5), center=1.0)
    launched = []
    monkeypatch.setattr(_operation, "uses_triton", lambda *_: launched.append(1) or True)
    got = _run(explainer, images, size=(5, 5), center=1.0)
    assert launched
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_the_check_finds_what_waits():
    for waits in (
        lambda x: bool(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("meta"),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            waits(torch.ones(3))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("k", "refine"), [(1, None), (3, None), (1, "auto")])
def test_nothing_waits_on_a_gpu(k, refine, device):
    explainer = _explainer(device=device, k=k, refine=refine)
    images = pictures(4)[0].to(device)
    wanted = explainer.explain_batch(images, center=1.0, details=True)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        why = explainer.explain_batch(images, center=1.0, details=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(why.maps, wanted.maps)


def test_a_cuda_tensor_takes_this_path(monkeypatch):
    seen = []
    # What claims to be on a GPU would take kernels.
    monkeypatch.setattr(_operation, "uses_triton", lambda *_: False)
    nothing = Explained(*[None] * 5)
    monkeypatch.setattr(attached, "explained", lambda *_, **kw: seen.append(kw) or nothing)
    explainer = _explainer_without_a_pass()
    explainer.attach().explain(pictures(1)[0], finish=None)
    assert not seen[-1]["marks"]

    class OnGpu(torch.Tensor):
        is_cuda = True

    images = pictures(1)[0].as_subclass(OnGpu)
    explainer.attach().explain(images, finish=None)
    assert seen[-1]["marks"]
    assert seen[-1]["cam"] is ops.sparse_cam.trusted


def _explainer_without_a_pass():
    explainer = Explainer(common().eval(), channels=4, triplets=5)
    explainer.build(loader(*pictures(12)))
    return explainer


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: every operation that is not a view or an allocation."""

    free = ("view", "expand", "slice", "detach", "unsqueeze", "alias", "select", "empty")

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name = func.name().removeprefix("aten::").split(".")[0]
        if name not in self.free:
            self.made.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("k", "most"), [(1, 4), (3, 6)])
def test_few_launches_beside_the_model_and_the_kernels(k, most, monkeypatch):
    explainer = _explainer(k=k)
    images = pictures(4)[0].contiguous(memory_format=torch.channels_last)
    with Launches() as model:
        explainer.network.embed(images)
    found = explainer.attach().transfer.search(torch.randn(4, explainer.database.dim), k)
    maps = _run(explainer, images).maps
    # Two kernels and one, on a GPU.
    monkeypatch.setattr(ops.knn, "trusted", lambda *_, **__: found)
    monkeypatch.setattr(ops.sparse_cam, "trusted", lambda *_, **__: maps)
    with Launches() as whole:
        _run(explainer, images)
    assert len(whole.made) - len(model.made) <= most, whole.made


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("head", ["conv", "other"])
def test_the_kernel_under_explain_batch(head, k, monkeypatch, device):
    model = common() if head == "conv" else Net(OTHER_HEADS["gem"](CHANNELS))
    explainer = _explainer(model, device, k=k)
    images = pictures(3)[0].to(device)
    chosen, maps = ops.sparse_cam.trusted, {}
    for backend in ("reference", "triton"):
        monkeypatch.setattr(ops.sparse_cam, "trusted", functools.partial(chosen, backend=backend))
        maps[backend] = _run(explainer, images).maps
    torch.testing.assert_close(maps["triton"], maps["reference"], atol=2e-6, rtol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_an_image_that_is_not_finite_gets_a_map_of_nan(k, value, backend, monkeypatch, device):
    explainer = _explainer(device=device, k=k)
    images = pictures(3)[0].to(device)
    wanted = explainer.explain_batch(images, size=(9, 7))
    images[1] = value
    kernel = functools.partial(ops.sparse_cam.trusted, backend=backend)
    monkeypatch.setattr(ops.sparse_cam, "trusted", kernel)
    maps = _run(explainer, images).maps
    assert maps[1].isnan().all()
    torch.testing.assert_close(maps[::2], wanted[::2], atol=2e-6, rtol=2e-6)


def test_a_missing_neighbour_weighs_nothing():
    explainer = _explainer(k=20)  # of 12 rows
    images = pictures(2)[0]
    out = _run(explainer, images)
    assert (out.neighbors[:, 12:] == -1).all()
    assert torch.equal(out.maps, explainer.explain_batch(images, size=(9, 7)))


def test_autocast_is_the_models_and_not_ours():
    explainer = _explainer()
    images = pictures(3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        captured = explainer.network.embed(images)
        out = _run(explainer, images)
    assert captured.output.dtype == torch.bfloat16
    assert out.embeddings.dtype == out.maps.dtype == torch.float32
    torch.testing.assert_close(
        out.embeddings, torch.nn.functional.normalize(captured.output.float(), dim=1)
    )
