"""The command ``gcfast export``: a network and its database as one graph, in a file."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch

from gcfast._checks import require_int
from gcfast.cli.inputs import open_database

SUFFIXES = (".onnx", ".pt2")


def export_database(options: argparse.Namespace) -> None:
    """Write the file that the options name, and tell what it takes.

    Raises:
        FileExistsError: it is there, or what goes beside it, and ``--force`` is not given.
        FileNotFoundError: its folder is not there.
        ValueError: another ending; tables outside a package of AOTInductor's; the database does not
            say how its pictures were prepared.
        GcfastError: the model or the database cannot be used, or not be exported; the extra is not
            installed.
    """
    kind = options.out.suffix
    if kind not in SUFFIXES:
        raise ValueError(f"`--out` must end with {' or '.join(SUFFIXES)}, got {options.out}")
    if kind == ".pt2" and options.tables != "inside":
        raise ValueError(f"`--tables` must be inside for a .pt2, got {options.tables}")
    require_int("batch_size", options.batch_size, 1)
    files = [options.out]
    if options.tables == "external":
        files.append(options.out.with_name(f"{options.out.name}.data"))
    for file in files:
        if file.exists() and not options.force:
            raise FileExistsError(f"`--out` must be new, {file} exists; --force replaces it")
    if not options.out.parent.is_dir():  # told before what takes minutes
        raise FileNotFoundError(f"`--out` must lie in a folder that is there, got {options.out}")
    opened = open_database(options, k=options.k, refine=options.refine)
    explainer = opened.explainer
    # Noise, in which no two places are alike, of the size that the pictures have. A pass tells what
    # the graph needs to know: what refines the maps, and which memory format the network takes.
    shape = (options.batch_size, 3, *opened.preprocessing.shape)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(opened.device)
    images = images.to(explainer.network.dtype_for(images))
    explainer.explain_batch(images)
    dynamic = ("batch",) if options.dynamic is None else tuple(options.dynamic)
    settings: dict[str, Any] = {
        "images": images,
        "dynamic": dynamic,
        "details": options.details,
        "center": options.center,
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if kind == ".onnx":
            explainer.export_onnx(options.out, tables=options.tables, **settings)
        else:
            explainer.export_aoti(options.out, **settings)
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"pictures have to be prepared so: {opened.preprocessing}", file=sys.stderr)
    names = zip(("batch", None, "height", "width"), shape, strict=True)
    sides = ", ".join(str(name if name in dynamic else size) for name, size in names)
    print(f"{options.out}: images [{sides}], {options.out.stat().st_size:,} bytes")
