"""``gcfast explain --text``: what of pictures speaks for a text, by a model of images and texts."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gcfast._progress import Progress
from gcfast.cli.direct.drawn import laid_back, panel, safe_name
from gcfast.cli.direct.opening import Opening, open_explainer
from gcfast.cli.inputs import list_files, reading
from gcfast.cli.outputs import MapWriter, check_folder, tell_doubts, tell_left_out
from gcfast.images.folder import ImageLoader
from gcfast.images.html import ReportRow, write_report

# What the command writes into its folder.
_OUTPUTS = ("maps.npy", "results.csv", "index.html", "overlays")
# Texts that say nothing of a picture. Without their mean a map shows what every text has.
_NEUTRAL = ("a photo", "a picture of something", "an image of a thing", "a photo of an object")
_COLUMNS = ("map", "path", "cosine", "flat", "overlay", "error")


def explain_towards(options: argparse.Namespace) -> None:
    """Explain pictures towards the text of the options, and write overlays, arrays and a page.

    Raises:
        FileNotFoundError, FileExistsError: as :func:`gcfast.cli.explain.explain_files`.
        ValueError: a model without a text tower; as :func:`open_explainer`.
        GcfastError: the model or the database cannot be used.
    """
    for name, default in (
        ("k", 1),
        ("index", "exact"),
        ("requery", False),
        ("images", None),
        ("ray", False),
    ):
        if getattr(options, name) != default:
            raise ValueError(
                f"`{name}` must be left out with --text: it is for maps from a database"
            )
    if options.center and options.database is None:
        raise ValueError(f"`center` must be 0 without --database, got {options.center}")
    if not options.text.strip():
        raise ValueError("`--text` must say something, got an empty text")
    neutral = list(_NEUTRAL) if options.neutral is None else options.neutral
    files = list_files(options.paths)
    check_folder(options.out, options.force, _OUTPUTS)
    ready = open_explainer(options, texts=True)
    text, towards = _embedded(options.text, neutral, ready, options.model)
    loader = ImageLoader(files, files, preprocessing=ready.preprocessing, **reading(options))
    (options.out / "overlays").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    with (
        MapWriter(options.out / "maps.npy") as maps,
        Progress("explaining", "pictures", total=len(files), show=True) as shown,
    ):
        for images, _, names in loader:
            images = images.to(ready.device)
            heat = ready.explainer.explain_toward(images, towards, center=options.center)
            embeddings = F.normalize(ready.explainer.network.embed(images).output.float(), dim=1)
            cosines, flat = embeddings @ text, ~heat.flatten(1).any(1)
            maps.write(heat.cpu().numpy())
            views = ready.preprocessing.pictures(images)
            for i, name in enumerate(names):
                values = heat[i].cpu().numpy()
                whole, _ = laid_back(ready.preprocessing, name, views[i], values, options)
                overlay = f"overlays/{len(rows):06d}-{safe_name(name)}.png"
                whole.save(options.out / overlay, compress_level=3)
                row = (len(rows), name, f"{float(cosines[i]):.6f}", int(flat[i]), overlay)
                rows.append(dict(zip(_COLUMNS, map(str, row), strict=False)))
            shown.update(len(names))
    left_out = [{"path": name, "error": reason} for name, reason in loader.unreadable]
    with open(
        options.out / "results.csv", "w", encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        table.writerows([*rows, *left_out])
    write_report(
        options.out / "index.html",
        title=options.text,
        lead="Heat is on what brings each picture closer to the text above. What all texts share "
        f"is taken out: {_said(neutral)} (--neutral). Pictures are in the order of their "
        "cosine with the text.",
        rows=_page_rows(rows, options),
        facts=[
            ("pictures explained", f"{len(rows):,}"),
            ("unreadable pictures", str(len(left_out))),
        ],
    )
    tell_left_out("unreadable pictures, skipped", loader.unreadable)
    tell_doubts(loader.doubts)
    print(f"{options.out / 'index.html'}: {len(rows)} pictures")


def _said(neutral: Sequence[str]) -> str:
    return "the mean of " + ", ".join(f'"{text}"' for text in neutral) if neutral else "nothing"


def _embedded(
    text: str, neutral: Sequence[str], ready: Opening, model: str
) -> tuple[Tensor, Tensor]:
    """Return the text's unit embedding [D], and that less the mean of the neutral texts'."""
    if ready.loaded.texts is None:
        raise ValueError(
            "`--model` must have a text tower with --text, such as "
            f"hf/openai/clip-vit-base-patch32, got {model}"
        )
    with torch.no_grad():
        found = F.normalize(ready.loaded.texts([text, *neutral]).float(), dim=1).to(ready.device)
    return found[0], found[0] - found[1:].mean(0) if neutral else found[0]


def _page_rows(rows: list[dict[str, str]], options: argparse.Namespace) -> Iterator[ReportRow]:
    """Yield the page's rows, the closest picture first."""
    best = sorted(rows, key=lambda row: -float(row["cosine"]))
    for row in best[: options.page_rows]:
        with Image.open(row["path"]) as picture, Image.open(options.out / row["overlay"]) as heat:
            what = "flat: nothing to show" if row["flat"] == "1" else "heat"
            panels = [panel(picture, "the picture"), panel(heat, what)]
        yield ReportRow(row["path"], panels, f"cosine {float(row['cosine']):.3f}")
