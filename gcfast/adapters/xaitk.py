"""xaitk-saliency's call: image similarity by Grad-CAM, as another method than its own.

The library's ``SBSM`` covers parts of an image and sees how its descriptor moves. Grad-CAM asks
which channels of a layer the cosine of two embeddings rests on, and where they are: one forward
pass of the reference and one product behind the layer for each query. The two do not
agree (rank correlation below 0.25 on drawn birds, see bench/RESULTS.md), so results are not
comparable with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcfast import ops
from gcfast._checks import require_int
from gcfast._extras import needs_extra
from gcfast.explain.maps import on_images
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.pairs import Cotangents
from gcfast.model.network import Network
from gcfast.model.tokens import Reshape
from gcfast.ops.precision import full_precision

with needs_extra("xaitk", __name__):
    from smqtk_descriptors.interfaces.image_descriptor_generator import ImageDescriptorGenerator
    from xaitk_saliency import GenerateImageSimilarityBlackboxSaliency

Array = np.ndarray[Any, Any]


class TorchDescriptor(ImageDescriptorGenerator):  # type: ignore[misc]
    """A network as a generator of descriptors, which also shows a layer.

    Args:
        model: images [B, 3, h, w] → embeddings [B, D], any ``nn.Module``.
        layer: as for :class:`gcfast.Explainer`.
        transform: from an image as xaitk has it ([H, W] or [H, W, 3]) to what the model takes,
            [3, h, w]. It must keep the whole image, since maps are stretched over it. None divides
            by 255.
        output_key: as for :class:`gcfast.Explainer`.
        reshape: as for :class:`gcfast.Explainer`.
        batch: how many images are embedded at once.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as :class:`gcfast.Explainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        transform: Callable[[Array], Tensor] | None = None,
        *,
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
        batch: int = 32,
    ) -> None:
        super().__init__()
        self.network = Network(model, layer, output_key=output_key, reshape=reshape)
        self.transform = transform or _by_255
        self.batch = require_int("batch", batch, 1)

    def images(self, matrices: Iterable[Array]) -> Iterator[Tensor]:
        """Return images as the model takes them, in batches [B, 3, h, w] of one size."""
        tensors = map(self.transform, matrices)
        device = self.network.device(torch.device("cpu"))
        for _, group in groupby(tensors, key=lambda tensor: tensor.shape):
            same = list(group)
            for start in range(0, len(same), self.batch):
                batch = torch.stack(same[start : start + self.batch]).to(device)
                yield self.network.checked("transform", batch)

    def embeddings(self, matrices: Iterable[Array]) -> Tensor:
        """Return unit embeddings [N, D] of N images."""
        return torch.cat([self._embedded(batch) for batch in self.images(matrices)])

    def generate_arrays_from_images(self, img_mat_iter: Iterable[Array]) -> Iterator[Array]:
        """See the interface: unit vectors [D] float32, in order."""
        for batch in self.images(img_mat_iter):
            yield from self._embedded(batch).cpu().numpy()

    def _embedded(self, batch: Tensor) -> Tensor:
        return normalized(self.network.embed(batch).output, True)

    def get_config(self) -> dict[str, Any]:
        """Raise NotImplementedError: a module cannot be written as JSON."""
        raise NotImplementedError("a torch.nn.Module cannot be written as JSON: pickle the model")


class GradCAMSimilarity(GenerateImageSimilarityBlackboxSaliency):  # type: ignore[misc]
    """Grad-CAM of the cosine between a reference image and each query, on the reference.

    Called as the library's ``SBSM`` is, with a :class:`TorchDescriptor` as the black box.
    """

    def _generate(
        self, ref_image: Array, query_images: Sequence[Array], blackbox: ImageDescriptorGenerator
    ) -> Array:
        if not isinstance(blackbox, TorchDescriptor):
            raise TypeError(
                "`blackbox` must be a gcfast.adapters.xaitk.TorchDescriptor, since Grad-CAM looks "
                f"inside the model, got {type(blackbox).__name__}"
            )
        size = (ref_image.shape[0], ref_image.shape[1])
        if not len(query_images):
            return np.zeros((0, *size), np.float32)
        queries = blackbox.embeddings(query_images)
        (image,) = blackbox.images([ref_image])
        with blackbox.network.differentiable(image) as captured:
            own = normalized(captured.output, True)

            def weights(query: Tensor) -> Tensor:
                part = Cotangents.one_each(query[None])
                return vjp_grad_weights(captured, own, [part], "gradcam", blackbox.network)

            many = torch.cat([weights(query) for query in queries])  # [Q, C]
        with torch.no_grad(), full_precision(image.device):
            activations = captured.activations.detach().expand(len(many), -1, -1, -1)
            maps = on_images(ops.dense_cam, captured.share)(
                activations, many, size=size, relu=False, normalize="max"
            )
        result: Array = maps.cpu().numpy()
        return result

    def get_config(self) -> dict[str, Any]:
        """Return no settings: there are none."""
        return {}


def _by_255(image: Array) -> Tensor:
    matrix = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, 2)
    return torch.from_numpy(np.ascontiguousarray(matrix)).permute(2, 0, 1).float() / 255
