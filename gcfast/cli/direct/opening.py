"""An explainer from the command line, with a database or without one."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, NamedTuple

import torch

import gcfast
from gcfast.cli.inputs import load_network, open_on, stated_preprocessing
from gcfast.cli.sources import LoadedModel
from gcfast.database.database import Database
from gcfast.images.preprocessing import Preprocessing

VIEW = tuple(field.name for field in fields(Preprocessing))  # the options of preprocessing


class Opening(NamedTuple):
    """An explainer and how its pictures are prepared."""

    explainer: gcfast.Explainer
    database: Database | None
    device: torch.device
    preprocessing: Preprocessing
    loaded: LoadedModel


def open_explainer(options: argparse.Namespace, *, texts: bool = False) -> Opening:
    """Open ``--database`` with ``--model``, or the model alone.

    Args:
        options: of a command that has both, ``--layer``, ``--tokens`` and ``--refine``, and the
            options of preprocessing.
        texts: keep the model's text tower.

    Raises:
        ValueError: an option that the database has decided; as :func:`open_on`.
        GcfastError: the model or the database cannot be used.
    """
    given = load_network(options, texts=texts)
    loaded, device, output_key = given
    if options.database is not None:
        for name in ("layer", "tokens", *VIEW):
            if getattr(options, name) is not None:
                raise ValueError(f"`{name}` must be left out with --database, which has its own")
        opened = open_on(given, options, refine=options.refine)
        return Opening(opened.explainer, opened.database, device, opened.preprocessing, loaded)
    settings: dict[str, Any] = {}
    if options.tokens is not None:
        settings["reshape"] = gcfast.TokenGrid(prefix=options.tokens)
    explainer = gcfast.Explainer(
        loaded.module,
        options.layer,
        method="elementwise",  # each place by its own gradient: for tokens far better than means
        output_key=output_key,
        refine=options.refine,
        **settings,
    )
    preprocessing = stated_preprocessing(options, loaded.preprocessing)
    return Opening(explainer, None, device, preprocessing, loaded)
