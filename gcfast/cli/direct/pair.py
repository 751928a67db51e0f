"""The command ``gcfast pair``: what makes two pictures close, on either one."""

from __future__ import annotations

import argparse

import numpy as np
from torch import Tensor

from gcfast.cli.direct.alike import Alike, usual_embedding
from gcfast.cli.direct.drawn import Seen, seen
from gcfast.cli.direct.opening import Opening, open_explainer
from gcfast.cli.outputs import check_folder
from gcfast.images.html import Panel, ReportRow, write_report
from gcfast.images.named import told

# What the command writes into its folder.
_OUTPUTS = ("query.png", "match.png", "pair.npz", "index.html")


def explain_files(options: argparse.Namespace) -> None:
    """Explain a pair of picture files, and write overlays, arrays and a page.

    Raises:
        FileExistsError: the output folder is not empty and ``--force`` is not given.
        ValueError: a file is no picture that can be read; ``--unlike mean`` without a database.
        GcfastError: the model or the database cannot be used.
    """
    for name in ("alpha", "dim"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ValueError(f"`--{name}` must be in [0, 1], got {value}")
    check_folder(options.out, options.force, _OUTPUTS)
    ready = open_explainer(options)
    one, two = (_picture(str(path), ready) for path in (options.query, options.match))
    against = options.unlike or ("none" if ready.database is None else "mean")
    pair = Alike.of(ready, one, two, unlike=_unlike(against, ready), linked=not options.no_places)
    options.out.mkdir(parents=True, exist_ok=True)
    for picture, name in zip(pair.overlays(ready.preprocessing, options), _OUTPUTS, strict=False):
        picture.save(options.out / name)
    arrays = {
        name: values[0].cpu().numpy()
        for name, values in pair.why._asdict().items()
        if values is not None
    }
    np.savez_compressed(options.out / "pair.npz", **arrays)
    write_report(
        options.out / "index.html",
        title=f"{one.path} and {two.path}",
        lead=_lead(against),
        rows=[_row(pair, ready, options)],
        facts=_facts(pair, against),
    )
    print(f"{options.out / 'index.html'}: cosine {float(pair.why.similarity):.4f}")


def _picture(path: str, ready: Opening) -> Seen:
    try:
        return seen(path, ready.preprocessing)
    except Exception as error:  # whatever Pillow raises, or a transform
        raise ValueError(f"cannot read {path}: {told(error)}") from error


def _unlike(against: str, ready: Opening) -> Tensor | None:
    """Return what to tell the pair from."""
    if against == "none":
        return None
    if against != "mean":
        return _picture(against, ready).images.to(ready.device)
    if ready.database is None:
        raise ValueError('`--unlike` must be a picture or "none" without --database, got "mean"')
    return usual_embedding(ready.database, ready.device)


def _lead(against: str) -> str:
    less = {
        "none": "",
        "mean": ", less what it has in common with the database's pictures on average (--unlike)",
    }.get(against, f", less its share of the cosine with {against} (--unlike)")
    return (
        "The cosine of the two pictures' embeddings is a sum over the places of either one. Heat "
        f"is on places by their share of it{less}. What belongs to no place is left out."
    )


def _facts(pair: Alike, against: str) -> list[tuple[str, str]]:
    why = pair.why
    what = "cosine" if against == "none" else "difference"
    facts = [("cosine", f"{float(why.similarity):z.4f}")]
    if against != "none":
        sums = (float(parts.sum()) for parts in (why.query_parts, why.match_parts))
        facts.append(("left of it for the query, the match", ", ".join(f"{v:z.4f}" for v in sums)))
    rest = ", ".join(f"{float(v):z.4f}" for v in (why.query_rest, why.match_rest))
    return [*facts, (f"of the {what}, belongs to no place: query, match", rest)]


def _row(pair: Alike, ready: Opening, options: argparse.Namespace) -> ReportRow:
    captions = ("alike, in the query", "alike, in the match")
    panels = [
        Panel(picture.view, name)
        for picture, name in zip(pair.pictures, ("the query", "the match"), strict=True)
    ]
    panels += pair.panels(ready.preprocessing, options, captions)
    linked = pair.linked((0, 1), ("the query", "the match"))
    return ReportRow("The pair", panels, linked=linked)
