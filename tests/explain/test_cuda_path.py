"""Everything public on a GPU: it gives what the CPU gives, and waits for nothing in between."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_case import FIELDS, agree, agree_in_low_precision, no_waits, twins
from networks import CHANNELS, TokenNet, loader, pictures

import gcfast
from gcfast import Explainer, TokenGrid

pytestmark = pytest.mark.cuda

OPTIONS = [
    {},
    {"details": True},
    {"size": (5, 7), "normalize": "minmax"},
    {"size": 3, "normalize": None, "relu": False, "center": 1.0, "details": True},
    {"relu": False, "center": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_explain_batch_waits_for_nothing(gpu, k, options):
    plain, ours = twins(gpu, k=k)
    images = pictures(3)[0]
    on_gpu = images.to(gpu)
    ours.explain_batch(on_gpu, **options)  # the first brings the database over
    wanted = plain.explain_batch(images, **options)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), no_waits():
            got = ours.explain_batch(on_gpu, **options)
        agree(got, wanted)


def test_explain_batch_in_other_precisions(gpu):
    images = pictures(8)[0]
    for dtype in (torch.float16, torch.bfloat16):
        plain, ours = twins(gpu, dtype=dtype)
        got = ours.explain_batch(images.to(gpu, dtype), details=True)
        # Maps reach 1; the two convolutions sum in another order.
        atol = 10 * torch.finfo(dtype).eps
        wanted = plain.explain_batch(images.to(dtype), details=True)
        agree_in_low_precision(got, wanted, atol=atol)
        assert got.embeddings.dtype == got.maps.dtype == torch.float32
    plain, ours = twins(gpu)
    with torch.autocast("cuda", torch.bfloat16):
        got = ours.explain_batch(images.to(gpu), details=True)
    assert got.embeddings.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        agree_in_low_precision(got, plain.explain_batch(images, details=True), atol=atol)


def test_explain_batch_of_tokens_of_no_image_and_of_nan(gpu):
    plain, ours = twins(
        gpu, model=TokenNet(), layer="first", reshape=TokenGrid(prefix=1), channels=CHANNELS
    )
    images = pictures(3)[0]
    agree(ours.explain_batch(images.to(gpu)), plain.explain_batch(images))
    for details in (False, True):
        got = ours.explain_batch(images[:0].to(gpu), details=details)
        agree(got, plain.explain_batch(images[:0], details=details))
    images[1, 0, 0, 0] = torch.nan
    maps = ours.explain_batch(images.to(gpu)).cpu()
    assert maps.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_images_on_another_device(gpu):
    _, ours = twins(gpu)
    with pytest.raises(ValueError, match="`images` must be on the model's device, cuda:0, got cpu"):
        ours.explain_batch(pictures(3)[0])


def test_a_database_of_float16(gpu):
    plain, _ = twins(gpu)
    plain.database = plain.database.in_storage("float16")
    model = copy.deepcopy(plain.network.model).to(gpu)
    ours = Explainer(model, database=plain.database, channels=4, cuda_graphs=False)
    images = pictures(3)[0]
    got = ours.explain_batch(images.to(gpu), details=True)
    agree(got, plain.explain_batch(images, details=True), atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_explain_labelled(gpu, options):
    options = {name: value for name, value in options.items() if name != "details"}
    plain, ours = twins(gpu)
    images, labels = pictures(4)
    wanted = plain.explain_labelled(images, labels, **options)
    for where in ("cpu", gpu):  # the labels may be where the images are
        agree(ours.explain_labelled(images.to(gpu), labels.to(where), **options), wanted)
    empty = ours.explain_labelled(images[:0].to(gpu), labels[:0])
    assert empty.is_cuda
    assert empty.shape == (0, 8, 8)


@pytest.mark.parametrize("hinge", ["hardest", "skip"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_explain_triplet(gpu, method, hinge):
    plain, ours = twins(gpu, method=method, on_no_triplet=hinge)
    images = [pictures(2)[0] for _ in range(3)]
    for center in (0.0, 1.0):
        got = ours.explain_triplet(*(part.to(gpu) for part in images), center=center)
        for one, wanted in zip(got, plain.explain_triplet(*images, center=center), strict=True):
            agree(one, wanted)


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_the_exported_module(gpu, k, details):
    plain, ours = twins(gpu, k=k)
    images = pictures(3)[0]
    on_gpu, module = images.to(gpu), ours.export(details=details)
    module(on_gpu)
    with no_waits():
        got = module(on_gpu)
    wanted = plain.explain_batch(images, details=True)
    for name, part in zip(FIELDS, got if details else (got,), strict=False):
        agree(part, getattr(wanted, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
def test_cuda_graphs(gpu, k, dtype):
    plain, eager = twins(gpu, k=k, dtype=dtype)
    model = eager.network.model
    ours = Explainer(model, database=plain.database, channels=4, k=k, cuda_graphs=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for count in (3, 1, 3, 1):
        images = pictures(count)[0].to(dtype)
        on_gpu = images.to(gpu)
        for details in (False, True):
            got = ours.explain_batch(on_gpu, details=details)
            agree(got, plain.explain_batch(images, details=details), atol=tolerance)
    assert len(ours._graphs) == 2
    with no_waits():
        ours.explain_batch(on_gpu)
    with torch.no_grad():  # captured again
        model.backbone.last.weight.add_(0.1)
        plain.network.model.backbone.last.weight.add_(0.1)
    agree(ours.explain_batch(on_gpu), plain.explain_batch(images), atol=tolerance)


def test_cuda_graphs_from_another_stream(gpu):
    plain, eager = twins(gpu)
    ours = Explainer(eager.network.model, database=plain.database, channels=4, cuda_graphs=True)
    images = pictures(2)[0]
    for _ in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = ours.explain_batch(images.to(gpu))
        torch.cuda.current_stream().wait_stream(stream)
        got.record_stream(torch.cuda.current_stream())
        agree(got, plain.explain_batch(images))
    assert len(ours._graphs) == 1


def test_cuda_graphs_under_autocast_and_inference_mode(gpu):
    plain, eager = twins(gpu)
    ours = Explainer(eager.network.model, database=plain.database, channels=4, cuda_graphs=True)
    images = pictures(2)[0]
    for mode in (True, False, True):
        with torch.inference_mode(mode), torch.autocast("cuda", torch.bfloat16):
            got = ours.explain_batch(images.to(gpu))
        with torch.autocast("cpu", torch.bfloat16):
            agree(got, plain.explain_batch(images), atol=2e-2)
    assert len(ours._graphs) == 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_explain_stream(gpu, index, k, cuda_graphs):
    if index != "exact":
        pytest.importorskip("faiss")
    plain, ours = twins(gpu, k=k)
    settings = {"database": plain.database, "channels": 4, "k": k, "index": index}
    plain = Explainer(plain.network.model, **settings)
    ours = Explainer(ours.network.model, **settings, cuda_graphs=cuda_graphs)
    given = [pictures(count)[0] for count in (2, 3, 0, 1, 2, 2, 2)]
    for details in (False, True):
        got = list(ours.explain_stream((part.to(gpu) for part in given), details=details))
        for one, images in zip(got, given, strict=True):
            agree(one, plain.explain_batch(images, details=details))
    if cuda_graphs:
        assert len(ours._graphs) == 3  # one for each number of images


def test_calibrated_confidence(gpu):
    plain, ours = twins(gpu)
    held_out = loader(*pictures(15))
    wanted, got = plain.calibrate(held_out), ours.calibrate(held_out)
    torch.testing.assert_close(got.cosine, wanted.cosine, atol=1e-4, rtol=1e-3)
    images = pictures(3)[0]
    on_gpu = images.to(gpu)
    ours.explain_batch(on_gpu, details=True)
    with no_waits():
        why = ours.explain_batch(on_gpu, details=True)
    agree(why.confidence, plain.explain_batch(images, details=True).confidence, atol=1e-4)


def test_metrics(gpu):
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
        got = function(*(a.to(gpu) if isinstance(a, torch.Tensor) else a for a in arguments))
        for one, two in zip(
            got if isinstance(got, tuple) else (got,),
            wanted if isinstance(wanted, tuple) else (wanted,),
            strict=True,
        ):
            torch.testing.assert_close(one.cpu(), two)
