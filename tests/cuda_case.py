"""Explainers on the CPU and on a GPU, and that they agree."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from networks import common, loader, pictures

from gcfast import Explainer

FIELDS = ("maps", "embeddings", "neighbors", "distances", "labels", "flat")


def twins(gpu, *, model=None, dtype=None, **settings):
    """(an explainer on the CPU with a database, one on the GPU with the same, without graphs)."""
    model = (common(norm=True) if model is None else model).eval().to(dtype)
    images, labels = pictures(12)
    settings = {"channels": 4, "triplets": 5, "cuda_graphs": False, **settings}
    plain = Explainer(model, **settings)
    plain.build(loader(images.to(dtype), labels))
    ours = Explainer(copy.deepcopy(model).to(gpu), database=plain.database, **settings)
    return plain, ours


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """An error where the host waits for the device, also for a copy to or from pageable memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def agree_in_low_precision(ours, wanted, *, atol):
    """Compare explanations in all embeddings, and elsewhere where the same rows were found."""
    agree(ours.embeddings, wanted.embeddings, atol=atol)
    same = (ours.neighbors.cpu() == wanted.neighbors).all(1)
    assert same.float().mean() >= 0.5
    for name in FIELDS:
        agree(
            getattr(ours, name)[same.to(ours.maps.device)], getattr(wanted, name)[same], atol=atol
        )


def agree(ours, wanted, *, atol=1e-5):
    """Compare what a GPU gave, a tensor or an explanation, with what the CPU gave."""
    if isinstance(wanted, torch.Tensor):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), wanted, atol=atol, rtol=1e-4, equal_nan=True)
        return
    for name in FIELDS:
        agree(getattr(ours, name), getattr(wanted, name), atol=atol)
