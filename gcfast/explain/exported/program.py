"""An exported explainer as one graph of PyTorch's own operations, by ``torch.export``."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gcfast._checks import require_choice
from gcfast.errors import UnsupportedModelError
from gcfast.explain.exported.decompositions import DECOMPOSITIONS
from gcfast.explain.exported.module import ExportedExplainer

AXES = {"batch": 0, "height": 2, "width": 3}  # of the images [B, 3, h, w]
# The first dimension of each table that is an input, and how large it is for tracing: PyTorch takes
# dimensions of one size for one dimension.
TABLE_AXES = {"proxy_rows": ("rows + 1", 65), "proxy_vectors": ("classes + 1", 67)}
ROWS = ("rows", 64)


class WithTables(nn.Module):
    """An exported explainer whose tables are arguments."""

    def __init__(self, module: ExportedExplainer) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, tables: dict[str, Tensor]) -> Any:
        """See :meth:`ExportedExplainer.explain`."""
        return self.module.explain(images, tables)


def decomposed(
    module: ExportedExplainer,
    images: Tensor,
    dynamic: Collection[str],
    tables: dict[str, Tensor] | None = None,
) -> ExportedProgram:
    """Trace the module for images, and write its operations in PyTorch's own.

    Args:
        module: what is traced.
        images: [B, 3, h, w]; only shape, dtype and device are looked at.
        dynamic: which of the images' dimensions may be others later: "batch", "height", "width".
        tables: those that are arguments of the graph, for any number of rows; None: none.

    Raises:
        TypeError, ValueError: ``dynamic`` names no dimension.
        UnsupportedModelError: the model cannot be traced, or not for any number there.
    """
    if isinstance(dynamic, str):
        raise TypeError(f"`dynamic` must be a tuple of names, got {dynamic!r}: ({dynamic!r},)")
    for name in dynamic:
        require_choice("dynamic", name, tuple(AXES))
    # Its own memory: what a program is saved with would bring all of a view's. A single image would
    # be taken for the only number that there is.
    count = max(2, images.shape[0]) if "batch" in dynamic else images.shape[0]
    example = torch.zeros((count, *images.shape[1:]), dtype=images.dtype, device=images.device)
    shapes: tuple[Any, ...] = ({AXES[name]: Dim.DYNAMIC for name in dynamic},)
    arguments: tuple[Any, ...] = (example,)
    traced: nn.Module = module
    if tables is not None:
        traced, arguments = WithTables(module), (example, _any_rows(tables))
        shapes += ({name: {0: Dim.DYNAMIC} if t.ndim else {} for name, t in tables.items()},)
    with quiet():
        try:
            program = torch.export.export(traced, arguments, dynamic_shapes=shapes)
        except Exception as error:  # whatever PyTorch or the model raises
            raise UnsupportedModelError(
                f"the model cannot be exported with dynamic={tuple(dynamic)!r}, which fewer names "
                f"may help: {_told(error)}"
            ) from error
        plain: ExportedProgram = program.run_decompositions(DECOMPOSITIONS)
        return plain


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what PyTorch says of its own calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a path to write to: only what is written whole takes the place of ``path``.

    It may have files beside it, whose names begin with its own and which replace theirs.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        *beside, graph = sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name)
        if beside:  # an old graph would be read with the new data
            path.unlink(missing_ok=True)
        for made in (*beside, graph):
            os.replace(made, path.with_name(made.name))


def _any_rows(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros like the tables, of another number of rows: that of the buffers would be fixed."""
    rows = {name: TABLE_AXES.get(name, ROWS)[1] for name in tables}
    return {
        name: t.new_zeros((rows[name], *t.shape[1:]) if t.ndim else ())
        for name, t in tables.items()
    }


def _told(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)
