"""An explainer as one module without hooks, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gcfast.explain.maps import Steps, explained, on_images
from gcfast.explain.result import Finish
from gcfast.method.head import normalized
from gcfast.method.proxies import Proxies
from gcfast.model.network import Network
from gcfast.model.recording import Kept, recording_copy
from gcfast.search.transfer import ExactTransfer
from gcfast.search.transferred import Tables, from_tables

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class ExportedExplainer(nn.Module):
    """Forward pass, search and heat maps in one graph; made by :meth:`gcfast.Explainer.export`.

    The model in it shares its parameters and buffers with the user's, and is a copy otherwise, in
    evaluation mode. The database's tables are buffers. Searches are exact.

    One thread at a time may run it outside torch.compile: the layer's output passes through it.
    """

    def __init__(
        self,
        network: Network,
        transfer: ExactTransfer,
        finish: Finish,
        *,
        proxies: Proxies | None,
        l2_normalize: bool,
        details: bool,
    ) -> None:
        super().__init__()
        layers = (network, *(network.finer or ()))
        self._kept = tuple(Kept() for _ in layers)
        self.model = recording_copy(layers, self._kept)
        self.model.eval()
        tables = {
            "table": transfer.search.table,
            "squares": transfer.search.squares,
            "channels": transfer.tables.channels,
            "weights": transfer.tables.weights,
            "offsets": transfer.tables.offsets,
            "row_labels": transfer.tables.labels,  # `labels` is an output of graphs
        }
        if transfer.k > 1:
            tau = torch.tensor(transfer.temperature, device=transfer.search.table.device)
            tables["temperature"] = tau
        if proxies is not None:
            tables |= {"proxy_vectors": proxies.vectors, "proxy_rows": proxies.rows}
        for name, tensor in tables.items():
            self.register_buffer(name, tensor)
        self.tables = tuple(tables)  # the names of the buffers that are the database's
        # The parts of a Network that work on what a pass gave, without its hooks.
        self._share: Callable[[Tensor, tuple[int, int]], tuple[float, float]] = network.share
        self._layers = tuple((n.layer_run, n.check_runs, n.arranged) for n in layers)
        self._embedding: Callable[[Any, int], Tensor] = network.embedding
        # What no pass has shown is not assumed.
        self._channels_last = network.channels_last and network.clone is not None
        # Whether maps have the scale of the rows; those that are refined have none.
        self.unscaled = finish.normalize is None and not network.finer
        self._finish = finish  # of size (0, 0) where it is the images' own
        self.k = transfer.k
        self._l2_normalize = l2_normalize
        self.details = details

    def train(self, mode: bool = True) -> ExportedExplainer:
        """Stay in evaluation mode, in which the network is explained."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor | Parts:
        """Heat maps of images [B, 3, h, w].

        Returns:
            Maps [B, OH, OW] float32; with ``details`` the tuple (maps, embeddings [B, D], neighbors
            [B, K], distances [B, K], labels [B, K]), as in :class:`gcfast.Explanation`. An image
            whose embedding is not finite gets a map of NaN.
        """
        return self.explain(images, {name: getattr(self, name) for name in self.tables})

    def explain(self, images: Tensor, tables: dict[str, Tensor]) -> Tensor | Parts:
        """:meth:`forward` with these tables, by the names of the buffers that they stand for."""
        finish = self._finish
        if finish.size == (0, 0):
            finish = finish._replace(size=(images.shape[2], images.shape[3]))
        with torch.no_grad():
            if self._channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            output = self._embedding(self.model(images), images.shape[0])
            image_size = (images.shape[2], images.shape[3])
            activations, *finer = self._outputs(image_size)
            share = self._share(activations, image_size)
            embeddings = normalized(output, self._l2_normalize)
            distances, neighbors = torch.ops.gcfast.knn(
                embeddings, tables["table"], self.k, squares=tables["squares"]
            )
            names = ("channels", "weights", "offsets", "row_labels")
            lent = Tables(*(tables[name] for name in names))
            steps = Steps(torch.ops.gcfast.refine, torch.ops.gcfast.dense_cam)
            proxies, cam = None, cast("Callable[..., Tensor]", torch.ops.gcfast.sparse_cam)
            if "proxy_rows" in tables:
                # Rows are looked up, and no labels.
                none = lent.labels[:0]
                proxies = Proxies(none, tables["proxy_vectors"], tables["proxy_rows"])
                cam = steps.dense_cam
            out = explained(
                activations,
                embeddings,
                from_tables(distances, neighbors, lent, tables.get("temperature")),
                finish,
                cam=on_images(cam, share, tuple(finer), steps),
                marks=True,
                proxies=proxies,
            )
            if not self.details:
                return out.maps
            labels = out.labels_from(lent.labels)
            return out.maps, out.embeddings, out.neighbors, out.distances, labels

    def _outputs(self, image_size: tuple[int, int]) -> list[Tensor]:
        """The activations, then the finer outputs, [B, C, H, W] each."""
        outputs = []
        for kept, (run, check_runs, arranged) in zip(self._kept, self._layers, strict=True):
            taken = kept.taken()
            check_runs(len(taken))
            outputs.append(arranged(taken[run - 1], image_size))
        return outputs
