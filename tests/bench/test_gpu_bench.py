"""The parts of bench/gpu.py that need no GPU: its cases, clocks, sections, record and table."""

import functools
import json
import math

import cases
import gpu
import gpu_end_to_end
import gpu_operations
import gpu_runner
import gpu_timing
import gpu_transfer
import paired
import pytest
import subjects
import torch
from torch import nn

from gcfast import ops

RATES = {"copy": 1e12, **dict.fromkeys(cases.RATES, 1e13)}


@pytest.fixture
def context():
    return gpu_runner.Context(
        device=torch.device("cpu"),
        clock=gpu_timing.HostClock(),
        l2_bytes=0,
        memory_bytes=2**30,
        quick=False,
        side_seconds=1e-4,
        rates=dict(RATES),
    )


def test_every_operation_has_cases_some_of_them_quick():
    assert set(cases.CASES) == set(gpu_operations.OPERATIONS)
    for operation, listed in cases.CASES.items():
        assert len({case.name for case in listed}) == len(listed)
        assert any(case.quick for case in listed)
        for case in listed:
            assert case.operation == operation
            assert case.rate in cases.RATES
            assert 0 < case.expected <= 1
            assert case.inputs <= case.bytes + 4 * case.inputs  # both in bytes
            assert min(case.bytes, case.inputs) > 0


def test_the_shapes_asked_for_are_there():
    maps = {(c.sizes["B"], c.sizes["C"]) for c in cases.CASES["sparse_cam"]}
    assert {(B, C) for B in (1, 16, 256, 1024) for C in (2048, 768)} <= maps
    tables = {(c.sizes["N"], c.sizes["D"]) for c in cases.CASES["knn"]}
    assert {(N, D) for N in (10**4, 10**5, 10**6, 10**7) for D in (128, 512)} <= tables
    for operation in (
        "sparse_cam",
        "dense_cam",
        "grad_weights",
        "head_grad_weights",
        "top_m",
        "knn",
    ):
        assert {1, 16, 256, 1024} <= {case.sizes["B"] for case in cases.CASES[operation]}
    for method in ("gradcam", "gradcam++"):
        heads = {(c.sizes["B"], c.sizes["D"]) for c in cases.CASES["head_grad_weights"]
                 if c.options["method"] == method}  # fmt: skip
        assert {(B, D) for B in (1, 16, 256, 1024) for D in (128, 512)} <= heads
    assert set(gpu_end_to_end.BATCHES) == {1, 4, 16, 64, 256}
    assert {gpu_end_to_end.NAME, gpu_end_to_end.OTHER} == {"resnet50", "vit-b16"}
    assert {c.dtype for c in cases.CASES["grad_weights"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("case", "bytes_", "flops"),
    [
        # 3 x 50 channels of 49 float32; an id, 50 channel ids and weights each; 3 maps.
        (
            cases.sparse_cam(3, cases.RESNET50),
            3 * 50 * 49 * 4 + 3 * (8 + 50 * 12) + 3 * 224 * 224 * 4,
            2 * 3 * 50 * 49 + 8 * 3 * 224 * 224,
        ),
        # 128 sectors a pixel, of which 50 channels reach 41.53 on average.
        (
            cases.sparse_cam(3, cases.RESNET50, dtype="bfloat16", layout="channels last"),
            3 * 49 * 1329 + 3 * (8 + 50 * 12) + 3 * 224 * 224 * 4,
            2 * 3 * 50 * 49 + 8 * 3 * 224 * 224,
        ),
        (
            cases.grad_weights(2, cases.RESNET50, T=5, dtype="bfloat16", method="gradcam++"),
            (2 * 5 + 2) * 2048 * 49 * 2 + 2 * 5 + 2 * 2048 * 4,
            5 * 2 * 5 * 2048 * 49,
        ),
        (
            cases.head_grad_weights(2, T=3, D=5, C=7),
            2 * 3 * (5 * 4 + 1) + 5 * 7 * 4 + 2 * 5 * 4 + 2 * 4 + 2 * 7 * 4,
            2 * 2 * 5 * 7,
        ),
        (
            cases.head_grad_weights(2, T=3, D=5, C=7, method="gradcam++"),
            2 * 3 * (5 * 4 + 1) + 5 * 7 * 4 + 2 * 5 * 4 + 2 * 4 + 2 * 2 * 7 * 4,
            2 * 2 * 3 * 5 * 7,
        ),
        (cases.top_m(3, C=11, M=2), 3 * 11 * 4 + 3 * 2 * 12, 0),
        (cases.knn(2, 10, D=3, K=1), 10 * 3 * 4 + 10 * 4 + 2 * 3 * 4 + 2 * 12, 2 * 2 * 10 * 3),
        (
            cases.sample_triplets(2, 10, D=3, T=4),
            10 * (3 * 4 + 8) + 2 * (3 * 4 + 16) + 2 * (4 * 17 + 24),
            3 * 2 * 10 * 3,
        ),
    ],
    ids=lambda v: v.operation if isinstance(v, cases.Case) else "",
)
def test_bytes_and_operations_by_hand(case, bytes_, flops):
    assert (case.bytes, case.flops) == (bytes_, flops)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    case = cases.knn(256, 10**5)
    assert case.floor_seconds(1e12, 1e99) == case.bytes / 1e12
    assert case.bound(1e12, 1e99) == "memory"
    assert case.floor_seconds(1e99, 1e12) == case.flops / 1e12
    assert case.bound(1e99, 1e12) == "arithmetic"


def test_selected_says_why_a_case_is_left_out():
    run, left = cases.selected("knn", quick=True, memory_bytes=2**40)
    assert run == [case for case in cases.CASES["knn"] if case.quick]
    assert left == []
    others, _ = cases.selected("knn", quick=False, memory_bytes=2**40)
    assert [*run, *others] == cases.CASES["knn"]
    run, left = cases.selected("knn", quick=None, memory_bytes=2 * 10**7 * 128 * 4 - 1)
    assert {case.sizes["N"] for case in run} == {10**4, 10**5, 10**6}
    assert all("GB of inputs, half of the card's" in line for line in left)
    assert len(left) == 8


def test_quick_cases_come_first_and_then_the_cheap():
    for listed in cases.CASES.values():
        assert listed[0].quick
        order = [(not case.quick, case.inputs) for case in listed]
        assert order == sorted(order)


def test_inputs_rotate_through_more_than_the_cache():
    l2, memory = 50 * 2**20, 80 * 2**30
    for case in (cases.knn(1, 10**4), cases.sparse_cam(256, cases.RESNET50)):
        assert cases.copies(case, l2, memory) * case.bytes > 2 * l2
    assert cases.copies(cases.knn(1, 10**7), l2, memory) == 1
    assert cases.copies(cases.top_m(1), l2, memory) == 512  # the most
    case = cases.sparse_cam(16, cases.RESNET50)
    assert cases.copies(case, l2, 6 * case.inputs) == 3  # half of the memory


def test_windows_hold_whole_rounds_for_long_enough():
    asked = []

    def window(rounds):
        asked.append(rounds)
        return rounds * 0.001

    taken = gpu_timing.timing(window, 4, "graph", seconds=0.2)
    assert asked == [1] + [20] * 9  # 20 ms each, after one round to see how long it takes
    assert taken.seconds == pytest.approx([0.00025] * 9)
    assert (taken.how, taken.calls) == ("graph", 80)
    assert taken.median == pytest.approx(0.00025)

    asked.clear()
    slow = gpu_timing.timing(lambda rounds: asked.append(rounds) or rounds * 2.0, 1, "x", seconds=1)
    assert asked == [1, 1, 1, 1]  # never fewer than three windows
    assert slow.median == 2.0


def test_the_hosts_clock_goes_through_the_calls_in_turn():
    made = []
    taken = gpu_timing.HostClock().measure(
        [lambda: made.append(0), lambda: made.append(1)], seconds=1e-3
    )
    assert made[:4] == [0, 1, 0, 1]
    assert len(made) % 2 == 0
    assert taken.how == "host"
    low, high = taken.quartiles
    assert 0 < low <= taken.median <= high


def test_rates_of_this_machine_are_finite():
    cpu, clock = torch.device("cpu"), gpu_timing.HostClock()
    assert 0 < gpu_timing.copy_rate(clock, cpu, seconds=1e-3, size=2**16) < math.inf
    before = torch.get_float32_matmul_precision()
    assert 0 < gpu_timing.matrix_rate(clock, cpu, "tf32", seconds=1e-3, size=16) < math.inf
    assert torch.get_float32_matmul_precision() == before


class _Steps:
    """A clock that moves on by a second each time it is read."""

    def __init__(self):
        self.at = -1.0

    def __call__(self):
        self.at += 1
        return self.at


def test_a_failing_section_keeps_its_rows_and_lets_the_next_run(context):
    def broken(_):
        yield {"case": "a", "side": "x", "text": "1"}
        raise RuntimeError("the card fell off")

    def fine(_):
        yield {"case": "b", "side": "y", "text": "2"}

    saved = []
    results = gpu_runner.run_sections(
        [gpu_runner.Section("broken", 9, broken), gpu_runner.Section("fine", 9, fine)],
        context,
        budget=100,
        save=lambda so_far: saved.append(len(so_far)),
    )
    assert [row["side"] for result in results for row in result["rows"]] == ["x", "y"]
    assert "the card fell off" in results[0]["error"]
    assert results[1]["error"] is None
    assert saved == [1, 1, 2, 2]  # after each row, and after each section
    text = gpu_runner.table(results)
    assert "FAILED: RuntimeError: the card fell off" in text
    assert "y" in text


def test_sections_end_with_their_time_and_the_budget(context):
    def endless(_):
        while True:
            yield {"case": "a", "side": "x", "text": ""}

    sections = [gpu_runner.Section(name, 4, endless) for name in ("first", "second", "third")]
    results = gpu_runner.run_sections(sections, context, budget=9, now=_Steps())
    assert results[0]["cut"] == "stopped after 4 s"
    assert len(results[0]["rows"]) == 5
    assert results[1]["cut"].startswith("stopped after")
    assert results[2]["cut"] == "not started: the budget of 9 s was used up"
    assert "CUT: not started" in gpu_runner.table(results)


def test_record_and_table_of_a_measured_case(tmp_path):
    case = cases.knn(1, 10**6)
    ours = gpu_timing.Timing([1e-3, 1.1e-3, 0.9e-3], "graph", 10)
    theirs = gpu_timing.Timing([2e-3] * 3, "calls", 10)
    rows = [
        gpu_runner.measured(case, "gcfast", ours, RATES),
        gpu_runner.measured(case, "matmul + topk", theirs, RATES),
        gpu_runner.failed(case.name, "FAISS", ValueError("no such device")),
    ]
    assert rows[0]["share"] == pytest.approx(case.bytes / 1e12 / 1e-3)
    results = [{"section": "knn", "rows": rows, "error": None, "cut": None, "seconds": 3.0}]
    lines = gpu_runner.table(results).splitlines()
    assert lines[0] == "== knn (3 s)"
    assert "1.00 ms (graph)" in lines[2]
    assert "52% of the memory floor (predicted 70%)" in lines[2]
    assert "2.00 x gcfast" in lines[3]
    assert "failed: ValueError: no such device" in lines[4]

    path = gpu_runner.result_path(tmp_path / "new", "NVIDIA H200 141GB", "2030-01-02")
    assert path.name == "nvidia-h200-141gb-2030-01-02.json"
    gpu_runner.write(path, gpu_runner.record({"name": "x"}, RATES, results))
    read = json.loads(path.read_text())
    assert read["sections"][0]["rows"][0]["seconds"] == [1e-3, 1.1e-3, 0.9e-3]
    assert read["rates"] == RATES
    assert {"format", "date", "card", "conditions", "versions"} <= set(read)
    assert "commit" in read["conditions"]
    assert list(path.parent.iterdir()) == [path]  # nothing half written is left


def test_a_rate_that_the_card_has_not_leaves_the_floor_to_memory():
    case = cases.sample_triplets(64, 10**4)
    row = gpu_runner.measured(case, "x", gpu_timing.Timing([1.0], "graph", 1), {"copy": 1e12})
    assert row["bound"] == "memory"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "bench/gpu.py needs a CUDA device" in capsys.readouterr().err


def test_only_runs_what_is_named_and_the_rates():
    asked = gpu.arguments(["--only", "knn", "peers", "--quick"])
    assert asked.quick
    names = [s.name for s in gpu.chosen(asked.only)]
    assert names == ["rates", "knn", "peers", "knn, more"]
    assert [s.name for s in gpu.chosen(asked.only, quick=True)] == names[:3]
    assert [s.name for s in gpu.chosen(None)] == [s.name for s in gpu.SECTIONS]
    assert set(cases.CASES) < {s.name for s in gpu.SECTIONS}
    with pytest.raises(SystemExit):
        gpu.arguments(["--only", "nonsense"])


def test_a_side_without_room_is_named_and_not_run(context, monkeypatch):
    monkeypatch.setitem(cases.CASES, "knn", TINY["knn"][:1])
    context.memory_bytes = 2 * TINY["knn"][0].inputs
    rows = list(gpu_operations.run_operation("knn", context))
    (left,) = (row for row in rows if row["side"] == "matmul + topk")
    assert left["text"].startswith("left out: ")
    assert "GB beside the inputs" in left["text"]
    assert any(row["side"] == "gcfast" and row["median"] > 0 for row in rows)


def test_it_runs_the_tests_of_the_kernels_and_those_that_need_a_gpu(context, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda path, _: path.stem)
    run = list(gpu.tests(context))
    assert {"test_sparse_cam", "test_top_m_kernel", "test_knn", "test_graphs", "test_offload"} <= {
        *run
    }
    assert "test_build" not in run


def test_each_file_of_tests_says_how_it_ended(tmp_path):
    (tmp_path / "test_good.py").write_text("def test_it(): pass")
    (tmp_path / "test_bad.py").write_text("def test_it(): assert 1 == 2")
    (tmp_path / "test_slow.py").write_text("import time\ndef test_it(): time.sleep(60)")
    good = gpu.run_tests(tmp_path / "test_good.py", 60)
    assert good["returncode"] == 0
    assert good["text"].startswith("1 passed")
    bad = gpu.run_tests(tmp_path / "test_bad.py", 60)
    assert bad["returncode"] == 1
    assert bad["text"].startswith("FAILED: 1 failed")
    assert "assert 1 == 2" in bad["output"]
    # The working directory, where `gcfast` lacks its compiled module, is not on the path.
    (tmp_path / "test_path.py").write_text("import sys\ndef test_it(): assert sys.flags.safe_path")
    assert gpu.run_tests(tmp_path / "test_path.py", 60)["returncode"] == 0
    slow = gpu.run_tests(tmp_path / "test_slow.py", 1)
    assert slow["text"] == "FAILED: not done in 1 s"


SMALL = cases.Network("small", 12, 3, 4)
TINY = {
    "sparse_cam": [
        cases.sparse_cam(2, SMALL, M=3, layout="channels last"),
        cases.sparse_cam(2, SMALL, M=3, dtype="bfloat16", out="uint8"),
    ],
    "dense_cam": [
        cases.dense_cam(2, SMALL, dtype=dtype, layout="channels last")
        for dtype in ("float32", "bfloat16")
    ],
    "grad_weights": [
        cases.grad_weights(2, SMALL, T=3, method=method, layout=layout)
        for method in ("gradcam", "gradcam++")
        for layout in ("contiguous", "channels last")
    ],
    "head_grad_weights": [
        cases.head_grad_weights(2, T=3, D=5, C=7, method=method, precision="tf32")
        for method in ("gradcam", "gradcam++")
    ],
    "top_m": [cases.top_m(2, C=11, M=3)],
    "knn": [cases.knn(2, 50, D=5, K=2), cases.knn(2, 50, D=5, K=2, dtype="float16")],
    "sample_triplets": [cases.sample_triplets(2, 200, D=5, T=3)],
}


@pytest.mark.parametrize("operation", sorted(TINY))
def test_every_side_of_every_operation_agrees(operation, context, monkeypatch):
    monkeypatch.setitem(cases.CASES, operation, TINY[operation])
    monkeypatch.setattr(gpu_operations, "DATABASE_ROWS", 20)
    monkeypatch.setattr(gpu_operations, "CLASSES", 4)
    rows = list(gpu_operations.run_operation(operation, context))
    assert not [row for row in rows if "error" in row]
    sides = [row["side"] for row in rows]
    assert sides.count("gcfast") == len(TINY[operation])
    assert len(set(sides)) >= 2
    assert all(row["median"] > 0 for row in rows)


def test_a_side_that_disagrees_is_not_timed(context, monkeypatch):
    monkeypatch.setitem(cases.CASES, "top_m", TINY["top_m"])
    real = gpu_operations.OPERATIONS["top_m"]
    wrong = gpu_operations.Side(
        "wrong", lambda s: (None, s["weights"][:, : s["m"]].sort(descending=True).values)
    )
    monkeypatch.setitem(
        gpu_operations.OPERATIONS, "top_m", real._replace(sides=[*real.sides[:2], wrong])
    )
    rows = {row["side"]: row for row in gpu_operations.run_operation("top_m", context)}
    assert "differs from the reference" in rows["wrong"]["error"]
    assert "median" not in rows["wrong"]
    assert "median" in rows["gcfast"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 64, 16, stride=32), nn.ReLU())
        self.project = nn.Linear(64, subjects.EMBEDDING)

    def forward(self, images):
        return self.project(self.layer(images).mean((2, 3)))


@pytest.fixture
def small(monkeypatch, context):
    for name in (gpu_end_to_end.NAME, gpu_end_to_end.OTHER):
        monkeypatch.setitem(subjects.NETWORKS, name, (Small, "layer"))
    monkeypatch.setattr(gpu_end_to_end, "BATCHES", (2, 3, 4))
    monkeypatch.setattr(paired.gc, "collect", lambda: 0)  # 0.2 s beside all that pytest holds
    for module in (subjects, gpu_end_to_end):
        monkeypatch.setattr(module, "images", functools.partial(subjects.images, side=80))
    monkeypatch.setattr(gpu_end_to_end, "ROWS", (64, 96, 128))
    monkeypatch.setattr(gpu_end_to_end, "SIDE_SECONDS", 1e-6)
    monkeypatch.setattr(gpu_end_to_end, "ROUNDS", 2)
    monkeypatch.setattr(gpu_end_to_end, "BUILD_IMAGES", (16, 64))
    monkeypatch.setattr(gpu_end_to_end, "BUILD_DISTINCT", 32)
    monkeypatch.setattr(gpu_end_to_end, "BUILD_GOALS", {64: "<= 1.15"})
    monkeypatch.setattr(gpu_end_to_end, "BUILD_BATCH", 8)
    monkeypatch.setattr(gpu_end_to_end, "BUILD_CLASSES", 2)
    monkeypatch.setattr(
        gpu_end_to_end, "layer_module", lambda _, model, path: model.get_submodule(path)
    )
    context.quick = True
    return context


def test_explaining_is_timed_beside_the_forward_pass(small):
    small.quick = False
    rows = list(gpu_end_to_end.explain(small))
    assert not [row for row in rows if "error" in row]
    assert all(row["ratio"] > 0 for row in rows if "ratio" in row)
    for goal in ("<= 1.04", "<= 1.06"):
        timed = {row["case"] for row in rows if row.get("goal") == goal}
        both = {f"{n}, B {B}, bfloat16" for n in ("ResNet-50", "ViT-B/16") for B in (2, 3, 4)}
        assert both <= timed
    assert sum("rows against" in row["case"] and "ratio" in row for row in rows) == 2


def test_an_explainer_that_is_wrong_is_not_timed(small, monkeypatch):
    # Another row's weights for every image, by a search that is right.
    monkeypatch.setattr(
        ops.sparse_cam,
        "trusted",
        lambda *a, sparse_cam=ops.sparse_cam.trusted, **k: 1 - sparse_cam(*a, **k),
    )
    rows = list(gpu_end_to_end.explain(small))
    wrong = [row for row in rows if "error" in row and row["side"] == "explain_batch"]
    assert len(wrong) == 7  # three sizes in two precisions, and a larger table
    # Class proxies have maps of another operation.
    assert not [row for row in rows if "ratio" in row and "BEST" not in row["case"]]


def test_building_is_timed_beside_the_forward_pass(small):
    rows = list(gpu_end_to_end.build(small))
    assert not [row for row in rows if "error" in row]
    assert [row["goal"] for row in rows if "ratio" in row] == ["", "<= 1.15"]
    assert "times build's" in rows[-1]["text"]


def test_peers_that_are_not_installed_are_named(small, monkeypatch):
    monkeypatch.setattr(gpu_end_to_end, "importable", lambda _: False)
    rows = list(gpu_end_to_end.peers(small))
    assert [row["text"] for row in rows] == ["not installed"] * 3


@pytest.fixture
def many(small, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(gpu_transfer, "images", subjects.images)
    for name, value in {
        "ROWS": (300, 400),
        "LISTS": (4, 8),
        "CHUNK": 256,
        "BATCH": 4,
        "DISTINCT": 2,
        "BATCHES": 4,
    }.items():
        monkeypatch.setattr(gpu_transfer, name, value)
    return small


def test_a_stream_is_timed_beside_the_forward_pass(many):
    many.quick = False
    rows = list(gpu_transfer.transfer(many))
    assert not [row for row in rows if "error" in row]
    ratios = [row for row in rows if "ratio" in row]
    assert len(ratios) == 6  # three ways to search, two numbers of rows
    assert all(row["ratio"] > 0 and row["goal"] == "<= 1.05" for row in ratios)
    assert [
        row["recall"] for row in rows if row["case"].endswith("rows, Flat") and "recall" in row
    ] == [1, 1]
    assert sum(row["side"] == "search and gather of a batch" for row in rows) == 6
    many.quick = True
    assert {row["case"] for row in gpu_transfer.transfer(many)} == {
        row["case"] for row in rows if "300 rows" in row["case"]
    }


def test_an_index_of_other_rows_is_not_timed(many, monkeypatch):
    real = gpu_transfer.same_rows
    monkeypatch.setattr(
        gpu_transfer,
        "same_rows",
        lambda ours, exact, batch, **options: real(ours, other(exact), batch, **options),
    )

    def other(exact):
        exact.attach().transfer.search.table.neg_()
        return exact

    rows = list(gpu_transfer.transfer(many))
    assert len([row for row in rows if "error" in row]) == 2
    assert [row["case"].endswith("exact") for row in rows if "ratio" in row] == [True]
