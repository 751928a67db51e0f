"""A Hugging Face pipeline that explains: pictures in any form it reads → maps from a database."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from gcfast import Database, Explanation
from gcfast._extras import needs_extra
from gcfast.adapters._explained import explainer_of
from gcfast.method.labels import label_name

with needs_extra("hf", __name__):
    from transformers import ImageFeatureExtractionPipeline


class EmbeddingGradCAM(ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """``pipeline("image-feature-extraction", …, pipeline_class=EmbeddingGradCAM, database=…)``.

    For each picture (a path, a URL, a PIL image) it returns a dict: ``map`` [h, w] float32 in
    [0, 1] on the pixels that the model saw, after resizing and cropping; ``embedding`` [D]; and of
    the nearest row ``neighbor`` (its number), ``label`` (the name, or the number as text) and
    ``distance`` (squared L2). ``batch_size`` and ``device`` are the pipeline's.

    Args:
        *args: of the pipeline.
        database: a :class:`gcfast.Database` or the path of one.
        layer: the database's layer, which None takes.
        output_key: where the embedding is in the model's output, "pooler_output" say.
        explainer_settings: further ones of :class:`gcfast.Explainer`, instead of those that are
            stored.
        **kwargs: of the pipeline.

    Raises:
        TypeError, ValueError, GcfastError: as :func:`gcfast.load`.
    """

    def __init__(
        self,
        *args: Any,
        database: Database | str | os.PathLike[str],
        layer: str | None = None,
        output_key: str | int | None = None,
        explainer_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        settings = {"layer": layer, "output_key": output_key, **(explainer_settings or {})}
        self.explainer = explainer_of(database, self.model, **settings)

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        why = self.explainer.explain_batch(model_inputs["pixel_values"], details=True)
        assert isinstance(why, Explanation)
        return {
            "maps": why.maps,
            "embeddings": why.embeddings,
            "neighbors": why.neighbors,
            "distances": why.distances,
            "labels": why.labels,
        }

    def postprocess(self, model_outputs: dict[str, Tensor], **_: Any) -> dict[str, Any]:
        """Return the dict of one picture; see the class."""
        label = model_outputs["labels"][0, 0].item()
        database = self.explainer.database
        assert database is not None
        return {
            "map": model_outputs["maps"][0],
            "embedding": model_outputs["embeddings"][0],
            "neighbor": int(model_outputs["neighbors"][0, 0]),
            "label": label_name(label, database.class_names),
            "distance": float(model_outputs["distances"][0, 0]),
        }
