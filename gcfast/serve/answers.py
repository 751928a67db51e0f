"""Answers as JSON, as a PNG overlay or as an array, whichever a request asks for."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
from fastapi import HTTPException, Request, Response
from numpy.typing import NDArray
from PIL import Image

from gcfast.images.overlay import overlay
from gcfast.images.preprocessing import View
from gcfast.serve.schema import Explained, Pair, Place, Row
from gcfast.serve.served import Answer, Neighbor, PairAnswer, Served

Format = Literal["json", "png", "npy"]
Include = Literal["overlay", "map", "picture", "neighbor"]
PairInclude = Literal["overlay", "map", "picture"]

TYPES: dict[Format, str] = {
    "json": "application/json",
    "png": "image/png",
    "npy": "application/x-npy",
}

# Of the heat's colors and of the picture below, as `gcfast explain` has them by default.
_ALPHA, _DIM = 0.8, 0.5


def wanted(request: Request, named: Format | None) -> Format:
    """Return the format that a request asks for: its parameter, or the best of its Accept.

    Raises:
        HTTPException: 406, it accepts none of them.
    """
    if named is not None:
        return named
    best: tuple[float, Format | None] = (0.0, None)
    for part in request.headers.get("accept", "*/*").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = max([1.0, *map(_quality, parameters)][-1], 0.0)
        match = next((name for name, type_ in TYPES.items() if _matches(kind, type_)), None)
        if match is not None and quality > best[0]:
            best = quality, match
    if best[1] is None:
        raise HTTPException(406, f"the answer is one of {', '.join(TYPES.values())}")
    return best[1]


def _quality(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:  # a parameter of the type
        return 1.0


def _matches(kind: str, type_: str) -> bool:
    return kind in ("*/*", type_, type_.split("/")[0] + "/*")


def explained(
    served: Served, view: View, answer: Answer, kind: Format, include: Collection[Include]
) -> Response:
    """Encode the explanation of a picture."""
    if kind == "npy":
        return _response(kind, _npy(answer.heat))
    seen = served.drawable(view.values)
    if kind == "png":
        return _response(kind, _png(_laid_over(seen, answer.heat)))
    near, place = None, served.place(view.size, answer.heat)
    if "neighbor" in include and answer.neighbors:
        near = served.picture_of(answer.neighbors[0].row)
    body = Explained(
        neighbors=[Row(**neighbor._asdict()) for neighbor in answer.neighbors],
        flat=answer.flat,
        confidence=answer.confidence,
        fidelity=answer.fidelity,
        map_size=answer.heat.shape,
        place=None if place is None else Place(**place),
        database=served.version,
        overlay=_text(_png(_laid_over(seen, answer.heat))) if "overlay" in include else None,
        map=_text(_npy(answer.heat)) if "map" in include else None,
        picture=_text(_png(seen)) if "picture" in include else None,
        neighbor=None if near is None else _text(_png(served.drawable(near))),
    )
    return _response(kind, body.model_dump_json().encode())


def paired(
    served: Served,
    views: tuple[NDArray[Any], NDArray[Any]],
    answer: PairAnswer,
    nearest: Neighbor | None,
    kind: Format,
    include: Collection[PairInclude],
) -> Response:
    """Encode the explanation of two pictures."""
    if kind == "npy":
        return _response(kind, _npy(np.stack(answer.heats)))
    seen = [served.drawable(view) for view in views]
    overlays = [_laid_over(*one) for one in zip(seen, answer.heats, strict=True)]
    if kind == "png":
        return _response(kind, _png(np.hstack(overlays)))
    shown: dict[str, str] = {}
    for name, given in (("overlay", overlays), ("picture", seen)):
        if name in include:
            shown[name], shown[f"other_{name}"] = (_text(_png(one)) for one in given)
    if "map" in include:
        shown["map"] = _text(_npy(np.stack(answer.heats)))
    body = Pair(
        similarity=answer.similarity,
        rest=answer.rests[0],
        other_rest=answer.rests[1],
        nearest=None if nearest is None else Row(**nearest._asdict()),
        map_size=answer.heats[0].shape,
        database=served.version,
        **shown,
    )
    return _response(kind, body.model_dump_json().encode())


def _response(kind: Format, content: bytes) -> Response:
    return Response(content, media_type=TYPES[kind])


def _laid_over(view: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    return overlay(view, heat, alpha=_ALPHA, dim=_DIM)


def _png(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
