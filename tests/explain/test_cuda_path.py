"""The CUDA path of everything public, on a device that is pretended: see pretend_cuda.py.

What it gives is compared with what the CPU gives; where it waits for the device is listed.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from cuda_case import FIELDS, agree, needs_no_gpu, twins
from networks import CHANNELS, TokenNet, loader, other, pictures
from pretend_cuda import PretendCuda

import gcfast
from gcfast import Explainer, TokenGrid

pytestmark = needs_no_gpu

OPTIONS = [
    {},
    {"details": True},
    {"size": (5, 7), "normalize": "minmax"},
    {"size": 3, "normalize": None, "relu": False, "center": 1.0, "details": True},
    {"relu": False, "center": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_explain_batch_waits_for_nothing(cuda, k, options):
    plain, ours = twins(cuda, k=k)
    images = pictures(3)[0]
    on_gpu = cuda.cuda(images)
    ours.explain_batch(on_gpu, **options)  # the first brings the database over
    cuda.waits.clear(), cuda.uploads.clear(), cuda.launches.clear()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            got = ours.explain_batch(on_gpu, **options)
    assert (cuda.waits, cuda.uploads) == ([], [])
    assert Counter(cuda.launches) == dict.fromkeys(
        ("_candidates_kernel", "_nearest_kernel", "_sparse_cam_kernel"), 3
    )
    agree(got, plain.explain_batch(images, **options))


def test_batches_of_any_size_share_compiled_kernels(cuda):
    _, ours = twins(cuda)
    for size in (3, 4, 7, 16):
        ours.explain_batch(cuda.cuda(pictures(size)[0]))
        cuda.forms = {form for form in cuda.forms if form[0] != "_squares_kernel"}
    assert sorted(form[0] for form in cuda.forms) == [
        "_candidates_kernel", "_nearest_kernel", "_sparse_cam_kernel",
    ]  # fmt: skip
    for size in (17, 32, 33):  # another block of queries
        ours.explain_batch(cuda.cuda(pictures(size)[0]))
    assert sorted(form[0] for form in cuda.forms) == [
        "_candidates_kernel", "_candidates_kernel", "_nearest_kernel", "_sparse_cam_kernel",
    ]  # fmt: skip


def test_explain_batch_with_its_kernels_interpreted(monkeypatch):
    with PretendCuda(monkeypatch, interpreted=True) as cuda:
        plain, ours = twins(cuda, k=2)
        images = pictures(2)[0]
        got = ours.explain_batch(cuda.cuda(images), size=5, center=1.0, details=True)
        agree(got, plain.explain_batch(images, size=5, center=1.0, details=True))
        assert {"_candidates_kernel", "_nearest_kernel", "_sparse_cam_kernel"} <= set(cuda.launches)


def test_explain_batch_in_other_precisions(cuda):
    images = pictures(3)[0]
    for dtype in (torch.float16, torch.bfloat16):
        plain, ours = twins(cuda, dtype=dtype)
        got = ours.explain_batch(cuda.cuda(images.to(dtype)), details=True)
        agree(got, plain.explain_batch(images.to(dtype), details=True), atol=1e-2)
        assert got.embeddings.dtype == got.maps.dtype == torch.float32
    plain, ours = twins(cuda)
    with torch.autocast("cuda", torch.bfloat16):
        cuda.waits.clear()
        got = ours.explain_batch(cuda.cuda(images), details=True)
        assert got.embeddings.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        agree(got, plain.explain_batch(images, details=True), atol=1e-2)


def test_explain_batch_of_tokens_of_no_image_and_of_nan(cuda):
    plain, ours = twins(
        cuda, model=TokenNet(), layer="first", reshape=TokenGrid(prefix=1), channels=CHANNELS
    )
    images = pictures(3)[0]
    agree(ours.explain_batch(cuda.cuda(images)), plain.explain_batch(images))
    for details in (False, True):
        got = ours.explain_batch(cuda.cuda(images[:0]), details=details)
        agree(got, plain.explain_batch(images[:0], details=details))
    images[1, 0, 0, 0] = torch.nan
    maps = ours.explain_batch(cuda.cuda(images)).cpu()
    assert maps.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_a_device_that_is_not_the_current_one(cuda):
    plain, ours = twins(cuda, index=1)
    images = pictures(3)[0]
    got = ours.explain_batch(cuda.cuda(images, 1), details=True)
    assert got.maps.device == torch.device("cuda", 1)
    agree(got, plain.explain_batch(images, details=True))
    with pytest.raises(ValueError, match="`images` must be on the model's device, cuda:1, got cu"):
        ours.explain_batch(cuda.cuda(images, 0))
    database = ours.build(loader(*pictures(12)))
    assert len(database) == 12
    other_head = Explainer(cuda.cuda(other().eval(), 1), channels=4, triplets=5)
    assert len(other_head.build(loader(*pictures(12)))) == 12


def test_a_database_of_float16(cuda):
    plain, _ = twins(cuda)
    database = plain.database.in_storage("float16")
    plain.database = database
    ours = Explainer(cuda.cuda(copy.deepcopy(plain.network.model)), database=database, channels=4)
    images = pictures(3)[0]
    got = ours.explain_batch(cuda.cuda(images), details=True)
    agree(got, plain.explain_batch(images, details=True), atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_explain_labelled(cuda, options):
    options = {name: value for name, value in options.items() if name != "details"}
    plain, ours = twins(cuda)
    images, labels = pictures(4)
    got = ours.explain_labelled(cuda.cuda(images), labels, **options)
    agree(got, plain.explain_labelled(images, labels, **options))
    # The labels may be where the images are.
    agree(ours.explain_labelled(cuda.cuda(images), cuda.cuda(labels), **options), got.cpu())
    assert cuda.launches.count("_sparse_cam_kernel") == 2
    empty = ours.explain_labelled(cuda.cuda(images[:0]), labels[:0])
    assert empty.is_cuda
    assert empty.shape == (0, 8, 8)


@pytest.mark.parametrize("hinge", ["hardest", "skip"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_explain_triplet(cuda, method, hinge):
    plain, ours = twins(cuda, method=method, on_no_triplet=hinge)
    images = [pictures(2)[0] for _ in range(3)]
    for center in (0.0, 1.0):
        got = ours.explain_triplet(*map(cuda.cuda, images), center=center)
        for one, wanted in zip(got, plain.explain_triplet(*images, center=center), strict=True):
            agree(one, wanted)
    assert cuda.launches.count("_sparse_cam_kernel") == 6


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_the_exported_module(cuda, k, details):
    plain, ours = twins(cuda, k=k)
    images = pictures(3)[0]
    wanted = plain.explain_batch(images, details=True)
    module = ours.export(details=details)
    module(cuda.cuda(images))
    on_gpu = cuda.cuda(images)
    cuda.waits.clear(), cuda.uploads.clear()
    got = module(on_gpu)
    assert (cuda.waits, cuda.uploads) == ([], [])
    parts = got if details else (got,)
    for name, part in zip(FIELDS, parts, strict=False):
        agree(part, getattr(wanted, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
def test_cuda_graphs(cuda, k, dtype):
    plain, eager = twins(cuda, k=k, dtype=dtype)
    model = eager.network.model
    ours = Explainer(model, database=plain.database, channels=4, k=k, cuda_graphs=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for count in (3, 1, 3, 1):
        images = pictures(count)[0].to(dtype)
        for details in (False, True):
            on_gpu = cuda.cuda(images)
            got = ours.explain_batch(on_gpu, details=details)
            agree(got, plain.explain_batch(images, details=details), atol=tolerance)
    assert len(ours._graphs) == 2
    cuda.waits.clear(), cuda.uploads.clear(), cuda.launches.clear()
    ours.explain_batch(on_gpu)
    assert (cuda.waits, cuda.uploads, cuda.launches) == ([], [], [])
    with torch.no_grad():  # captured anew
        model.backbone.last.weight.add_(0.1)
        plain.network.model.backbone.last.weight.add_(0.1)
    agree(ours.explain_batch(on_gpu), plain.explain_batch(images), atol=tolerance)
    assert cuda.launches


def test_cuda_graphs_from_another_stream_and_device(cuda):
    plain, eager = twins(cuda, index=1)
    ours = Explainer(eager.network.model, database=plain.database, channels=4, cuda_graphs=True)
    images = pictures(2)[0]
    for _ in range(3):
        stream = torch.cuda.Stream(1)
        with torch.cuda.stream(stream):
            got = ours.explain_batch(cuda.cuda(images, 1))
        torch.cuda.current_stream(1).wait_stream(stream)
        got.record_stream(torch.cuda.current_stream(1))
        agree(got, plain.explain_batch(images))
    assert len(ours._graphs) == 1


def test_cuda_graphs_under_autocast_and_inference_mode(cuda):
    plain, eager = twins(cuda)
    ours = Explainer(eager.network.model, database=plain.database, channels=4, cuda_graphs=True)
    images = pictures(2)[0]
    for mode in (True, False, True):
        with torch.inference_mode(mode), torch.autocast("cuda", torch.bfloat16):
            got = ours.explain_batch(cuda.cuda(images))
            with torch.autocast("cpu", torch.bfloat16):
                agree(got, plain.explain_batch(images), atol=2e-2)
    assert len(ours._graphs) == 1


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_explain_stream(cuda, index, k):
    if index != "exact":
        pytest.importorskip("faiss")
    plain, ours = twins(cuda, index=0, k=k)
    if index != "exact":
        settings = {"database": plain.database, "channels": 4, "k": k, "index": index}
        plain, ours = (Explainer(e.network.model, **settings) for e in (plain, ours))
    given = [pictures(count)[0] for count in (2, 3, 0, 1)]
    for details in (False, True):
        got = list(ours.explain_stream(map(cuda.cuda, given), details=details))
        for one, images in zip(got, given, strict=True):
            agree(one, plain.explain_batch(images, details=details))
            agree(ours.explain_batch(cuda.cuda(images), details=details), one_on_cpu(one))


def one_on_cpu(one):
    if isinstance(one, torch.Tensor):
        return one.cpu()
    return type(one)(**{name: getattr(one, name).cpu() for name in FIELDS})


def test_calibrated_confidence(cuda):
    plain, ours = twins(cuda)
    held_out = loader(*pictures(15))
    wanted, got = plain.calibrate(held_out), ours.calibrate(held_out)
    torch.testing.assert_close(got.cosine, wanted.cosine, atol=1e-4, rtol=1e-3)
    images = pictures(3)[0]
    on_gpu = cuda.cuda(images)
    cuda.waits.clear(), cuda.uploads.clear()
    why = ours.explain_batch(on_gpu, details=True)
    assert (cuda.waits, cuda.uploads) == ([], [])
    agree(why.confidence, plain.explain_batch(images, details=True).confidence, atol=1e-4)


def test_metrics(cuda):
    maps, others = torch.rand(4, 12, 10), torch.rand(4, 12, 10)
    masks = torch.rand(4, 12, 10) < 0.4
    boxes = torch.tensor([[1, 2, 6, 9], [0, 0, 5, 5], [3, 3, 10, 12], [2, 1, 8, 4]])
    pairs = torch.stack([masks, ~masks], 1)
    match = torch.tensor([0, 1, 1, 0])
    metrics = gcfast.metrics
    for function, arguments in {
        metrics.cosine: (maps, others),
        metrics.spearman: (maps, others),
        metrics.mask_score: (maps, masks),
        metrics.box_score: (maps, boxes),
        metrics.part_score: (maps, masks),
        metrics.pointing_game: (maps, masks, 2),
        metrics.localisation_iou: (maps, boxes, [0.3, 0.5]),
        metrics.best_box_iou: (maps, boxes, [0.3, 0.5]),
        metrics.two_object_scores: (maps, pairs, match),
    }.items():
        wanted = function(*arguments)
        got = function(*(cuda.cuda(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for one, two in zip(
            got if isinstance(got, tuple) else (got,),
            wanted if isinstance(wanted, tuple) else (wanted,),
            strict=True,
        ):
            torch.testing.assert_close(one.cpu(), two)


@pytest.mark.parametrize(("B", "N"), [(0, 3), (2, 0), (0, 0)])
def test_operations_on_nothing_launch_no_empty_grid(monkeypatch, B, N):
    with PretendCuda(monkeypatch, interpreted=True) as cuda:
        _operations_on_nothing(cuda, B, N)


def _operations_on_nothing(cuda, B, N):
    def made(*shape, dtype=torch.float32):
        return cuda.cuda(torch.ones(shape, dtype=dtype))

    ids = [made(size, dtype=torch.int64) for size in (B, B, N)]
    _, rows = gcfast.ops.knn(made(B, 4), made(N, 4), 2)
    assert rows.shape == (B, 2)
    assert gcfast.ops.top_m(made(B, 5), 3)[0].shape == (B, 3)
    gradients, valid = made(B, N, 5, 2, 2), made(B, N, dtype=torch.bool)
    for method in gcfast.ops.METHODS:
        more = {"method": method, "activations": made(B, 5, 2, 2)}
        assert not gcfast.ops.grad_weights(gradients, valid, **more).cpu().any()
        more = {"method": method, "activation_sums": made(B, 5), "pixels": 4}
        got = gcfast.ops.head_grad_weights(made(B, N, 4), made(4, 5), valid, **more)
        assert not got.cpu().any()
    anchors = (made(B, 4), *ids[:2], made(N, 4), ids[2])
    assert gcfast.ops.sample_triplets(*anchors, triplets=3, margin=0.1).positives.shape == (B, 3)
    assert gcfast.ops.mean_cotangents(*anchors, margin=0.1)[0].shape == (B, 4)
    table = made(N, 2, dtype=torch.int64), made(N, 2)
    maps = gcfast.ops.sparse_cam(
        made(B, 5, 2, 2), rows[:, :1].clamp(max=N - 1), *table, size=(3, 3)
    )
    assert maps.shape == (B, 3, 3)
