"""How long bench/gpu.py should take, from what each case must move and compute; needs no GPU.

Every time here is a guess to plan a run by, and none is a measurement: the floors of the cases at
SHARE of an H100's rates (NVIDIA's data sheet of the SXM5 card, dense), and for what is no floor
(compiling, the tests, loading the networks) the seconds below.
"""

from __future__ import annotations

from cases import CASES, SIDE_SECONDS, Case, copies, selected
from gpu import MORE, SECTIONS
from gpu_end_to_end import BATCHES, BUILD_BATCH, BUILD_IMAGES, ROUNDS, ROWS, TURN_SECONDS
from gpu_operations import FAISS_BYTES, OPERATIONS, Side, no_room

SHARE = 0.3
COPY = 3.35e12  # bytes a second
RATES = {"float32": 67e12, "tf32": 495e12, "bfloat16": 990e12, "float16": 990e12, "float64": 34e12}
L2_BYTES = 50 * 2**20
# Seconds to compile one form of a kernel, and one function by torch.compile.
KERNEL, INDUCTOR = 2.0, 15.0
HOST_OPERATIONS = 8e9  # a second, of the C++ twin on all cores of such a machine's host
HOST_COPY = 2e9  # bytes a second between pageable memory and the card
# Times the floor that a side takes, by how its name begins; ours is near it, eager PyTorch is not.
SLOWER = {"gcfast": 1.0, "reference": 4.0, "matmul": 4.0, "FAISS": 2.0}
# Operations of a forward pass on one image, a multiply-add as two: He et al. 2015 and Dosovitskiy
# et al. 2020 give 4.1 and 17.6 billion multiply-adds.
RESNET50, VIT_B16 = 8.2e9, 35.2e9
NETWORK = 5.0  # to make a network, build its small database and bring it over
RATES_SECONDS, TESTS_SECONDS, PEERS_SECONDS = 10.0, 120.0, 30.0


def floor(case: Case) -> float:
    """Seconds of a call at SHARE of the card."""
    return case.floor_seconds(SHARE * COPY, SHARE * RATES[case.rate])


def side_seconds(case: Case, side: Side, sets: int) -> float:
    """To check one side against the reference, compile it and time it."""
    if side.name == "C++ on the CPU":
        call, sets = case.flops / HOST_OPERATIONS, 1
    else:
        slower = next((v for k, v in SLOWER.items() if side.name.startswith(k)), 2.0)
        call = slower * floor(case)
    compiles = INDUCTOR if "torch.compile" in side.name else 0.0
    moved = 2 * sets * case.inputs / HOST_COPY if "FAISS" in side.name else 0.0
    # One call to check, two and one of every set to warm up, one round more, and the windows.
    return compiles + moved + call * (3 + 2 * sets) + max(SIDE_SECONDS, 3 * sets * call)


def case_seconds(case: Case, memory_bytes: int) -> tuple[float, list[str]]:
    """(everything of a case but the compiling of its kernel, what is left out and why)."""
    sets = copies(case, L2_BYTES, memory_bytes)
    left = []
    # Drawn and normalised: about four passes over them.
    total = 4 * sets * case.inputs / (SHARE * COPY) + SLOWER["reference"] * floor(case)
    for side in OPERATIONS[case.operation].sides:
        if not _runs(case, side):
            continue
        reason = no_room(case, side, sets, memory_bytes)
        if reason:
            left.append(f"{case.name}: {side.name}: {reason}")
        else:
            total += side_seconds(case, side, sets)
    return total, left


def _runs(case: Case, side: Side) -> bool:
    """Whether a side is for this case; FAISS taken to be there, which this machine may not have."""
    if "FAISS" in side.name:
        return case.dtype == "float32" and case.inputs <= FAISS_BYTES
    return side.when(case)


def form(case: Case) -> tuple[object, ...]:
    """Cases with the same of these share their compiled kernels."""
    letters = {k: v for k, v in case.sizes.items() if k in "CHWKM"}
    size = min((n for n in (2, 16, 10**9) if case.sizes["B"] <= n), default=0)
    return (case.operation, case.dtype, size, *letters.items(), *case.options.values())


def operation_seconds(
    name: str, *, quick: bool, memory_bytes: int, compiled: set[tuple[object, ...]]
) -> tuple[float, int, list[str]]:
    """(seconds, cases, what is left out) of an operation's quick cases, or of its others."""
    run, left = selected(name, quick=quick, memory_bytes=memory_bytes)
    total = 0.0
    for case in run:
        if form(case) not in compiled:
            compiled.add(form(case))
            total += KERNEL
        taken, missing = case_seconds(case, memory_bytes)
        total += taken
        left = left + missing
    return total, len(run), left


def explain_seconds(quick: bool) -> float:
    """Of the pairs of explain_batch and the forward pass."""

    def pair(B: int, operations: float, rate: str) -> float:
        call = max(2e-3, B * operations / (SHARE * RATES[rate]))
        return (6 + 2 * ROUNDS) * max(TURN_SECONDS, call)

    batches = BATCHES[:1] if quick else BATCHES[:2]
    total = 2 * NETWORK + 8 * SIDE_SECONDS + len(ROWS) * (NETWORK + pair(16, RESNET50, "bfloat16"))
    # cuDNN's convolutions take float32 for TF32 unless told otherwise.
    total += sum(2 * pair(B, RESNET50, rate) for B in batches for rate in ("tf32", "bfloat16"))
    if not quick:
        total += 2 * pair(BATCHES[-1], RESNET50, "bfloat16") + NETWORK
        total += sum(2 * pair(B, VIT_B16, "bfloat16") for B in BATCHES)
    return total


def build_seconds(quick: bool) -> float:
    """Of both methods, three turns and a warm-up each, and the paper's loop."""
    count = BUILD_IMAGES // 4 if quick else BUILD_IMAGES
    images = count * 3 * 224 * 224 * 4 / HOST_COPY
    once = images + count * RESNET50 / (SHARE * RATES["tf32"]) + count / BUILD_BATCH * 0.02
    return NETWORK + 2 * 2 * 8 * once + 4 * 5.0


def plan(names: list[str], *, quick: bool, memory_bytes: int, budget: float) -> str:
    """The sections in order with their estimates, and what a card has no room for."""
    whole = {
        "rates": RATES_SECONDS,
        "tests": TESTS_SECONDS,
        "peers": PEERS_SECONDS,
        "explain": explain_seconds(quick),
        "build": build_seconds(quick),
    }
    caps = {section.name: section.seconds for section in SECTIONS}
    compiled: set[tuple[object, ...]] = set()
    lines, left, total = [], [], 0.0
    for name in names:
        operation, what = name.removesuffix(MORE), ""
        if operation in CASES:
            taken, count, missing = operation_seconds(
                operation,
                quick=not name.endswith(MORE),
                memory_bytes=memory_bytes,
                compiled=compiled,
            )
            what = f"{count} cases"
            left += missing
        else:
            taken = whole[name]
        if taken > caps[name]:
            what = f"{what}, cut at {caps[name]:.0f} s".removeprefix(", ")
        total += min(taken, caps[name])
        over = " (not started)" if total - min(taken, caps[name]) > budget else ""
        lines.append(f"{name:25} {taken:6.0f} s  {what}{over}".rstrip())
    lines.append(f"{'estimated':25} {total:6.0f} s  of a budget of {budget:.0f} s")
    lines += [f"left out: {reason}" for reason in left]
    return "\n".join(lines)
