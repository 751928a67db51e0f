"""What the GPU benchmarks run: shapes by name, and the least that each must move or compute.

A byte model counts what any implementation has to read and write once, at the sizes of the case: it
is the floor that a time is compared with, not what a kernel happens to move. ``expected`` is what
was predicted for the kernel before it was ever timed, as a share of the floor's speed, with why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

BATCHES = (1, 16, 256, 1024)
IMAGE = (224, 224)
RATES = ("float32", "tf32", "bfloat16", "float16", "float64")  # of products, measured in each run
KEPT, TRIPLETS = 50, 50
SIDE_SECONDS = 0.1  # that one side of one case is timed for
DIMENSIONS = (128, 512)  # D
TABLES = (10**4, 10**5, 10**6, 10**7)  # N
SECTOR_BYTES = 32  # the least that is read of memory at a time
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


@dataclass(frozen=True)
class Network:
    """The feature map that a network's last layer gives."""

    name: str
    C: int
    H: int
    W: int

    @property
    def pixels(self) -> int:
        return self.H * self.W


RESNET50 = Network("ResNet-50", 2048, 7, 7)
VIT_B16 = Network("ViT-B/16", 768, 14, 14)
NETWORKS = (RESNET50, VIT_B16)


@dataclass(frozen=True)
class Case:
    """One benchmark: an operation at a shape."""

    operation: str
    sizes: dict[str, int]
    dtype: str
    bytes: int  # least that must cross the memory bus
    flops: int  # least arithmetic, a multiply-add as two
    inputs: int  # bytes that one set of inputs takes
    rate: str  # of RATES, which bounds the arithmetic
    expected: float  # share of the floor's speed, predicted
    because: str
    options: dict[str, str] = field(default_factory=dict, hash=False)
    quick: bool = False  # also run with --quick

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.sizes.items())
        return ", ".join([sizes, self.dtype, *self.options.values()])

    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def floor_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time on a card with these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

    def bound(self, bytes_per_second: float, flops_per_second: float) -> str:
        """Which of the two rates sets the floor."""
        by_memory = self.bytes / bytes_per_second >= self.flops / flops_per_second
        return "memory" if by_memory else "arithmetic"


def sparse_cam(
    B: int,
    network: Network,
    *,
    M: int = KEPT,
    dtype: str = "float32",
    out: str = "float32",
    layout: str = "contiguous",
) -> Case:
    """Kept channels, ids and weights of each image read, its map written.

    Channels-last, a pixel's kept channels lie in sectors of 32 bytes, which are read whole: those
    that M channels anywhere among C reach on average.
    """
    OH, OW = IMAGE
    itemsize = ITEMSIZE[dtype]
    pixel = M * itemsize
    if layout == "channels last":
        sectors = network.C * itemsize / SECTOR_BYTES
        pixel = round(SECTOR_BYTES * sectors * (1 - (1 - 1 / sectors) ** M))
    rows = B * (8 + M * (8 + 4))  # neighbour id; channel ids and weights of its row
    return Case(
        "sparse_cam",
        {"B": B, "C": network.C, "H": network.H, "W": network.W, "M": M, "OH": OH, "OW": OW},
        dtype,
        bytes=B * network.pixels * pixel + rows + B * OH * OW * ITEMSIZE[out],
        flops=2 * B * M * network.pixels + 8 * B * OH * OW,
        inputs=B * network.C * network.pixels * itemsize,
        rate="float32",
        expected=0.8 if B >= 256 else 0.3 if B >= 16 else 0.02,
        because="writes dominate and are coalesced; below 256 maps the launch costs more than they",
        options={"out": f"maps {out}", "layout": layout},
        quick=B == 256 and network is RESNET50,
    )


def dense_cam(
    B: int, network: Network, *, dtype: str = "float32", layout: str = "contiguous"
) -> Case:
    """All activations and a weight for each channel read, the maps written."""
    OH, OW = IMAGE
    activations = B * network.C * network.pixels * ITEMSIZE[dtype]
    return Case(
        "dense_cam",
        {"B": B, "C": network.C, "H": network.H, "W": network.W, "OH": OH, "OW": OW},
        dtype,
        bytes=activations + 4 * B * network.C + 4 * B * OH * OW,
        flops=2 * B * network.C * network.pixels + 8 * B * OH * OW,
        inputs=activations,
        rate="float32",
        expected=0.6 if B >= 256 else 0.2 if B >= 16 else 0.02,
        because="two launches, of which each reads or writes in whole vectors; not measured yet",
        options={"layout": layout},
        quick=B == 256 and network is RESNET50,
    )


def grad_weights(
    B: int,
    network: Network,
    *,
    T: int = TRIPLETS,
    dtype: str = "float32",
    method: str = "gradcam",
    layout: str = "contiguous",
) -> Case:
    """The gradients once, the activations once for Grad-CAM++, [B, C] written."""
    plus = method == "gradcam++"
    gradients = B * T * network.C * network.pixels * ITEMSIZE[dtype]
    maps = B * network.C * network.pixels * ITEMSIZE[dtype] if plus else 0
    return Case(
        "grad_weights",
        {"B": B, "T": T, "C": network.C, "H": network.H, "W": network.W},
        dtype,
        bytes=gradients + maps + B * T + B * network.C * 4,
        flops=(5 if plus else 1) * B * T * network.C * network.pixels,
        inputs=gradients + maps,
        rate="float32",
        expected=0.85 if B >= 16 else 0.6,
        because="one read in 16-byte vectors; one image's 10 to 20 MB end before the bus is full",
        options={"method": method, "layout": layout},
        quick=B == 16 and network is RESNET50 and dtype == "float32",
    )


def head_grad_weights(
    B: int,
    *,
    T: int = TRIPLETS,
    D: int = 128,
    C: int = 2048,
    method: str = "gradcam",
    precision: str = "ieee",
) -> Case:
    """Cotangents and W once, [B, C] written; Grad-CAM multiplies means, Grad-CAM++ each triplet."""
    plus = method == "gradcam++"
    moved = B * T * (4 * D + 1) + 4 * D * C + 4 * B * (D + 1) + (8 if plus else 4) * B * C
    return Case(
        "head_grad_weights",
        {"B": B, "T": T, "D": D, "C": C},
        "float32",
        bytes=moved,
        flops=2 * B * D * C * (T if plus else 1),
        inputs=4 * B * T * D,
        rate="tf32" if precision == "tf32" else "float32",
        expected=0.4 if plus else 0.3,
        because="float32 products without tensor cores" if plus else "two short launches",
        options={"method": method, "precision": precision},
        quick=B == 256 and D == 128 and C == RESNET50.C,
    )


def top_m(B: int, *, C: int = 2048, M: int = KEPT) -> Case:
    """[B, C] once, ids and weights written."""
    return Case(
        "top_m",
        {"B": B, "C": C, "M": M},
        "float32",
        bytes=4 * B * C + 12 * B * M,
        flops=0,
        inputs=4 * B * C,
        rate="float32",
        expected=0.2 if B >= 256 else 0.01,
        because="sorting in registers costs more than the read",
        quick=B == 1024 and C == RESNET50.C,
    )


def knn(B: int, N: int, *, D: int = 128, K: int = 1, dtype: str = "float32") -> Case:
    """The table and its squares once, whatever B; and the whole product."""
    table = N * D * ITEMSIZE[dtype]
    return Case(
        "knn",
        {"B": B, "N": N, "D": D, "K": K},
        dtype,
        bytes=table + 4 * N + B * D * ITEMSIZE[dtype] + 12 * B * K,
        flops=2 * B * N * D,
        inputs=table,
        rate=dtype,
        expected=0.7 if B == 1 and N >= 10**6 else 0.4,
        because="one read of the table" if B <= 16 else "the product, kept out of memory",
        quick=(B, N, D, K) in {(1, 10**6, 128, 1), (256, 10**5, 128, 1)},
    )


def sample_triplets(B: int, N: int, *, D: int = 128, T: int = TRIPLETS) -> Case:
    """The table and its labels once; a subtraction, a product and a sum in float64 a number."""
    return Case(
        "sample_triplets",
        {"B": B, "N": N, "D": D, "T": T},
        "float32",
        bytes=N * (4 * D + 8) + B * (4 * D + 16) + B * (17 * T + 24),
        flops=3 * B * N * D,
        inputs=4 * N * D,
        rate="float64",
        expected=0.3,
        because="bound by float64 arithmetic, which the floor takes at the card's float64 rate",
        quick=B == 64 and N == 10**5 and D == 128,
    )


def _sparse_cam_cases() -> list[Case]:
    layouts = ("contiguous", "channels last")
    cases = [
        sparse_cam(B, network, layout=layout)
        for network in NETWORKS
        for B in BATCHES
        for layout in layouts
    ]
    cases += [
        sparse_cam(256, network, dtype="bfloat16", out=out, layout=layout)
        for network in NETWORKS
        for out in ("float32", "uint8")
        for layout in layouts
    ]
    return cases


def _dense_cam_cases() -> list[Case]:
    return [
        dense_cam(B, network, dtype=dtype, layout=layout)
        for network in NETWORKS
        for B in BATCHES
        for layout in ("contiguous", "channels last")
        for dtype in ("float32", "bfloat16")
    ]


def _grad_weights_cases() -> list[Case]:
    cases = [grad_weights(B, network) for network in NETWORKS for B in BATCHES]
    cases += [
        grad_weights(16, network, dtype=dtype, method=method, layout=layout)
        for network in NETWORKS
        for dtype in ("float32", "bfloat16")
        for method in ("gradcam", "gradcam++")
        for layout in ("contiguous", "channels last")
    ]
    cases.append(grad_weights(256, RESNET50, T=1, method="gradcam++"))
    return cases


def _distinct(cases: Sequence[Case]) -> list[Case]:
    return list({case.name: case for case in cases}.values())


def _head_grad_weights_cases() -> list[Case]:
    cases = [
        head_grad_weights(B, D=D, method=method)
        for method in ("gradcam", "gradcam++")
        for D in DIMENSIONS
        for B in BATCHES
    ]
    cases += [head_grad_weights(256, method=m, precision="tf32") for m in ("gradcam", "gradcam++")]
    # The rows of a build are made 64 at a time.
    cases += [head_grad_weights(64, method=m) for m in ("gradcam", "gradcam++")]
    cases.append(head_grad_weights(256, D=512, C=VIT_B16.C))
    return cases


def _knn_cases() -> list[Case]:
    cases = [knn(B, N, D=D) for N in TABLES for D in DIMENSIONS for B in BATCHES]
    cases += [knn(16, N, K=32) for N in (10**5, 10**6)]
    cases += [knn(B, 10**6, D=D, dtype="float16") for D in DIMENSIONS for B in (1, 256)]
    return cases


def _quick_first(cases: Sequence[Case]) -> list[Case]:
    """What the goals are about first, then from the cheapest on, in case the time runs out."""
    return sorted(_distinct(cases), key=lambda case: (not case.quick, case.inputs, case.flops))


CASES: dict[str, list[Case]] = {
    "sparse_cam": _quick_first(_sparse_cam_cases()),
    "dense_cam": _quick_first(_dense_cam_cases()),
    "grad_weights": _quick_first(_grad_weights_cases()),
    "head_grad_weights": _quick_first(_head_grad_weights_cases()),
    "top_m": _quick_first([top_m(B, C=network.C) for network in NETWORKS for B in BATCHES]),
    "knn": _quick_first(_knn_cases()),
    "sample_triplets": _quick_first(
        [sample_triplets(64, N) for N in TABLES[:3]]
        + [sample_triplets(B, 10**5, D=512) for B in (16, 64)]
    ),
}


def selected(
    operation: str, *, quick: bool | None, memory_bytes: int
) -> tuple[list[Case], list[str]]:
    """(cases to run, why each other one does not fit).

    Args:
        operation: whose cases.
        quick: only those marked so, only the others, or (None) all.
        memory_bytes: of the card; a case may fill half of it with inputs.
    """
    run, left = [], []
    for case in CASES[operation]:
        if quick is not None and case.quick != quick:
            continue
        if case.inputs > memory_bytes // 2:
            left.append(
                f"{case.name}: {case.inputs / 1e9:.1f} GB of inputs, half of the card's "
                f"{memory_bytes / 1e9:.1f} GB at most"
            )
        else:
            run.append(case)
    return run, left


def copies(case: Case, l2_bytes: int, memory_bytes: int, *, most: int = 512) -> int:
    """Sets of inputs to rotate through, so that what a call moves is in no L2 cache of that size.

    What counts is the bytes that a call must move, of which a sparse one moves far fewer than its
    inputs have; the smallest calls reach ``most`` first and stay in the cache.
    """
    wanted = 1 + 2 * l2_bytes // case.bytes
    room = memory_bytes // 2 // max(case.inputs, 1)
    return max(1, min(most, wanted, room))
