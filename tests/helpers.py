"""Comparisons and inputs that the tests of the operations share."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch import Tensor


def guarded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, pad: int = 64) -> Tensor:
    """A random tensor with NaN on both sides in memory, so that a stray read shows."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * pad,), float("nan"), dtype=dtype)
    view = buffer[pad : pad + count].view(shape)
    return view.copy_(torch.randn(shape))


def strided(tensor: Tensor) -> Tensor:
    """The same values with a gap of NaN after every element of the last dimension."""
    buffer = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype, device=tensor.device)
    buffer[..., 0] = tensor
    return buffer[..., 0]


def norm_error(got: Tensor, wanted: Tensor) -> float:
    """The largest |got - wanted| / |wanted| over the rows."""
    got, wanted = got.double().flatten(1), wanted.double().flatten(1)
    if wanted.numel() == 0:
        return 0.0
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)).max())


def assert_error_bounded(got: Tensor, truth: Tensor, same_dtype: Tensor, slack: float) -> None:
    """Our distance from the float64 truth is at most PyTorch's in our dtype plus the slack."""
    ours = (got.double() - truth).abs()
    theirs = (same_dtype.double() - truth).abs()
    scale = truth.abs().max() if truth.numel() else 1.0
    assert (ours <= theirs + slack * scale).all(), float((ours - theirs).max())


def clustered(rows: int, dim: int, classes: int, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Unit vectors [rows, dim] round class centres, and labels [rows], in no particular order."""
    labels = torch.randint(classes, (rows,))
    centres = torch.randn(classes, dim)
    points = centres[labels] + spread * torch.randn(rows, dim)
    return torch.nn.functional.normalize(points, dim=1), labels


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
