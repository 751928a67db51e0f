"""bench/sweep_launch.py: what it varies, and that a variant gives the same result."""

import cases
import gpu_operations
import gpu_timing
import pytest
import sweep_launch
import torch
from test_gpu_bench import TINY

from gcfast.kernels.launch import GradWeightsConfig

FEW = {  # axes short enough for Triton's interpreter
    "sparse_cam": {"block_m": (1, 2)},
    "grad_weights": {"block_t": (1, 2), "splits": (1, 2)},
    "head_grad_weights": {"block_d": (16, 32)},
    "knn": {"block_n": (32,)},
}


@pytest.mark.parametrize("operation", sorted(FEW))
def test_variants_agree_and_are_ordered_by_time(operation, monkeypatch, device):
    monkeypatch.setattr(gpu_operations, "IMAGE", (6, 5))
    monkeypatch.setattr(gpu_operations, "DATABASE_ROWS", 20)
    monkeypatch.setattr(gpu_operations, "CLASSES", 4)
    case = TINY[operation][0]
    found = sweep_launch.sweep(
        case,
        gpu_timing.HostClock(),
        device,
        axes=FEW[operation],
        seconds=1e-6,
        l2_bytes=0,
        memory_bytes=2**30,
    )
    now, tried, failed, wrong = found
    assert (failed, wrong) == (0, [])
    assert len(tried) == len(set(sweep_launch.variants(now.config, FEW[operation], case)))
    assert [one.seconds for one in tried] == sorted(one.seconds for one in tried)
    text = sweep_launch.report(case, found)
    assert f"best is {tried[0].seconds / now.seconds:.2f} x now: {tried[0].config!r}" in text
    assert f"{len(tried)} variants timed, 0 could not be launched" in text


def test_axes_vary_only_what_a_configuration_has():
    case = cases.grad_weights(16, cases.RESNET50)
    run = GradWeightsConfig(40, 4, 4, 0, 0, 1, 8)
    axes = {"channels": (0.5, 1), "num_warps": (4, 8), "nonsense": (1, 2)}
    found = list(sweep_launch.variants(run, axes, case))
    assert [(c.channels, c.align, c.num_warps) for c in found] == [
        (20, 4, 4),
        (20, 4, 8),
        (40, 4, 4),
        (40, 4, 8),
    ]
    tile = run._replace(channels=0, align=1)
    assert list(sweep_launch.variants(tile, axes, case)) == [tile._replace(num_warps=4), tile]


def swept_over_block_t(device):
    return sweep_launch.sweep(
        TINY["grad_weights"][0],
        gpu_timing.HostClock(),
        device,
        axes={"block_t": (1, 4)},
        seconds=1e-6,
        l2_bytes=0,
        memory_bytes=2**30,
    )


def test_a_variant_with_another_result_is_named_and_not_timed(monkeypatch, device):
    real = sweep_launch.launch

    def wrong(operation, inputs, config):
        out = real(operation, inputs, config)
        return out + 1 if config is not None and config.block_t == 4 else out

    monkeypatch.setattr(sweep_launch, "launch", wrong)
    found = swept_over_block_t(device)
    assert [one.config.block_t for one in found.tried] == [1]
    assert [config.block_t for config in found.wrong] == [4]
    text = sweep_launch.report(TINY["grad_weights"][0], found)
    assert f"1 GAVE ANOTHER RESULT, the first {found.wrong[0]!r}" in text


def test_a_variant_without_room_is_counted(monkeypatch, device):
    real = sweep_launch.launch

    def small(operation, inputs, config):
        if config is not None and config.block_t == 4:
            raise RuntimeError("out of resources")
        return real(operation, inputs, config)

    monkeypatch.setattr(sweep_launch, "launch", small)
    found = swept_over_block_t(device)
    assert ([one.config.block_t for one in found.tried], found.failed) == ([1], 1)


def test_parts_compile_every_variant_once(monkeypatch, device):
    launched = []
    monkeypatch.setattr(sweep_launch, "launch", lambda *arguments: launched.append(arguments[2]))
    monkeypatch.setattr(
        sweep_launch, "present_choice", lambda *_: GradWeightsConfig(40, 4, 4, 0, 0, 1, 8)
    )
    case, axes = TINY["grad_weights"][0], sweep_launch.AXES["grad_weights"]
    for part in range(3):
        sweep_launch.compile_part(case, device, axes=axes, part=part, parts=3)
    assert len(launched) == len(set(launched))
    present = sweep_launch.present_choice()
    assert set(launched) == set(sweep_launch.variants(present, axes, case))


def test_every_operation_with_cases_has_axes():
    # Drawing triplets is several kernels, each with blocks of its own.
    assert set(sweep_launch.AXES) == set(cases.CASES) - {"sample_triplets"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep_launch.main([]) == 2
    assert "bench/sweep_launch.py needs a CUDA device" in capsys.readouterr().err
