"""The Hugging Face pipeline: what it returns for pictures is what the Explainer finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import library
from networks import loader, pictures
from PIL import Image

import gcfast

transformers = library("transformers")
from gcfast.adapters.hf import EmbeddingGradCAM  # noqa: E402


@pytest.fixture
def parts() -> tuple[Any, Any, gcfast.Explainer]:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    model = transformers.ResNetModel(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    explainer = gcfast.Explainer(model, channels=5, output_key="pooler_output")
    images, labels = pictures(24, size=(32, 32))
    explainer.build(loader(images, [f"class {n}" for n in labels.tolist()]))
    return model, processor, explainer


def test_pictures(parts: tuple[Any, Any, gcfast.Explainer], tmp_path: Path) -> None:
    model, processor, explainer = parts
    random = np.random.default_rng(0)
    sizes = ((40, 50), (32, 32), (20, 64))
    images = [Image.fromarray(random.integers(0, 256, (*s, 3), np.uint8)) for s in sizes]
    images[0].save(tmp_path / "first.png")
    assert explainer.database is not None
    explainer.database.save(tmp_path / "db")
    pipe = transformers.pipeline(
        "image-feature-extraction",
        model=model,
        image_processor=processor,
        pipeline_class=EmbeddingGradCAM,
        database=tmp_path / "db",
        output_key="pooler_output",
        device=torch.device("cpu"),
    )
    got = pipe([str(tmp_path / "first.png"), *images[1:]], batch_size=2)
    pixels = torch.cat([processor(i, return_tensors="pt")["pixel_values"] for i in images])
    why = explainer.explain_batch(pixels, details=True)
    torch.testing.assert_close(torch.stack([one["map"] for one in got]), why.maps)
    torch.testing.assert_close(torch.stack([one["embedding"] for one in got]), why.embeddings)
    assert [one["neighbor"] for one in got] == why.neighbors[:, 0].tolist()
    assert [one["label"] for one in got] == [name for (name,) in why.label_names]
    assert [one["distance"] for one in got] == pytest.approx(why.distances[:, 0].tolist(), abs=1e-6)
    single = pipe(images[1])
    torch.testing.assert_close(single["map"], why.maps[1])


def test_settings_and_wrong_calls(parts: tuple[Any, Any, gcfast.Explainer]) -> None:
    model, processor, explainer = parts
    options = {"image_processor": processor, "database": explainer.database}
    pipe = EmbeddingGradCAM(
        model, output_key="pooler_output", explainer_settings={"k": 3}, **options
    )
    assert pipe.explainer.k == 3
    with pytest.raises(TypeError, match="`database` must be a"):
        EmbeddingGradCAM(model, image_processor=processor, database=3)
    with pytest.raises(gcfast.ModelMismatchError, match="'embedder'"):
        EmbeddingGradCAM(model, layer="embedder", output_key="pooler_output", **options)
    with pytest.raises(gcfast.ModelMismatchError, match="with `output_key`: 'pooler_output'"):
        EmbeddingGradCAM(model, **options)
