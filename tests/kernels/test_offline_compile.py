"""Every kernel in every form that it can be launched in, compiled for GPUs that are not there."""

import functools
import importlib
from pathlib import Path

import pytest
from offline import SHARED_LIMIT_BYTES, TARGETS, compile_elsewhere, problems

import gcfast.kernels

FOLDER = Path(gcfast.kernels.__path__[0])
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "launch"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    return functools.cache(functools.partial(compile_elsewhere, cache=cache))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_within_the_limits(kernel, target, compiled):
    results = compiled(f"gcfast.kernels.{kernel}")
    assert any(r["target"] == target for r in results)
    assert not problems(results, target)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_listed_form_is_another(kernel):
    listed = list(importlib.import_module(f"gcfast.kernels.{kernel}").specialisations())
    assert len({repr(one[1:]) + one.kernel.__name__ for one in listed}) == len(listed)


def test_finds_what_does_not_fit(compiled):
    results = compiled("offline_samples", path=Path(__file__).parents[1])
    for target in TARGETS:
        found = problems(results, target)
        assert not any("_fine" in line for line in found)
        assert any("_broken" in line and "Error" in line for line in found)
        if target.startswith("sm_"):  # the sample asks for few registers, as only NVIDIA's can
            assert any("_spilling" in line and "spilled" in line for line in found), found


def test_finds_too_much_shared_memory():
    result = {"target": "sm_90", "name": "_kernel()", "error": None, "spills": 0}
    limit = SHARED_LIMIT_BYTES["sm_90"]
    assert not problems([{**result, "shared": limit}], "sm_90")
    assert problems([{**result, "shared": limit + 1}], "sm_90") == [
        f"_kernel(): {limit + 1} bytes of shared memory"
    ]
