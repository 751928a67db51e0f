"""`gcfast serve` under load on this machine: latency, throughput, batches, memory, wrong answers.

    python bench/serve_load.py [--clients 1 8 32] [--seconds 60] [--soak 600] [--network birds]
        [--json FILE]

A server with EfficientNet-Lite0 (or the demonstration's small network, for many requests) and a
database of 10,000 rows in a process of its own, and clients in this one, each with a connection
that it keeps, which ask for the maps of JPEG pictures as fast as they are answered. The phase of
the last number of clients lasts `--soak` seconds; at its thirds SIGHUP lets the server open its
database again. Every map is compared with what `explain_batch` gives for the picture alone. Before
and after, the same network's `explain_batch` is timed in this process with nothing else of ours
running.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paired import conditions
from PIL import Image
from subjects import efficientnet_lite0, explainer_with_rows
from torch import nn

import gcfast
from gcfast.demo.network import load_network
from gcfast.images.preprocessing import Preprocessing

SIDE = 512  # of a picture
BATCH = 32
CLEAR = 1e-4  # squared distance by which a picture's nearest row is nearer than the next
TOLERANCE = 1e-4  # of a map: another batch size, another rounding
# Of each network: what `--model` takes, the layer that is explained, and its input in pixels.
NETWORKS = {
    "efficientnet-lite0": ("serve_load:network", "head", 224),
    "birds": ("gcfast.demo.network:load_network", "features", 128),
}
Map = NDArray[np.float32]


def network() -> nn.Module:
    """The network, the same in every process."""
    torch.manual_seed(0)
    return efficientnet_lite0().eval()


def pictures(count: int) -> list[bytes]:
    """Drawn birds as JPEG files."""
    from gcfast.demo.birds import draw_bird

    files = []
    for i in range(count):
        image = Image.fromarray(draw_bird(i % 54, seed=1, index=i // 54, size=128).image)
        file = io.BytesIO()
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def expected(
    explainer: gcfast.Explainer, preprocessing: Preprocessing, files: list[bytes]
) -> dict[bytes, Map]:
    """The map of each picture by itself, of those that have one nearest row."""
    assert explainer.database is not None
    rows = explainer.database.embeddings.double()
    wanted = {}
    for file in files:
        view = np.array(preprocessing.load(io.BytesIO(file)).values)
        images = preprocessing.normalize(torch.from_numpy(view)[None])
        why = explainer.explain_batch(images, details=True)
        distances = torch.cdist(why.embeddings.double(), rows)[0].square()
        nearest = distances.topk(2, largest=False).values
        if nearest[1] - nearest[0] > CLEAR:
            wanted[file] = why.maps[0].numpy()
    return wanted


def alone(explainer: gcfast.Explainer, side: int, seconds: float) -> float:
    """Images a second of explain_batch by itself."""
    images = torch.randn(BATCH, 3, side, side).contiguous(memory_format=torch.channels_last)
    explainer.explain_batch(images)
    begun, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        explainer.explain_batch(images)
        done += BATCH
    return done / passed


class Server:
    """The process, and what it says of itself."""

    def __init__(self, database: Path, log: Path, model: str) -> None:
        command = [sys.executable, "-P", "-m", "gcfast", "serve", "--database", str(database),
                   "--model", model, "--port", "0", "--refine", "none",
                   "--batch-size", str(BATCH), "--timeout", "120"]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        self.log = log
        while (found := re.search(r"at=http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.2)
        self.port = int(found[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def metrics(self) -> dict[str, float]:
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


class Load:
    """Clients that ask until they are stopped, and what they were answered."""

    def __init__(self, server: Server, wanted: dict[bytes, Map]) -> None:
        self.server, self.wanted = server, wanted
        self.bodies = [
            (json.dumps({"image": base64.b64encode(file).decode()}).encode(), heat)
            for file, heat in wanted.items()
        ]
        self.lock = threading.Lock()

    def run(self, clients: int, seconds: float, during: Callable[[], None]) -> dict[str, Any]:
        """Ask for some time; ``during`` is called about every second."""
        self.stop = False
        self.latencies: list[float] = []
        self.failed: list[str] = []
        self.wrong, self.largest = 0, 0.0
        before = self.server.metrics()
        threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        while time.perf_counter() - begun < seconds:
            time.sleep(1)
            during()
        self.stop = True
        for thread in threads:
            thread.join()
        took = time.perf_counter() - begun
        after = self.server.metrics()
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        batches, of = grown["gcfast_batch_size_count"], grown["gcfast_batch_size_sum"]
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        upto = {
            name.split('"')[1]: count
            for name, count in grown.items()
            if name.startswith("gcfast_batch_size_bucket")
        }
        return {
            "clients": clients,
            "seconds": took,
            "answers": len(self.latencies),
            "answers_a_second": len(self.latencies) / took,
            "milliseconds": {
                "median": 1000 * cuts[49],
                "p90": 1000 * cuts[89],
                "p99": 1000 * cuts[98],
                "most": 1000 * max(self.latencies),
            },
            "failed": len(self.failed),
            "failures": self.failed[:5],
            "wrong": self.wrong,
            "largest_difference": self.largest,
            "batches": batches,
            "pictures_a_batch": of / batches,
            "batches_of_at_most": upto,
            "model_share_of_time": grown["gcfast_batch_seconds_sum"] / took,
        }

    def _ask(self, number: int) -> None:
        connection = self.server.connect()
        while not self.stop:
            body, heat = self.bodies[number % len(self.bodies)]
            number += 7
            begun = time.perf_counter()
            headers = {"Content-Type": "application/json", "Accept": "application/x-npy"}
            connection.request("POST", "/explain", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            seconds = time.perf_counter() - begun
            if answer.status == 200:
                difference = float(np.abs(np.load(io.BytesIO(content)) - heat).max())
            with self.lock:
                if answer.status != 200:
                    self.failed.append(f"{answer.status}: {content[:200]!r}")
                    continue
                self.latencies.append(seconds)
                self.largest = max(self.largest, difference)
                self.wrong += difference > TOLERANCE
        connection.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60, help="of each phase but the last")
    parser.add_argument("--soak", type=float, default=600, help="seconds of the last phase")
    parser.add_argument("--network", choices=NETWORKS, default="efficientnet-lite0")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    record: dict[str, Any] = {"conditions": conditions(), "rows": arguments.rows, "side": SIDE}
    record["network"] = arguments.network
    record["load_average_before"] = os.getloadavg()

    model, layer, side = NETWORKS[arguments.network]
    made = network() if arguments.network == "efficientnet-lite0" else load_network()
    explainer = explainer_with_rows(made, layer, arguments.rows)
    preprocessing = Preprocessing(size=side)
    assert explainer.database is not None
    explainer.database.manifest["preprocessing"] = preprocessing.to_dict()
    wanted = expected(explainer, preprocessing, pictures(arguments.pictures))
    record["pictures"] = len(wanted)
    with tempfile.TemporaryDirectory() as folder:
        explainer.database.save(Path(folder) / "db")
        record["alone_before"] = alone(explainer, side, min(20, arguments.seconds))
        server = Server(Path(folder) / "db", Path(folder) / "log", model)
        memory: list[tuple[float, float]] = []
        begun = time.perf_counter()

        def look() -> None:
            resident = server.metrics()["process_resident_memory_bytes"] / 2**20
            memory.append((time.perf_counter() - begun, resident))

        load = Load(server, wanted)
        record["phases"] = []
        for clients in arguments.clients[:-1]:
            record["phases"].append(load.run(clients, arguments.seconds, look))
            print(json.dumps(record["phases"][-1]))
        start = time.perf_counter()
        signals = [start + arguments.soak / 3, start + 2 * arguments.soak / 3]

        def soak() -> None:
            look()
            if signals and time.perf_counter() > signals[0]:
                signals.pop(0)
                server.process.send_signal(signal.SIGHUP)

        memory_start = len(memory)
        record["soak"] = load.run(arguments.clients[-1], arguments.soak, soak)
        resident = [mib for _, mib in memory[memory_start:]]
        sixth = max(1, len(resident) // 6)
        record["soak"]["resident_mib"] = {
            "sixths": [
                statistics.median(resident[i : i + sixth])
                for i in range(0, sixth * 6, sixth)
                if resident[i : i + sixth]
            ],
            "most": max(resident),
        }
        print(json.dumps(record["soak"]))
        server.process.send_signal(signal.SIGTERM)
        record["exit_status"] = server.process.wait(120)
        log = server.log.read_text()
        record["reloads"] = log.count("reloaded: rows=")
        record["errors_in_log"] = log.count(" ERROR ")
        record["alone_after"] = alone(explainer, side, min(20, arguments.seconds))
        record["load_average_after"] = os.getloadavg()
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        facts = ("alone_before", "alone_after", "reloads", "exit_status", "errors_in_log")
        print(json.dumps({name: record[name] for name in facts}))


if __name__ == "__main__":
    main()
