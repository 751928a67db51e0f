"""`gcfast doctor`: every check runs, and one that fails is an exit status."""

import json
import warnings
from importlib.metadata import version

import pytest
import torch
from cli_case import run

from gcfast.cli.doctor import checks


def checks_of(*names):
    return {name: checks.CHECKS[name] for name in names}


def test_versions_devices_and_checks(capsys, monkeypatch):
    # The others take seconds: test_every_check runs them.
    monkeypatch.setattr(checks, "CHECKS", checks_of("compiled module", "FAISS"))
    status, out, err = run(capsys, "doctor")
    assert (status, err) == (0, "")
    assert f"\ntorch              {version('torch')}\n" in out
    assert "\ncpu " in out
    assert "\ncompiled module    ok " in out
    status, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert set(facts) == {"versions", "devices", "checks"}
    assert [one["name"] for one in facts["checks"]] == ["compiled module", "FAISS"]
    assert facts["devices"][0]["device"] == "cpu"


def test_a_wrong_map_and_a_broken_library_fail(capsys, monkeypatch):
    explain = checks.gcfast.Explainer.explain_batch

    def wrong(self, images, **options):
        found = explain(self, images, **options)
        found.maps.mul_(0.9)
        return found

    def broken():
        raise OSError("libfaiss.so: cannot open shared object file\nmore lines")

    chosen = checks_of("compiled module", "build and explain") | {"FAISS": broken}
    monkeypatch.setattr(checks, "CHECKS", chosen)
    monkeypatch.setattr(checks.gcfast.Explainer, "explain_batch", wrong)
    status, out, err = run(capsys, "doctor")
    assert status == 2
    assert err == "gcfast: 2 of 3 checks failed: build and explain, FAISS\n"
    lines = {line[:18].strip(): line[19:] for line in out.splitlines()}
    assert lines["compiled module"].startswith("ok")
    assert "ArithmeticError: maps differ from the reference by" in lines["build and explain"]
    assert "OSError: libfaiss.so: cannot open shared object file" in lines["FAISS"]
    assert "more lines" not in out


def test_a_gpu_that_cuda_cannot_use(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore lines")

    monkeypatch.setattr(checks, "CHECKS", checks_of("compiled module", "kernels", "CUDA graphs"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("init", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, broken)
    status, out, err = run(capsys, "doctor")
    assert status == 2
    assert "cuda:0             cannot be used: RuntimeError: The NVIDIA driver on" in out
    assert out.count("failed    0.0 s  RuntimeError: The NVIDIA driver on your system is too") == 2
    assert err == "gcfast: 2 of 3 checks failed: kernels, CUDA graphs\n"


def test_a_model_that_runs_without_its_graph(capsys, monkeypatch):
    class Plain:
        def explain_batch(self, images):
            if self.graphs:
                warnings.warn("the model cannot be captured", RuntimeWarning, stacklevel=2)
            return torch.zeros(len(images), 8, 8)

    def explainer(_, *, cuda_graphs):
        plain = Plain()
        plain.graphs = cuda_graphs
        return plain

    monkeypatch.setattr(checks, "CHECKS", checks_of("CUDA graphs"))
    monkeypatch.setattr(checks, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(checks, "_explainer", explainer)
    status, out, _ = run(capsys, "doctor")
    assert status == 2
    assert "RuntimeWarning: the model cannot be captured" in out


def test_what_was_found_is_told_at_once(monkeypatch, capsys):
    said = []

    def first():
        return "works", {}

    def second():
        said.append(capsys.readouterr().out)
        return "works too", {}

    monkeypatch.setattr(checks, "CHECKS", {"first": first, "second": second})
    assert run(capsys, "doctor")[0] == 0
    assert "first              ok        0.0 s  works\n" in said[0]


def test_what_is_not_installed_is_no_failure(capsys, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", checks_of("FAISS", "ONNX"))
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert out.count(" absent ") == 2
    assert "pip install 'gcfast[onnx]'" in out


@pytest.mark.slow
def test_every_check(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = {one["name"]: one for one in json.loads(out)["checks"]}
    assert list(found) == list(checks.CHECKS)
    gpu = torch.cuda.is_available()
    for name, one in found.items():
        wanted = "absent" if name in ("kernels", "CUDA graphs") and not gpu else "ok"
        assert one["status"] == wanted, one
    assert found["build and explain"]["figures"]["map_difference_cpu"] < 1e-5
    assert found["speed"]["figures"]["explain_to_forward"] > 0
