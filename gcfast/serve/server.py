"""The application on a port, until a signal stops it."""

from __future__ import annotations

import ipaddress
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from gcfast._log import tell
from gcfast.serve.app import create_app
from gcfast.serve.served import Served
from gcfast.serve.settings import ServeSettings

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def run(
    source: Callable[[], Served],
    settings: ServeSettings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that have come are answered first.

    SIGHUP opens the database again. Bound to loopback, and without ``hosts`` in the settings, only
    requests to a name of loopback are answered: a page from elsewhere that the user's browser shows
    cannot reach the server under a name of its own.

    Args:
        source: as for :func:`gcfast.serve.app.create_app`.
        settings: as there.
        host: address or name to bind to.
        port: 0 for one that is free.

    Raises:
        OSError: the address cannot be bound.
        ValueError: no port has this number.
        Exception: whatever ``source`` raises.
    """
    settings = ServeSettings() if settings is None else settings
    with _listening(host, port) as listener:
        address = listener.getsockname()[0]
        name = f"[{address}]" if ":" in address else address
        where = f"http://{name}:{listener.getsockname()[1]}"
        if not ipaddress.ip_address(address).is_loopback:
            tell(
                "serve",
                "whoever reaches this machine can send pictures, and see those of the database; "
                "there is no password and no encryption",
                logging.WARNING,
                at=where,
            )
        elif not settings.hosts:
            own = {*_LOOPBACK_NAMES, name} | ({host} if ":" not in host else set())
            settings = replace(settings, hosts=tuple(own))
        # Uvicorn waits for its requests, and then raises the signal again.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        app = create_app(source, settings)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: app.state.service.watcher.wake())
        database = app.state.service.served.database
        tell("serve", "serving", rows=len(database), at=where)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(2 * settings.timeout) + 1,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Bind a socket here: uvicorn would end the process where it cannot."""
    if not 0 <= port < 2**16:  # getaddrinfo drops the bits above
        raise ValueError(f"`port` must be from 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot serve at {host}, port {port}: {error}") from error
