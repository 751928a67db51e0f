"""An exported explainer as one graph of PyTorch's own operations, by ``torch.export``."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gcfast._checks import listed, require_choice
from gcfast.errors import UnsupportedModelError
from gcfast.explain.exported.decompositions import DECOMPOSITIONS
from gcfast.explain.exported.module import ExportedExplainer

AXES = {"batch": 0, "height": 2, "width": 3}  # of the images [B, 3, h, w]
# The first dimension of each table that is an input, and how large it is for tracing: PyTorch takes
# dimensions of one size for one dimension.
TABLE_AXES = {"proxy_rows": ("rows + 1", 65), "proxy_vectors": ("classes + 1", 67)}
ROWS = ("rows", 64)
SAME_MAPS = 0.02  # of the highest value: a model in half precision is within 5e-4


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
            plain: ExportedProgram = program.run_decompositions(DECOMPOSITIONS)
        except Exception as error:  # whatever PyTorch or the model raises
            raise _refused(dynamic, first_line(error)) from error
    (taken,) = (n for n in plain.graph.nodes if n.name == plain.graph_signature.user_inputs[0])
    require_free(taken.meta["val"].shape, dynamic)
    return plain


def require_free(shape: Sequence[Any], dynamic: Collection[str]) -> None:
    """Refuse images [B, 3, h, w] of a graph that has settled on a number that may be any.

    PyTorch does so without a word where what the model does follows from the number.

    Raises:
        UnsupportedModelError: it has.
    """
    for name in dynamic:
        size = str(shape[AXES[name]])  # a symbol may stand for a number
        if size.isdecimal():
            raise _refused(dynamic, f"its {name} is then always {size}")


def check_sizes(
    run: Callable[[Tensor], Tensor],
    module: ExportedExplainer,
    images: Tensor,
    dynamic: Collection[str],
) -> None:
    """Compare a graph with its module on noise of other sizes, where height or width may be any.

    What a model, or PyTorch's own decompositions, decide by the size of the example (a margin, how
    a pool is cut up) is fixed in the graph, which then gives other maps for other sizes. A size
    that the model itself refuses is passed over.

    Args:
        run: the graph: from images to maps.
        module: what it was made of.
        images: [B, 3, h, w], the example.
        dynamic: as for :func:`decomposed`.

    Raises:
        UnsupportedModelError: the graph is right for no other size that was tried.
    """
    sides = [name for name in ("height", "width") if name in dynamic]
    if not sides or _wrong(run, module, images, images.shape) is None:
        return
    right: list[str] = []
    wrong: list[str] = []
    for share in (0, 0.5, 1):
        shape = list(images.shape)
        for name in sides:
            size = shape[AXES[name]]
            shape[AXES[name]] = size + max(1, round(share * size))
        is_wrong = _wrong(run, module, images, shape)
        if is_wrong is not None:
            (wrong if is_wrong else right).append(f"{shape[2]} x {shape[3]}")
    if wrong and not right:
        raise _refused(dynamic, f"the graph gives other maps for images of {listed(wrong)}")
    if wrong:
        warnings.warn(
            f"the graph gives the maps of explain_batch for images of {listed(right)}, and others "
            f"for {listed(wrong)}: what the model does depends on the size, and a graph does one "
            "thing for all",
            stacklevel=4,
        )


def _wrong(
    run: Callable[[Tensor], Tensor],
    module: ExportedExplainer,
    images: Tensor,
    shape: Sequence[int],
) -> bool | None:
    """Whether a graph gives other maps of noise than its module; None where either cannot say."""
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(images)
    try:
        wanted = module(noise)
    except Exception:  # whatever the model raises for a size that it does not take
        return None
    if not isinstance(wanted, Tensor):
        wanted = wanted[0]
    try:
        maps = run(noise)
    except Exception:  # whatever the runtime raises: of the example's own size it cannot run it
        return None if tuple(shape) == tuple(images.shape) else True
    if maps.shape != wanted.shape:
        return True
    off = (maps.to(wanted) - wanted).abs().amax((1, 2)) / wanted.abs().amax().clamp(min=1e-12)
    # Of most images: rounding may find another row for one.
    return not float(off.median()) <= SAME_MAPS


def _refused(dynamic: Collection[str], why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model cannot be exported with dynamic={tuple(dynamic)!r}, which fewer names may "
        f"help: {why}"
    )


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


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)
