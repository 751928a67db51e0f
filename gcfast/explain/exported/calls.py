"""The calls of an explainer that write it down, for compilers and for other runtimes."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Unpack

import torch
from torch import Tensor

from gcfast.explain.base import ExplainerBase
from gcfast.explain.exported.aoti import export_aoti
from gcfast.explain.exported.module import ExportedExplainer
from gcfast.explain.exported.onnx import export_onnx
from gcfast.explain.result import MapOptions
from gcfast.search.transfer import ExactTransfer


class ExportCalls(ExplainerBase):
    """Export as a module, as an ONNX graph, as a compiled package."""

    def export(self, *, details: bool = False, **options: Unpack[MapOptions]) -> ExportedExplainer:
        """Return the explainer as one module without hooks, for torch.compile and torch.export.

        It maps images [B, 3, h, w] to what :meth:`explain_batch` maps them to, in one graph
        (``fullgraph=True``). Its parameters are the model's own; the database's tables are buffers.
        If a pass was made before (``build``, ``explain_batch``), what it showed is used:
        channels-last input where the model takes it, and no copy of the activations where no later
        layer writes over them.

        Args:
            details: give (maps, embeddings, neighbors, distances, labels) instead of the maps.
            **options: as for :meth:`explain_batch`, and fixed from now on.

        Raises:
            NoDatabaseError: there is no database yet.
            UnsupportedModelError: a model that cannot be copied.
            TypeError, ValueError: an argument of the wrong kind or out of range; an ``index`` that
                is not exact, since FAISS cannot be part of a graph; with ``refine``, no map made
                before.
        """
        finish = self._finish(torch.empty(0, 3, 1, 1), options)
        if not self._exact:
            raise ValueError(f"`index` must be 'exact' to be exported, got {self.index!r}")
        if self.requery:
            raise ValueError("`requery` must be False to be exported, got True")
        if self.settings.is_elementwise:
            raise ValueError(
                "`method` must not be 'elementwise' to be exported: its maps need a backward pass, "
                "which an exported graph has not"
            )
        attached = self.attach(finish)
        transfer = attached.transfer
        assert isinstance(transfer, ExactTransfer)
        if transfer.on_demand is not None:
            raise ValueError(
                "`rows` of the database must be 'all' to be exported, got 'on-demand': save it, "
                "which makes all, and open it"
            )
        finer = self.network.finer
        if finer is None or any(network.clone is None for network in finer):
            raise ValueError(
                "`refine` must be known from a pass before it is exported, which layers and how: "
                "call explain_batch on an image first"
            )
        return ExportedExplainer(
            self.network,
            transfer,
            finish._replace(size=(0, 0)) if options.get("size") is None else finish,
            proxies=attached.proxies,
            l2_normalize=self.settings.l2_normalize,
            details=details,
        )

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        images: Tensor | None = None,
        tables: str = "inside",
        dynamic: Collection[str] = ("batch",),
        details: bool = False,
        **options: Unpack[MapOptions],
    ) -> None:
        """Write forward pass, search and maps as one ONNX graph, for runtimes without Python.

        Its input is ``images`` [B, 3, h, w], its output ``maps`` [B, OH, OW] float32; with
        ``details`` also ``embeddings``, ``neighbors``, ``distances`` and ``labels``, as
        :meth:`export` gives them. The search takes B (N + K) float64 of memory.

        Args:
            path: the file, replaced if it is there.
            images: [B, 3, h, w] of the size that the graph is for; None takes one image of the size
                that the first pass had. Only shape, dtype and device are looked at.
            tables: where the database goes: "inside" the file; "external", with all weights, in
                PATH.data next to it, as more than 2 GB have to be; "inputs" of the graph, which
                then explains from any database of the model, of any number of rows:
                :func:`gcfast.explain.exported.onnx.table_inputs` gives the arrays.
            dynamic: which of "batch", "height" and "width" may be others than in ``images``. With
                one of the sides, maps of a few other sizes are compared with those of the model,
                and a warning says where they differ.
            details: as for :meth:`export`.
            **options: as for :meth:`explain_batch`, and fixed from now on.

        Raises:
            MissingExtraError: onnx or onnxscript is not installed.
            NoDatabaseError, TypeError, ValueError: as :meth:`export`; no ``images`` before the
                first pass; more than 2 GB for one file.
            UnsupportedModelError: a model that cannot be copied, or not be exported with
                ``dynamic``, or at all; a graph that is wrong for each of those other sizes.
        """
        module = self.export(details=details, **options)
        assert self._database is not None
        export_onnx(
            module,
            path,
            self._example(images),
            tables=tables,
            dynamic=dynamic,
            manifest=self._database.manifest,
        )

    def export_aoti(
        self,
        path: str | os.PathLike[str],
        *,
        images: Tensor | None = None,
        dynamic: Collection[str] = ("batch",),
        details: bool = False,
        **options: Unpack[MapOptions],
    ) -> None:
        """Compile forward pass, search and maps ahead of time with AOTInductor, for C++ or Python.

        ``torch._inductor.aoti_load_package(path)`` loads it, as does PyTorch's C++ class
        ``AOTIModelPackageLoader``; gcfast need not be there. It is for the device that the model is
        on. A C++ compiler is needed now, and compiling takes a minute or more.

        Args:
            path: the package, with the ending .pt2; replaced if it is there.
            images: as for :meth:`export_onnx`.
            dynamic: as for :meth:`export_onnx`.
            details: as for :meth:`export`.
            **options: as for :meth:`explain_batch`, and fixed from now on.

        Raises:
            NoDatabaseError, TypeError, ValueError, UnsupportedModelError: as :meth:`export_onnx`;
                no C++ compiler.
        """
        module = self.export(details=details, **options)
        export_aoti(module, path, self._example(images), dynamic=dynamic)

    def _example(self, images: Tensor | None) -> Tensor:
        if images is not None:
            return self.network.checked("images", images)
        shape = self.network.image_shape
        if shape is None:
            raise ValueError(
                "`images` must be given before the first pass, which would say how large they are"
            )
        device = self.network.device(torch.device("cpu"))
        example = torch.zeros((1, *shape), device=device)
        return example.to(self.network.dtype_for(example))
