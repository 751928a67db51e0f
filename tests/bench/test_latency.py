"""Two commits compared by their benchmarks."""

import subprocess
import sys

import latency
import pytest


def test_ratios_are_medians_over_the_rounds():
    base = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0, "gone": 1.0}]
    head = [{"a": 1.2, "b": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 9.0, "new": 1.0}]
    assert latency.ratios(base, head) == {"a": 1.2, "b": 1.0}


def test_controls_do_not_fail():
    found = {
        "bench_top_m.py::test_strongest[768-gcfast]": 1.2,
        "bench_top_m.py::test_strongest[2048-gcfast]": 1.1,
        "bench_top_m.py::test_strongest[768-torch.topk]": 1.5,
        "bench_transfer.py::test_search_and_gather[IVF64,Flat-32-FAISS + NumPy]": 1.5,
    }
    assert latency.slower(found, 1.10) == ["bench_top_m.py::test_strongest[768-gcfast]"]


def test_every_baseline_of_the_suites_is_a_control():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    files = sorted(str(path) for path in (latency.ROOT / "bench").glob("bench_*.py"))
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=latency.ROOT)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    ours = [name for name in names if not latency.is_control(name)]
    assert len(ours) >= len(names) // 2 > 0
    for control in latency.CONTROLS:
        assert any(control in name for name in names)


@pytest.mark.slow
def test_the_slower_commit_is_named(tmp_path, capsys):
    """A commit against itself with a limit that everything exceeds."""
    pytest.importorskip("scikit_build_core")
    record = tmp_path / "times.json"
    arguments = ["HEAD", "--rounds", "1", "--limit", "0.01", "--select", "top_m"]
    assert latency.main([*arguments, "--json", str(record)]) == 1
    told = capsys.readouterr()
    assert "(control) bench/bench_top_m.py::test_strongest[768-torch.topk]" in told.out
    assert "slower by more than -99%: bench/bench_top_m.py::test_strongest[768-gcfast]" in told.err
    assert record.exists()
