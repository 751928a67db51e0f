"""The six operations: checked, documented, and sent to the backend that runs them.

``backend="auto"`` runs the C++ twin of ``sample_triplets`` and ``mean_cotangents`` for tensors on
the CPU and the PyTorch reference, on the tensors' device, for everything else.
``backend="reference"`` always runs the reference (:mod:`gcfast.reference`), which is the
specification.

None of them is differentiable. Inputs may have any strides and are not changed.
"""

from gcfast.ops.knn import knn
from gcfast.ops.sample_triplets import mean_cotangents, sample_triplets
from gcfast.ops.sparse_cam import sparse_cam
from gcfast.ops.weights import METHODS, grad_weights, head_grad_weights, top_m
from gcfast.reference import Triplets

__all__ = [
    "METHODS",
    "Triplets",
    "grad_weights",
    "head_grad_weights",
    "knn",
    "mean_cotangents",
    "sample_triplets",
    "sparse_cam",
    "top_m",
]
