"""Explainer.export_aoti: a compiled package that gives what explain_batch gives."""

import shutil

import pytest
import torch
from networks import common, loader, pictures

from gcfast import Explainer
from gcfast.errors import UnsupportedModelError


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_any_batch_and_sides(tmp_path):
    path = tmp_path / "net.pt2"
    explainer = Explainer(common().eval(), k=2, channels=4, triplets=5)
    explainer.build(loader(*pictures(30)))
    explainer.export_aoti(path, dynamic=("batch", "height", "width"), details=True, center=1.0)
    run = torch._inductor.aoti_load_package(path)
    for count, size in ((5, (8, 8)), (1, (8, 8)), (3, (12, 18))):
        images = pictures(count, size=size)[0]
        wanted = explainer.explain_batch(images, details=True, center=1.0)
        maps, embeddings, neighbors, distances, labels = run(images)
        torch.testing.assert_close(maps, wanted.maps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embeddings, wanted.embeddings)
        torch.testing.assert_close(distances, wanted.distances)
        assert torch.equal(neighbors, wanted.neighbors)
        assert torch.equal(labels, wanted.labels)


def test_without_a_compiler(tmp_path, monkeypatch):
    explainer = Explainer(common().eval(), channels=4, triplets=5)
    explainer.build(loader(*pictures(30)))
    explainer.explain_batch(pictures(2)[0])
    monkeypatch.setenv("PATH", "")
    with (
        torch._inductor.config.patch("cpp.cxx", (None, "/nowhere/g++")),
        pytest.raises(UnsupportedModelError, match=r"compiled ahead of time: .*No working C"),
    ):
        explainer.export_aoti(tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
