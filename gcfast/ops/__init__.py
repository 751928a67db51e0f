"""The operations: checked, documented, and sent to the backend that runs them.

``backend="auto"`` runs Triton's kernels (:mod:`gcfast.kernels`) for tensors on a GPU where Triton
is installed, the C++ twin of ``sample_triplets`` and ``mean_cotangents`` for tensors on the CPU,
and the PyTorch reference for everything else, float64 included. ``"triton"`` insists on kernels:
``MissingExtraError`` where Triton is not installed, ``ValueError`` for tensors they cannot take.
``"reference"`` always runs the reference (:mod:`gcfast.reference`), which is the specification.

Each has a file here that declares it; :mod:`gcfast.ops._operation` says what follows from a
declaration: the checked call, ``.trusted`` and ``torch.ops.gcfast.<name>``.

None of them is differentiable. Inputs may have any strides and are not changed.
"""

from gcfast.ops.dense_cam import dense_cam
from gcfast.ops.grad_weights import METHODS, grad_weights
from gcfast.ops.head_grad_weights import head_grad_weights
from gcfast.ops.knn import knn
from gcfast.ops.refine import refine
from gcfast.ops.sample_triplets import mean_cotangents, sample_triplets
from gcfast.ops.sparse_cam import sparse_cam
from gcfast.ops.top_m import top_m
from gcfast.reference import Triplets

__all__ = [
    "METHODS",
    "Triplets",
    "dense_cam",
    "grad_weights",
    "head_grad_weights",
    "knn",
    "mean_cotangents",
    "refine",
    "sample_triplets",
    "sparse_cam",
    "top_m",
]
