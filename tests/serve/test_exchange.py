"""A database that is exchanged under a server."""

import gc
import logging
import os
import shutil
import threading
import time
import weakref

import pytest
import torch

import gcfast


def wait_for(what, seconds=20):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def other(source):
    """Write another database of the same network, with the same preprocessing: its ids."""

    def write(path, **settings):
        served = source()
        model, preprocessing = served.explainer.network.model, served.database.manifest
        images = torch.rand(12, 3, 32, 32)
        ids = [f"new/{i}" for i in range(12)]
        batch = (images, [f"class {i % 3}" for i in range(12)], ids)
        explainer = gcfast.Explainer(model, channels=4, **settings)
        database = explainer.build([batch], preprocessing=preprocessing["preprocessing"])
        database.save(path, overwrite=True)
        return ids

    return write


def test_saved_over(here, serving, other):
    data = (here / "pictures" / "red" / "0.png").read_bytes()
    seen, failed = set(), []
    stop = threading.Event()
    with serving(watch=0.02) as client:

        def ask():
            while not stop.is_set():
                answer = client.post("/explain", files={"image": data})
                if answer.status_code == 200:
                    said = answer.json()
                    seen.add((said["database"], said["neighbors"][0]["id"]))
                else:
                    failed.append(answer.text)

        before = client.service.served.version
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(seen) == 1)
        ids = other(here / "db")
        wait_for(lambda: client.service.served.version != before)
        after = client.service.served.version
        wait_for(lambda: len(seen) == 2)
        stop.set()
        for thread in threads:
            thread.join()
        assert client.get("/ready").json()["rows"] == 12
        assert 'gcfast_reloads_total{result="done"} 1.0' in client.get("/metrics").text
    assert failed == []
    assert {version for version, _ in seen} == {before, after}
    # Each answer is of one database: its rows, under its name.
    for version, name in seen:
        assert (name in ids) == (version == after)


def test_another_method_and_another_folder_under_a_link(here, serving, other):
    os.rename(here / "db", here / "one")
    os.symlink("one", here / "db")
    with serving(watch=0.02) as client:
        other(here / "two", method="gradcam++")
        os.symlink("two", here / "db.new")
        os.replace(here / "db.new", here / "db")
        wait_for(lambda: client.service.served.explainer.settings.method == "gradcam++")


def test_one_that_cannot_be_opened(here, serving, other, caplog):
    data = (here / "pictures" / "red" / "0.png").read_bytes()
    other(here / "next")
    with serving(watch=0.02) as client:
        before = client.service.served
        (here / "db" / "manifest.json").write_bytes(b"{")
        failed = client.service.metrics.reloads.labels("failed")
        wait_for(lambda: failed._value.get() >= 2)
        assert client.service.served is before
        assert client.post("/explain", files={"image": data}).status_code == 200
        assert client.get("/ready").status_code == 200
        shutil.rmtree(here / "db")
        # A copy that begins with the manifest: its rows are missing for a while.
        (here / "db").mkdir()
        shutil.copy(here / "next" / "manifest.json", here / "db")
        tried = failed._value.get()
        wait_for(lambda: failed._value.get() > tried)
        shutil.copytree(here / "next", here / "db", dirs_exist_ok=True, copy_function=missing)
        wait_for(lambda: client.service.served is not before)
        assert client.get("/ready").json()["rows"] == 12
    # Each reason is told once.
    reasons = [line for line in caplog.messages if "the database in use stays" in line]
    assert len(reasons) == len(set(reasons)) >= 2


def missing(source, target):
    """Copy a file that is not there yet."""
    if not os.path.exists(target):
        shutil.copy2(source, target)


def test_the_same_one_is_not_opened_again(here, serving, caplog):
    caplog.set_level(logging.INFO)
    with serving(watch=0.02) as client:
        before = client.service.served
        os.utime(here / "db" / "manifest.json")
        time.sleep(0.2)
        assert client.service.served is before
        client.service.watcher.wake()
        wait_for(lambda: client.service.served is not before)
        assert client.service.served.version == before.version
    assert caplog.text.count("reloaded: rows=18") == 1


def test_without_watching_only_a_signal_reloads(here, serving, other):
    with serving(watch=0) as client:
        before = client.service.served
        other(here / "db")
        time.sleep(0.1)
        assert client.service.served is before
        client.service.watcher.wake()
        wait_for(lambda: len(client.service.served.database) == 12)


def test_the_old_one_is_let_go(here, serving):
    data = (here / "pictures" / "red" / "0.png").read_bytes()
    with serving() as client:
        client.post("/explain", files={"image": data})
        before = weakref.ref(client.service.served)
        assert client.service.reload(True)
        client.post("/explain", files={"image": data})
        gc.collect()
        assert before() is None
