"""Explainers on the CPU and on the pretended GPU, and that they agree."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import common, loader, pictures

from gcfast import Explainer

needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"
)
FIELDS = ("maps", "embeddings", "neighbors", "distances", "labels", "flat")


def twins(cuda, images=None, *, model=None, dtype=None, index=0, **settings):
    """(an explainer on the CPU with a database, one on the GPU with the same)."""
    images, labels = pictures(12) if images is None else images
    model = (common(norm=True) if model is None else model).eval()
    if dtype is not None:
        model = model.to(dtype)
        images = images.to(dtype)
    settings = {"channels": 4, "triplets": 5, **settings}
    plain = Explainer(model, **settings)
    plain.build(loader(images, labels))
    ours = Explainer(cuda.cuda(copy.deepcopy(model), index), database=plain.database, **settings)
    return plain, ours


def agree(ours, wanted, *, atol=1e-5):
    if isinstance(wanted, torch.Tensor):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), wanted, atol=atol, rtol=1e-4, equal_nan=True)
        return
    for name in FIELDS:
        agree(getattr(ours, name), getattr(wanted, name), atol=atol)
