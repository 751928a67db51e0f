"""The application: its routes, and what each answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import resources
from importlib.metadata import version
from typing import Annotated, Any

import jinja2
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gcfast.images.html import base_style
from gcfast.images.preprocessing import View
from gcfast.serve import answers
from gcfast.serve.answers import Format, Include, PairInclude
from gcfast.serve.metrics import CONTENT_TYPE_LATEST
from gcfast.serve.received import decoded, pictures
from gcfast.serve.record import Recorder
from gcfast.serve.schema import Explained, Pair, Refused
from gcfast.serve.served import Neighbor, Served
from gcfast.serve.service import Service
from gcfast.serve.settings import ServeSettings

_FORMAT = Query(description="instead of Accept")
_INCLUDE = Query(description="pictures and arrays to put into JSON, in base64")
_NO_PICTURE = "no picture of the nearest row is shown here"

# The page loads nothing from elsewhere, and runs no script but its own.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_REFUSALS = {
    400: "not well formed, without a picture, or addressed to a name that the server has not",
    406: "no format that the request accepts",
    408: "it came in too slowly",
    413: "too many bytes or pixels",
    415: "another type of content, or no picture of a known format",
    422: "a damaged picture, or a parameter that is not known",
    503: "too many requests wait; Retry-After says when to come again",
    504: "it took too long",
}


def create_app(source: Callable[[], Served], settings: ServeSettings | None = None) -> FastAPI:
    """Return the application, for any ASGI server; one process and one worker for each model.

    Args:
        source: opens the database on its network. It is called now, and again whenever the
            database has been exchanged.
        settings: limits and batches; None: the defaults.

    Returns:
        The application; ``app.state.service`` is its :class:`gcfast.serve.service.Service`, whose
        ``watcher.wake()`` reloads the database.

    Raises:
        Exception: whatever ``source`` raises.
    """
    settings = ServeSettings() if settings is None else settings
    service = Service(source, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.close)

    api = FastAPI(
        title="gcfast",
        summary="Heat maps that explain image embeddings.",
        version=version("gcfast"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere
        redoc_url=None,
    )
    api.state.service = service
    if settings.hosts:
        api.add_middleware(_Addressed, hosts=settings.hosts)
    api.add_middleware(Recorder, metrics=service.metrics)
    api.add_exception_handler(RequestValidationError, _unknown_value)
    _add_explain(api, service)
    _add_state(api, service)
    _add_pages(api)
    return api


class _Addressed:
    """Middleware: answer requests to these names alone, whatever address they came to.

    A page from elsewhere can have its own name lead to this machine, and its script would then read
    what the server answers (DNS rebinding).
    """

    _HEADER = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            called = Headers(scope=scope).get("host", "")
            header = self._HEADER.fullmatch(called)
            if header is None or not self._has(header[1].lower()):
                detail = (
                    "a request must be addressed to a name that the server has (--allow-host), "
                    f"got {called!r}"
                )
                await JSONResponse({"detail": detail}, 400)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _has(self, name: str) -> bool:
        return any(
            host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:]))
            for host in self.hosts
        )


@asynccontextmanager
async def _within(seconds: float, status: int, detail: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise HTTPException(status, detail) from None


async def _unknown_value(_: Request, error: Exception) -> JSONResponse:
    """Refuse a parameter's value in a sentence, as everything else is refused."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    must = first["msg"].replace("Input should be", "must be")
    return JSONResponse({"detail": f"`{first['loc'][1]}` {must}, got {first['input']!r}"}, 422)


def _takes(*names: str) -> dict[str, Any]:
    """Describe a request's body for OpenAPI: pictures of these names, the first one required."""

    def schema(picture: dict[str, str]) -> dict[str, Any]:
        properties = {name: {"type": "string", **picture} for name in names}
        return {"schema": {"type": "object", "properties": properties, "required": [names[0]]}}

    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": schema({"format": "binary"}),
                "application/json": schema({"contentEncoding": "base64"}),
            },
        }
    }


def _gives(model: type[Any], what: str) -> dict[int | str, dict[str, Any]]:
    """Describe the answers for OpenAPI."""
    others: dict[str, Any] = {answers.TYPES["png"]: {}, answers.TYPES["npy"]: {}}
    gives: dict[int | str, dict[str, Any]] = {
        status: {"model": Refused, "description": why} for status, why in _REFUSALS.items()
    }
    gives[200] = {"model": model, "description": what, "content": others}
    return gives


def _add_explain(api: FastAPI, service: Service) -> None:
    settings = service.settings

    async def read(request: Request, *names: str) -> dict[str, bytes]:
        async with _within(settings.timeout, 408, "the request came in too slowly"):
            return await pictures(request, names, settings.max_bytes)

    async def view_of(data: bytes, served: Served) -> View:
        return await service.in_thread(decoded, data, served.preprocessing, settings.limits)

    def answering() -> AbstractAsyncContextManager[None]:
        return _within(settings.timeout, 504, "the answer took too long")

    @api.post(
        "/explain",
        summary="Explain a picture",
        responses=_gives(Explained, "the explanation: JSON, an overlay, or the map alone"),
        openapi_extra=_takes("image"),
        response_class=Response,
    )
    async def explain(
        request: Request,
        format: Annotated[Format | None, _FORMAT] = None,
        include: Annotated[list[Include], _INCLUDE] = [],  # noqa: B006
    ) -> Response:
        """Answer with JSON, a PNG of the map over what the network saw, or the map as npy."""
        kind = answers.wanted(request, format)
        with service.admitted():
            data = await read(request, "image")
            async with answering():
                served = service.served
                view = await view_of(data["image"], served)
                answer = await service.explain(served, view.values)
                return await service.in_thread(
                    answers.explained, served, view, answer, kind, include
                )

    @api.post(
        "/pair",
        summary="Explain two pictures, or a picture and the one of its nearest row",
        responses={
            **_gives(Pair, "the explanation: JSON, two overlays side by side, or two maps"),
            404: {"model": Refused, "description": _NO_PICTURE},
            501: {"model": Refused, "description": "pairs of this network cannot be explained"},
        },
        openapi_extra=_takes("image", "other"),
        response_class=Response,
    )
    async def pair(
        request: Request,
        format: Annotated[Format | None, _FORMAT] = None,
        include: Annotated[list[PairInclude], _INCLUDE] = [],  # noqa: B006
    ) -> Response:
        """Answer with JSON, a PNG of both overlays side by side, or the maps [2, H, W] as npy."""
        kind = answers.wanted(request, format)
        with service.admitted():
            data = await read(request, "image", "other")
            async with answering():
                served = service.served
                view = (await view_of(data["image"], served)).values
                if "other" in data:
                    nearest, other = None, (await view_of(data["other"], served)).values
                else:
                    nearest, other = await _nearest(service, served, view)
                answer = await service.explain_pair(served, view, other)
                return await service.in_thread(
                    answers.paired, served, (view, other), answer, nearest, kind, include
                )


async def _nearest(
    service: Service, served: Served, view: NDArray[Any]
) -> tuple[Neighbor, NDArray[Any]]:
    """Return the nearest row of a view, and the view of its picture."""
    for nearest in (await service.explain(served, view)).neighbors[:1]:
        other = await service.in_thread(served.picture_of, nearest.row)
        if other is not None:
            return nearest, other
    raise HTTPException(404, _NO_PICTURE)


def _add_state(api: FastAPI, service: Service) -> None:
    unready: dict[int | str, dict[str, Any]] = {503: {"description": "not now"}}

    @api.get("/health", summary="Whether the process works", responses=unready)
    async def health() -> JSONResponse:
        """Answer 200, or 503 where the thread with the model has ended: restart the process."""
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @api.get("/ready", summary="Whether another request would be taken", responses=unready)
    async def ready() -> JSONResponse:
        """Answer 200, or 503 while the queue is full or the server stops."""
        served = service.served
        state = {
            "ready": service.ready,
            "rows": len(served.database),
            "database": served.version,
            "in_flight": service.in_flight,
        }
        return JSONResponse(state, 200 if service.ready else 503)

    @api.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        """Answer in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(api: FastAPI) -> None:
    folder = resources.files("gcfast.serve") / "page"
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}

    def add(path: str, content: Callable[[], str], media_type: str) -> None:
        async def page() -> Response:
            return Response(content(), media_type=media_type, headers=headers)

        api.add_api_route(path, page, include_in_schema=False)

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    page, script, style = text("page.html"), text("page.js"), base_style() + text("page.css")
    add("/", lambda: page, "text/html")
    add("/page.js", lambda: script, "text/javascript")
    add("/page.css", lambda: style, "text/css")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    docs = template.from_string(text("docs.html"))
    add("/docs", lambda: docs.render(api=api.openapi()), "text/html")
