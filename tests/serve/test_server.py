"""``gcfast serve`` as a process: signals, its port, its log; and settings."""

import http.client
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from cli_case import fails

from gcfast.errors import MissingExtraError
from gcfast.serve import server
from gcfast.serve.settings import ServeSettings

# The network of cli_case, whose passes take as long as a file says.
SLOW = """
import time
from pathlib import Path
import cli_net

class Slow(cli_net.Net):
    def forward(self, x):
        if Path("slow").exists():
            Path("begun").touch()
            time.sleep(1)
        return super().forward(x)

def build():
    import torch
    torch.manual_seed(0)
    net = Slow()
    net.load_state_dict(cli_net.build().state_dict())
    return net
"""


class Process:
    """A server that runs: where it listens, and what it has said."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-P", "-m", "gcfast", "serve", "--database", "db", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self.port = None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving: rows=18, at=http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def ask(self, method, path, data=None):
        """(status, JSON) of a request whose picture is in JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"content-type": "application/json"}
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        said = answer.status, json.loads(answer.read())
        connection.close()
        return said

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.reader.join()
        self.process.stderr.close()
        return status


@pytest.fixture
def body(here):
    import base64

    picture = (here / "pictures" / "red" / "0.png").read_bytes()
    return json.dumps({"image": base64.b64encode(picture).decode()})


@pytest.fixture
def running(here):
    (here / "slow_net.py").write_text(SLOW)
    process = Process(here, "--model", "slow_net:build", "--watch", "0")
    assert process.port is not None, "".join(process.lines)
    yield process
    if process.process.poll() is None:
        process.stop(signal.SIGKILL)


def test_a_process(here, running, body):
    status, said = running.ask("POST", "/explain", body)
    assert (status, said["neighbors"][0]["id"]) == (200, "red/0.png")

    # SIGHUP opens the database again.
    os.utime(here / "db" / "manifest.json")
    running.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 60
    while not any("reloaded: rows=18" in line for line in running.lines):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert running.ask("GET", "/ready")[0] == 200

    # What has come is answered before the process ends.
    (here / "slow").touch()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(running.ask("POST", "/explain", body)))
    thread.start()
    until = time.monotonic() + 60
    while not (here / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert running.stop(signal.SIGTERM) == 0
    thread.join()
    ((status, said),) = answers
    assert (status, said["neighbors"][0]["id"]) == (200, "red/0.png")
    with pytest.raises(ConnectionRefusedError):
        running.ask("GET", "/health")

    # One line of log for each request.
    lines = [line for line in running.lines if "method=" in line]
    assert len(lines) == 3
    assert re.search(
        r"INFO gcfast\.serve: request: method=POST, path=/explain, status=200, ms=[\d.]+, "
        r"received=\d{3}, sent=\d{3}, id=[0-9a-f]{12}$",
        lines[0],
    )


def test_a_port_that_is_taken(here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        model = ("--model", "cli_net:build")
        line = fails(capsys, "serve", "--database", "db", *model, "--port", str(port))
    assert line.startswith(f"gcfast: cannot serve at 127.0.0.1, port {port}: ")
    sys.modules.pop("cli_net", None)


@pytest.mark.parametrize("port", [-1, 70_000])
def test_no_port(source, port):
    with pytest.raises(ValueError, match=f"`port` must be from 0 to 65535, got {port}"):
        server.run(source, port=port)


@pytest.mark.parametrize(
    ("host", "hosts", "warns"),
    [("127.0.0.1", True, False), ("localhost", True, False), ("0.0.0.0", False, True)],
)
def test_bound_elsewhere(source, monkeypatch, caplog, host, hosts, warns):
    served = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(server.uvicorn, "Server", lambda config: served.append(config) or Idle())
    server.run(source, host=host, port=0)
    settings = served[0].app.state.service.settings
    assert bool(settings.hosts) == hosts
    assert ("at=http://0.0.0.0:" in caplog.text) == warns
    assert ("no password and no encryption" in caplog.text) == warns


class Idle:
    def run(self, sockets):
        assert len(sockets) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"queue": 1.5}, "`queue` must be"),
        ({"wait": -1.0}, "`wait` must be 0 or more"),
        ({"timeout": 0.0}, "`timeout` must be above 0"),
        ({"timeout": float("nan")}, "`timeout` must be finite"),
        ({"center": "1"}, "`center` must be a number"),
        ({"hosts": "here"}, "`hosts` must be a tuple"),
        (
            {"hosts": ("https://here",)},
            "`hosts` must be names without scheme, .* got 'https://here'",
        ),
        ({"hosts": ("here:8000",)}, "`hosts` must be names without scheme, port and path"),
        ({"hosts": ("a", "::1")}, "addresses of IPv6 in brackets, got '::1'"),
        ({"hosts": ("sh*.here",)}, "`hosts` must be names"),
    ],
)
def test_settings(settings, says):
    with pytest.raises((TypeError, ValueError), match=says):
        ServeSettings(**settings)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    package = importlib.util.find_spec("gcfast.serve")
    with pytest.raises(MissingExtraError, match=r"needs fastapi, .*pip install 'gcfast\[serve\]'"):
        package.loader.exec_module(importlib.util.module_from_spec(package))


def test_the_log_has_fields(serving, caplog):
    caplog.set_level(logging.INFO, "gcfast.serve")
    with serving() as client:
        answer = client.get("/nowhere/../secret")
    (facts,) = (r.facts for r in caplog.records if hasattr(r, "facts"))
    assert facts["event"] == "request"
    assert (facts["method"], facts["path"], facts["status"]) == ("GET", "other", 404)
    assert answer.headers["x-request-id"] == facts["id"]
