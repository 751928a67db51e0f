"""Pictures out of a request, within the limits."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import AsyncGenerator, Iterable
from typing import TypeVar

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from gcfast.images.decode import Limits
from gcfast.images.preprocessing import Preprocessing, View

T = TypeVar("T")

_AROUND = 64 * 1024  # bytes of a request that are not a picture: boundaries, JSON's keys


async def pictures(request: Request, names: Iterable[str], max_bytes: int) -> dict[str, bytes]:
    """Read the pictures of a request that is multipart/form-data, or JSON in base64.

    Args:
        request: not read yet.
        names: of the pictures; others are refused, the first is required.
        max_bytes: of all pictures together.

    Returns:
        The bytes of the picture files that came, by name.

    Raises:
        HTTPException: 413 too many bytes, 415 another type of content, 400 what is not well formed
            or lacks a picture.
    """
    names = list(names)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _of_form(
            await _body(request, max_bytes + _AROUND, max_bytes), request.headers
        )
    elif kind == "application/json":
        found = _of_json(await _body(request, max_bytes * 4 // 3 + _AROUND, max_bytes))
    else:
        raise HTTPException(
            415, "send pictures as multipart/form-data, or as base64 in application/json"
        )
    other = sorted(found.keys() - names)
    if other or names[0] not in found:
        got = ", ".join(other or sorted(found)) or "nothing"
        raise HTTPException(400, f"the request must have {' and perhaps '.join(names)}, got {got}")
    if sum(map(len, found.values())) > max_bytes:
        raise _too_large(max_bytes)
    return found


def decoded(data: bytes, preprocessing: Preprocessing, limits: Limits) -> View:
    """Decode a picture for the network.

    Raises:
        HTTPException: 413 too many pixels, 415 no picture of a known format, 422 a damaged one.
    """
    try:
        return preprocessing.load(io.BytesIO(data), limits=limits)
    except Image.DecompressionBombError:
        raise HTTPException(413, f"a picture must have at most {limits.pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise HTTPException(
            415, f"not a picture of a known format: {', '.join(limits.formats)}"
        ) from None
    except Exception:  # whatever Pillow's readers raise, in words that may name files
        raise HTTPException(422, "the picture is damaged: it cannot be decoded") from None


async def _body(request: Request, most: int, max_bytes: int) -> bytes:
    """Read the body as it comes, and stop with 413 where it is larger than ``most``."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > most:
        raise _too_large(max_bytes)
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > most:
            raise _too_large(max_bytes)
    return bytes(read)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"a request must have at most {max_bytes:,} bytes of pictures")


async def _of_form(body: bytes, headers: Headers) -> dict[str, bytes]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, whole(), max_files=2, max_fields=0, max_part_size=_AROUND)
    parser.spool_max_size = len(body)  # it is in memory already: no temporary file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    found = []
    for name, value in form.multi_items():
        assert isinstance(value, UploadFile)  # there are no fields
        found.append((name, await value.read()))
    await form.close()
    return _once(found)


def _of_json(body: bytes) -> dict[str, bytes]:
    try:
        given = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise HTTPException(400, "the JSON must be an object of pictures in base64")
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in given.items()}
    except (binascii.Error, ValueError):
        raise HTTPException(400, "a picture in JSON must be base64") from None


def _once(pairs: list[tuple[str, T]]) -> dict[str, T]:
    """Return pairs as a dictionary; raises HTTPException where a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HTTPException(400, "each picture must have a name of its own")
    return found
