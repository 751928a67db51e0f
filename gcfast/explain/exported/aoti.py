"""An explainer compiled ahead of time by AOTInductor, for C++ or Python without gcfast."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from gcfast.errors import UnsupportedModelError
from gcfast.explain.exported.module import ExportedExplainer
from gcfast.explain.exported.program import check_sizes, decomposed, first_line, quiet, staged

SUFFIX = ".pt2"


def export_aoti(
    module: ExportedExplainer,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    dynamic: Collection[str],
) -> None:
    """See :meth:`gcfast.Explainer.export_aoti`."""
    path = os.fspath(path)
    if not path.endswith(SUFFIX):
        raise ValueError(f"`path` must end with {SUFFIX}, as PyTorch asks for, got {path}")
    program = decomposed(module, images, dynamic)
    with quiet(), staged(Path(path)) as made:
        from torch._inductor import aoti_compile_and_package, aoti_load_package

        try:
            aoti_compile_and_package(program, package_path=os.fspath(made))
        except RuntimeError as error:  # PyTorch's compiler, or that it finds none of C++
            raise UnsupportedModelError(
                f"the model cannot be compiled ahead of time: {first_line(error)}"
            ) from error

        def run(images: Tensor) -> Tensor:
            out = aoti_load_package(os.fspath(made))(images)
            return out if isinstance(out, Tensor) else out[0]

        check_sizes(run, module, images, dynamic)
