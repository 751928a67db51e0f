"""The web pages: what they load, and in a real browser what they show."""

import re
import shutil
import socket
import threading

import pytest
import uvicorn
from PIL import Image

from gcfast.serve.app import create_app
from gcfast.serve.settings import ServeSettings

PAGES = ("/", "/docs", "/page.js", "/page.css")


def test_pages_load_nothing_from_elsewhere(serving):
    with serving() as client:
        for path in PAGES:
            answer = client.get(path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert not re.search(r"https?://|//[\w-]+\.|@import|url\(", answer.text)


def test_the_page_of_routes(serving):
    with serving() as client:
        page = client.get("/docs").text
        routes = client.get("/openapi.json").json()["paths"]
    assert {"/explain", "/health", "/ready", "/metrics"} <= set(routes)
    for path in routes:
        assert f"<code>{path}</code>" in page
    assert "multipart/form-data" in page
    assert "Retry-After says when to come again" in page


@pytest.fixture
def site(source):
    """The address of a server that runs in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = ServeSettings(max_pixels=1_000_000, watch=0)
    config = uvicorn.Config(create_app(source, settings), log_config=None, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    running.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def browser():
    """Debian's chromium, or another one that is installed; Playwright's own cannot always be."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("there is no browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.mark.slow
def test_in_a_browser(here, site, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(site)
    assert page.locator("#result").is_hidden()

    # Dropped, as from a file manager.
    data = (here / "pictures" / "red" / "0.png").read_bytes()
    drop(page, data)
    page.locator("#result").wait_for(state="visible")
    assert page.locator("#neighbor-caption").inner_text() == "Nearest: red/0.png"
    cells = page.locator("#rows td").all_inner_texts()
    assert cells[:2] == ["red/0.png", "red"]
    for name in ("picture", "overlay", "neighbor"):
        assert pixels(page, name) == [32, 32]
    assert source_of(page, "picture") == source_of(page, "neighbor") != source_of(page, "overlay")
    page.locator("#pair").wait_for(state="visible")
    for name in ("pair-picture", "pair-other"):
        assert pixels(page, name) == [32, 32]
        assert source_of(page, name) not in (source_of(page, "picture"), None)

    # Chosen: another one takes its place.
    page.set_input_files("#file", here / "pictures" / "blue" / "1.png")
    page.get_by_text("Nearest: blue/1.png").wait_for()
    assert errors == []

    # Refused, in words.
    drop(page, b"no picture")
    page.locator("#status.error").wait_for()
    assert "not a picture of a known format" in page.locator("#status").inner_text()
    assert page.locator("#result").is_hidden()
    large = tmp_path / "large.png"
    Image.new("RGB", (1001, 1000)).save(large)
    page.set_input_files("#file", large)
    page.get_by_text("at most 1,000,000 pixels").wait_for()

    assert all(url.startswith((site, "data:")) for url in asked)


def drop(page, data):
    """Drop a file on the page."""
    page.evaluate(
        """bytes => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
            const options = { dataTransfer: given, bubbles: true, cancelable: true };
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        }""",
        list(data),
    )


def pixels(page, name):
    """The size of a shown picture."""
    page.wait_for_function(f"document.getElementById('{name}').complete")
    return page.evaluate(
        f"(i => [i.naturalWidth, i.naturalHeight])(document.getElementById('{name}'))"
    )


def source_of(page, name):
    return page.get_attribute(f"#{name}", "src")
