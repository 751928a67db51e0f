"""A line of log and the counters for each request."""

from __future__ import annotations

import json
import logging
import time
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gcfast._log import tell
from gcfast.serve.metrics import Metrics

log = logging.getLogger("gcfast.serve")

_GONE = 499  # for the log and the metrics, as nginx has it: the client did not wait


class Recorder:
    """Middleware: an id for each request, its line of log, its metrics, and the last resort.

    An exception that nothing expects becomes status 500 and says nothing but the request's id, with
    which its traceback is in the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, started = uuid.uuid4().hex[:12], time.perf_counter()
        status, received, sent = 0, 0, 0

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except ClientDisconnect:
            status = _GONE
        except Exception:
            facts = {"event": "unexpected error", "id": name}
            log.exception("unexpected error: id=%s", name, extra={"facts": facts})
            if not status:
                await _internal_error(sending, name)
        finally:
            seconds = time.perf_counter() - started
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            told = {
                "method": scope["method"],
                "path": path,
                "status": status,
                "ms": round(seconds * 1000, 1),
                "received": received,
                "sent": sent,
                "id": name,
            }
            tell("serve", "request", **told)


async def _internal_error(send: Send, name: str) -> None:
    body = json.dumps({"detail": f"internal error, request {name}"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
