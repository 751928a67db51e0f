"""Launches that ask for every form of every kernel, for the tests that compile them offline.

Sizes are chosen for what Triton makes other code of: an integer that is 1, that 16 divides, or that
needs 64 bits. They are those that the networks of the README have, and the least and largest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from gcfast.kernels.dense_cam import launch_dense_cam
from gcfast.kernels.grad_weights import launch_grad_weights
from gcfast.kernels.head_grad_weights import launch_head_grad_weights
from gcfast.kernels.knn import launch_knn
from gcfast.kernels.launch import near_config
from gcfast.kernels.refine import launch_refine
from gcfast.kernels.sample_triplets import picked
from gcfast.kernels.sparse_cam import launch_sparse_cam
from gcfast.kernels.top_m import launch_top_m
from gcfast.kernels.triplets.near_rows import NearRows, exact_distances
from gcfast.kernels.triplets.scan import Group
from gcfast.kernels.triplets.thresholds import threshold_steps
from gcfast.kernels.triplets.tries import label_ranges, try_pairs

FAR = 2**31  # elements, a stride that needs 64 bits
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def launches(kernel: str) -> None:
    """Make the launches of a file of kernels, and those of the kernels that it builds on."""
    LAUNCHES[kernel]()


def _channels_last(B: int, C: int, H: int, W: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(B, C, H, W, dtype=dtype).to(memory_format=torch.channels_last)


def _grad_weights() -> None:
    def launch(gradients: Tensor, method: str) -> None:
        B, T, C, H, W = gradients.shape
        activations = torch.empty(B, C, H, W, dtype=gradients.dtype)
        if gradients.dtype == torch.bfloat16:
            activations = activations.to(memory_format=torch.channels_last)
        valid = torch.empty(B, T, dtype=torch.bool)
        launch_grad_weights(gradients, valid, activations=activations, method=method)

    for C in (2047, 2048):
        launch(torch.empty(64, 50, C, 7, 7), "gradcam")
    # One image alone: T is split between programs.
    launch(torch.empty(1, 50, 2047, 7, 7), "gradcam++")
    launch(torch.empty(1, 50, 2048, 7, 7, dtype=torch.bfloat16), "gradcam++")
    for B, method in ((64, "gradcam"), (1, "gradcam++")):
        last = torch.empty(B, 50, 7, 7, 2048).permute(0, 1, 4, 2, 3)
        launch(last, method)
    launch(torch.empty(1, 50, 2047, 112, 112, dtype=torch.bfloat16), "gradcam++")
    # The longest run, one triplet, strides beyond 2^31 elements; and rows with gaps between them.
    launch(torch.empty_strided((4, 1, 2047, 27, 19), (FAR, FAR, 513, 19, 1)), "gradcam++")
    far = (FAR, FAR, FAR, FAR + 1, 3)
    launch(torch.empty_strided((1, 50, 2047, 112, 111), far), "gradcam++")


def _head_grad_weights() -> None:
    def launch(
        B: int, T: int, method: str, *, dtype: torch.dtype = torch.float32,
        C: int = 2048, D: int = 128, pixels: int = 49, precision: str = "ieee", stride: int = 0,
    ) -> None:  # fmt: skip
        cotangents = torch.empty(B, T, D, dtype=dtype)
        if stride:
            cotangents = torch.empty_strided((B, T, D), (stride, stride, stride), dtype=dtype)
        launch_head_grad_weights(
            cotangents,
            torch.empty(D, C),
            torch.empty(B, T, dtype=torch.bool),
            pixels=pixels,
            embeddings=torch.empty(B, D, dtype=dtype),
            norms=torch.empty(B, dtype=dtype),
            activation_sums=torch.empty(B, C, dtype=dtype) if method == "gradcam++" else None,
            method=method,
            precision=precision,
        )

    for precision in ("ieee", "tf32"):
        for B in (16, 1024):  # each size of tile
            launch(B, 50, "gradcam", precision=precision)
        for B, T in ((16, 16), (2, 50), (64, 50)):
            launch(B, T, "gradcam++", precision=precision)
        launch(64, 50, "gradcam++", dtype=torch.float16, precision=precision)
        launch(64, 50, "gradcam++", C=2047, D=129, pixels=1, precision=precision)
        for method in ("gradcam", "gradcam++"):
            launch(1023, 50, method, precision=precision, C=2047, D=129, stride=FAR)
    launch(64, 1, "gradcam", D=2048)


def _knn() -> None:
    # Each choice of blocks with each dtype of table; D that 16 divides and that it does not, of one
    # block and of many, with and without a rest.
    for B in (1, 17, 65, 129):
        for D, dtype, metric in (
            (128, torch.float32, "l2"),
            (129, torch.float32, "ip"),
            (100, torch.float16, "l2"),
            (512, torch.bfloat16, "l2"),
            (5, torch.float32, "l2"),
        ):
            queries = torch.empty(B, D, dtype=dtype)
            launch_knn(queries, torch.empty(10**6, D, dtype=dtype), 1, metric=metric)
    for N, K, metric in itertools.product((10**3, 10**6), (1, 3, 32), ("l2", "ip")):
        launch_knn(torch.empty(17, 129), torch.empty(N, 129), K, metric=metric)
    # Small tables, and strides of queries that need 64 bits.
    launch_knn(torch.empty(1, 128), torch.empty(10**4, 128), 1)
    queries = torch.empty_strided((17, 16), (FAR, 2))
    launch_knn(queries, torch.empty_strided((10**6, 16), (2**20, 3)), 3)


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _tries() -> None:
    for N, D, number in ((100, 5, 0), (10**5, 128, 0), (10**5 + 1, 33, 2**40)):
        anchors, table = torch.empty(64, D), torch.empty(N, D)
        with torch.cuda.device_of(table):
            ranges = label_ranges(_ids(64), _ids(64), _ids(N), _ids(N))
            margin = torch.empty(1, dtype=torch.float64)
            try_pairs(
                anchors, _ids(64), ranges, table, _ids(N), triplets=50, margin=margin, seed=number,
                tries=N // 16,
            )  # fmt: skip


def _near_rows() -> None:
    for N, D in ((100, 5), (10**5, 128), (10**5 + 1, 33)):
        anchors, table = torch.empty(64, D), torch.empty(N, D)
        near = NearRows(table, _ids(N), near_config(132))
        with torch.cuda.device_of(table):
            ids, _ = near.negatives(anchors, _ids(64), torch.empty(64, dtype=torch.float64), 4096)
            exact_distances(ids, anchors, table)
            exact_distances(_ids(64, 1000), anchors, table)


def _thresholds() -> None:
    for N, D in ((100, 5), (10**5, 128), (10**5 + 1, 33)):
        anchors, table = torch.empty(64, D), torch.empty(N, D)
        with torch.cuda.device_of(table):
            threshold_steps(
                anchors, _ids(64), table, _ids(N), torch.empty(64, 1000, dtype=torch.float64)
            )


def _sample_triplets() -> None:
    steps = torch.empty(64, 10**5, dtype=torch.int32)
    for negatives in (steps, None):
        group = Group(
            _ids(64), _ids(64, 1000), _ids(64, 1000), negatives, steps, _ids(64, 1001), _ids(64, 2)
        )
        with torch.cuda.device_of(steps):
            for first in (None, 2**40):
                picked(group, _ids(64), 50, 2**40, first)


def _dense_cam() -> None:
    full = (224, 224)
    for B in (1, 256):  # many slices and one or two
        launch_dense_cam(torch.empty(B, 2048, 7, 7), torch.empty(B, 2048), size=full)
    for side, dtype in itertools.product((7, 14, 28), FLOATS):
        maps = _channels_last(16, 2048, side, side, dtype)
        launch_dense_cam(maps, torch.empty(16, 2048), size=full)
    tokens = torch.empty(16, 197, 768, dtype=torch.bfloat16)[:, 1:]
    launch_dense_cam(tokens, torch.empty(16, 768), size=full, grid=(14, 14))
    # Odd sizes, maps of both kinds, rows apart; everything that can be 1; far strides.
    for side, size in itertools.product((7, 13, 65), ((225, 225), (63, 63), (20, 225))):
        plain = torch.empty(3, 2047, side, side)
        weights = torch.empty(3, 2047, dtype=torch.float16)
        launch_dense_cam(plain, weights, size=size, relu=False, normalize="minmax")
        apart = torch.empty(3, 2047, side + 1, side + 2)[:, :, :side, :side]
        launch_dense_cam(apart, weights, size=size, dtype=torch.uint8)
    launch_dense_cam(torch.empty(1, 1, 1, 1), torch.empty(1, 1), size=(1, 1))
    for side in (7, 65):
        far = torch.empty_strided((3, 2047, side, side), (FAR, FAR, FAR, FAR + 1))
        weights = torch.empty_strided((3, 2047), (FAR, FAR))
        launch_dense_cam(far, weights, size=(225, 225), dtype=torch.float16)


def _sparse_cam() -> None:
    def launch(
        activations: Tensor, size: tuple[int, int], *, K: int = 3, N: int = 1001, M: int = 50,
        is_mixed: bool = False, weights: torch.dtype = torch.float32, stride: int = 0,
        **options: object,
    ) -> None:  # fmt: skip
        B = len(activations)
        channels = torch.empty(N, M, dtype=torch.int64)
        if stride:
            channels = torch.empty_strided((N, M), (stride, stride), dtype=torch.int64)
        launch_sparse_cam(
            activations,
            torch.empty(B, K, dtype=torch.int64),
            channels,
            torch.empty_like(channels, dtype=weights),
            size=size,
            mixing=torch.empty(B, K) if is_mixed else None,
            offsets=torch.empty(N) if is_mixed else None,
            **options,
        )

    # Maps held whole, of both sizes, and in parts; wide and narrow, high and low; odd sizes.
    for side, size in itertools.product((7, 13, 65), ((225, 225), (63, 63), (20, 225))):
        signed = {"relu": False, "normalize": None if size == (63, 63) else "minmax"}
        launch(torch.empty(3, 2047, side, side), size, **signed)
    # As ResNet-50 and ViT-B/16 ask for maps of 224 x 224: whole vectors are written.
    full = (224, 224)
    launch(torch.empty(16, 2048, 7, 7, dtype=torch.float16), full, K=1, N=1024)
    tokens = torch.empty(16, 197, 768, dtype=torch.bfloat16)[:, 1:]
    launch(tokens, full, K=1, N=1024, grid=(14, 14))
    # And as explain_batch does, which marks with mixing weights what is not finite.
    for side, dtype in itertools.product((7, 14), (torch.float32, torch.bfloat16)):
        maps = _channels_last(16, 2048, side, side, dtype)
        launch(maps, full, K=1, N=1024, is_mixed=True)
    # Everything that can be 1 is; the second has a map in parts.
    launch(torch.empty(1, 1, 1, 1), (1, 1), K=1, N=1, M=1, is_mixed=True)
    launch(torch.empty(1, 1, 65, 65), (1, 1), K=1, N=1, M=1, is_mixed=True)
    plain = torch.empty(3, 2047, 7, 7)
    launch(plain, (225, 225), weights=torch.float16, is_mixed=True)
    launch(plain, (225, 225), dtype=torch.float16)
    launch(plain.bfloat16(), (225, 225), dtype=torch.uint8)
    for side in (7, 65):
        far = torch.empty_strided((3, 2047, side, side), (FAR + 1,) * 4)
        launch(far, (225, 225), is_mixed=True, stride=FAR + 1)


def _refine() -> None:
    # As the networks have them, and odd sizes.
    for C, side, dtype in zip((1024, 40, 2047), (14, 28, 13), FLOATS, strict=True):
        maps = torch.empty(16, 7, 7)
        launch_refine(maps, torch.empty(16, C, side, side, dtype=dtype))
        launch_refine(maps, _channels_last(16, C, side, side, dtype))
    # The second of two, whose map is finer; a batch of one; everything that can be 1 is.
    launch_refine(torch.empty(3, 14, 14), _channels_last(3, 512, 28, 28))
    launch_refine(torch.empty(1, 7, 5, dtype=torch.bfloat16), torch.empty(1, 33, 15, 11))
    launch_refine(torch.empty(1, 1, 1), torch.empty(1, 1, 1, 1))
    far = torch.empty_strided((3, 64, 9, 9), (FAR + 1, FAR + 1, 9 * (FAR + 1), FAR + 1))
    launch_refine(torch.empty(3, 7, 7), far)


def _top_m() -> None:
    for C, M in ((2048, 64), (2047, 200), (8191, 50), (8192, 256), (1024, 50), (200, 50)):
        launch_top_m(torch.empty(3, C), M)
    launch_top_m(torch.empty(1, 1, dtype=torch.float16), 1)
    far = torch.empty_strided((3, 200), (FAR + 1, FAR + 1), dtype=torch.bfloat16)
    launch_top_m(far, 50)


LAUNCHES: dict[str, Callable[[], None]] = {
    "dense_cam": _dense_cam,
    "grad_weights": _grad_weights,
    "group_bounds": _knn,
    "head_grad_weights": _head_grad_weights,
    "knn": _knn,
    "measured_rows": _knn,
    "near_rows": _near_rows,
    "refine": _refine,
    "row_squares": _knn,
    "sample_triplets": _sample_triplets,
    "sparse_cam": _sparse_cam,
    "thresholds": _thresholds,
    "top_m": _top_m,
    "tries": _tries,
}
