"""What a server refuses, with which status, and what it says."""

import asyncio
import base64
import io
import logging
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

PNG = "image/png"


def bomb(side):
    """A PNG of side x side pixels in some bytes: its data are left out."""

    def chunk(kind, data):
        content = kind + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def picture(kind="PNG", size=(40, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def refusal(answer):
    """(status, detail), of an answer that gives nothing away."""
    for secret in ("Traceback", "/srv", "/tmp", ".py", "site-packages"):
        assert secret not in answer.text
    return answer.status_code, answer.json()["detail"]


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"no picture at all", 415, "not a picture of a known format: JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not a picture"),
        (picture("PPM"), 415, "not a picture"),  # Pillow could, but it is not on the list
        (picture()[:60], 422, "the picture is damaged"),
        (bomb(2000), 413, "at most 1,000,000 pixels"),
        (bomb(60_000), 413, "at most 1,000,000 pixels"),  # beyond Pillow's own limit
        (picture(size=(1001, 1000)), 413, "at most 1,000,000 pixels"),
        (b"", 415, "not a picture"),
    ],
)
def test_pictures(serving, data, status, says):
    with serving(max_pixels=1_000_000) as client:
        got, detail = refusal(client.post("/explain", files={"image": data}))
    assert got == status
    assert says in detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_that_are_read(serving, kind):
    with serving() as client:
        assert client.post("/explain", files={"image": picture(kind)}).status_code == 200


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ({"content": picture(), "headers": {"content-type": PNG}}, 415, "multipart/form-data"),
        ({"content": b""}, 415, "multipart/form-data"),
        ({"files": {"picture": b"1"}}, 400, "must have image, got picture"),
        ({"files": {"image": b"1", "more": b"2"}}, 400, "must have image, got more"),
        ({"files": [("image", b"1")] * 3}, 400, "the form cannot be read: Too many files"),
        ({"files": [("image", b"1"), ("image", b"2")]}, 400, "a name of its own"),
        (
            {
                "content": b'{"image": "MQ==", "image": "Mg=="}',
                "headers": {"content-type": "application/json"},
            },
            400,
            "a name of its own",
        ),
        ({"files": {"image": b"1"}, "data": {"a": "b"}}, 400, "the form cannot be read"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "the form cannot be read",
        ),
        (
            {"content": b"{", "headers": {"content-type": "application/json"}},
            400,
            "the body is not JSON",
        ),
        (
            {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
            413,
            "at most",
        ),
        ({"json": ["image"]}, 400, "an object of pictures"),
        ({"json": {"image": 5}}, 400, "an object of pictures"),
        ({"json": {}}, 400, "must have image, got nothing"),
        ({"json": {"image": "not base64!"}}, 400, "must be base64"),
        ({"files": {"image": b"1"}, "headers": {"accept": "text/html"}}, 406, "image/png"),
        ({"files": {"image": b"x" * 100_000}}, 413, "at most 20,000 bytes"),
        ({"files": {"image": b"x" * 20_001}}, 413, "at most 20,000 bytes"),
        ({"json": {"image": base64.b64encode(b"x" * 90_000).decode()}}, 413, "at most 20,000"),
        ({"json": {"image": base64.b64encode(b"x" * 20_001).decode()}}, 413, "at most 20,000"),
    ],
)
def test_requests(serving, request_, status, says):
    with serving(max_bytes=20_000) as client:
        got, detail = refusal(client.post("/explain", **request_))
    assert got == status
    assert says in detail


def test_a_body_that_does_not_say_how_long_it_is(serving):
    def endless():
        for _ in range(100):
            yield b"x" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with serving(max_bytes=20_000) as client:
        status, _ = refusal(client.post("/explain", content=endless(), headers=headers))
    assert status == 413


def test_parameters_that_are_not_known(serving):
    files = {"image": picture()}
    with serving() as client:
        for query in ("format=gif", "include=everything"):
            assert client.post(f"/explain?{query}", files=files).status_code == 422


@pytest.fixture
def held(monkeypatch):
    """Let the model's thread wait for an event."""
    from gcfast.serve.served import Served

    go, explain = threading.Event(), Served.explain
    begun = threading.Event()
    monkeypatch.setattr(Served, "warm_up", lambda *_: None)

    def waiting(served, views, *, center=0.0):
        begun.set()
        assert go.wait(20)
        return explain(served, views, center=center)

    monkeypatch.setattr(Served, "explain", waiting)
    yield begun, go
    go.set()


def test_a_full_queue(serving, held):
    begun, go = held
    files = {"image": picture()}
    with serving(queue=2) as client, ThreadPoolExecutor(2) as pool:
        first = [pool.submit(client.post, "/explain", files=files) for _ in range(2)]
        assert begun.wait(20)
        until = time.monotonic() + 20
        while client.service.in_flight < 2:
            assert time.monotonic() < until
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        answer = client.post("/explain", files=files)
        assert refusal(answer) == (503, "too many requests wait")
        assert answer.headers["retry-after"] == "1"
        go.set()
        assert [one.result().status_code for one in first] == [200, 200]
        assert client.get("/ready").status_code == 200
        assert client.post("/explain", files=files).status_code == 200


def test_time(serving, held):
    _, go = held
    files = {"image": picture()}
    with serving(timeout=0.2) as client:
        assert refusal(client.post("/explain", files=files)) == (504, "the answer took too long")
        # This one is given up while it waits, and then never run.
        assert client.post("/explain", files=files).status_code == 504
        go.set()
    assert client.service.metrics.batch_size._sum.get() == 1
    assert client.service.in_flight == 0


def call(client, receive):
    """What the application sends for a POST whose body comes from a function."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"testserver")]
    scope = {
        "type": "http", "method": "POST", "path": "/explain", "raw_path": b"/explain",
        "query_string": b"", "headers": headers, "root_path": "", "scheme": "http",
        "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    client.portal.call(client.app, scope, receive, send)
    return sent


def test_a_request_that_comes_in_too_slowly(serving):
    async def never():
        await asyncio.sleep(20)

    with serving(timeout=0.1) as client:
        start, body = call(client, never)
    assert start["status"] == 408
    assert b"too slowly" in body["body"]


def test_a_client_that_goes(serving, caplog):
    async def gone():
        return {"type": "http.disconnect"}

    caplog.set_level(logging.INFO, "gcfast.serve")
    with serving() as client:
        assert call(client, gone) == []
        assert client.service.in_flight == 0
    assert [r.levelname for r in caplog.records if r.name == "gcfast.serve"] == ["INFO"]
    assert "status=499" in caplog.text


def test_an_error_that_nothing_expects(serving, monkeypatch, caplog):
    from gcfast.serve.served import Served

    def fails(*_args, **_settings):
        raise RuntimeError("no memory in /srv/secret.py")

    with serving() as client:
        monkeypatch.setattr(Served, "explain", fails)
        status, detail = refusal(client.post("/explain", files={"image": picture()}))
        monkeypatch.undo()
        assert client.post("/explain", files={"image": picture()}).status_code == 200
    assert status == 500
    name = detail.removeprefix("internal error, request ")
    assert f"unexpected error: id={name}" in caplog.text
    assert "no memory in /srv/secret.py" in caplog.text


@pytest.mark.parametrize("path", ["/explain", "/pair"])
@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("format=jpeg", "`format` must be 'json', 'png' or 'npy', got 'jpeg'"),
        ("include=picture&include=maps", "`include` must be 'overlay', 'map'"),
    ],
)
def test_parameters(serving, path, query, says):
    with serving() as client:
        answer = client.post(f"{path}?{query}", files={"image": picture()})
    status, detail = refusal(answer)
    assert status == 422
    assert says in detail


def test_only_requests_to_its_own_names(serving):
    with serving(hosts=("localhost", "[::1]", "*.shop.example")) as client:
        for host in ("localhost:8000", "LOCALHOST", "[::1]:8000", "a.shop.example"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "shop.example", "[::1", "localhost:8000:1", "localhost@a", ""):
            status, detail = refusal(client.get("/health", headers={"host": host}))
            assert status == 400
            assert f"(--allow-host), got {host!r}" in detail
