"""Checks of arguments, in one wording: "`name` must …, got …"."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SEED = 2**63 - 1


def require_tensor(name: str, value: object) -> Tensor:
    """The value, if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")
    return value


def require_images(name: str, images: object) -> Tensor:
    """The images, if they are a floating-point tensor [B, channels, h, w]."""
    tensor = require_tensor(name, images)
    if tensor.ndim != 4:
        raise ValueError(f"`{name}` must have shape [B, 3, h, w], got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"`{name}` must be floating point, scaled as the model expects, got {got}")
    return tensor


def require_shape(
    name: str, tensor: Tensor, letters: str, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Check rank and sizes against letters such as "B T D".

    Args:
        name: the argument's name.
        tensor: what came.
        letters: the dimensions in order, separated by blanks; a number stands for itself.
        sizes: letters whose size is known already.

    Returns:
        The sizes by letter, the known ones included.

    Raises:
        ValueError: another rank or another size.
    """
    expected = letters.split()
    known = dict(sizes or {})
    shown = "[" + ", ".join(expected) + "]"
    if tensor.ndim != len(expected):
        raise ValueError(f"`{name}` must have shape {shown}, got {list(tensor.shape)}")
    for letter, size in zip(expected, tensor.shape, strict=True):
        wanted = int(letter) if letter.isdigit() else known.setdefault(letter, size)
        if wanted != size:
            raise ValueError(
                f"`{name}` must have shape {shown} with {letter} = {wanted}, "
                f"got {list(tensor.shape)}"
            )
    return known


def require_dtype(name: str, tensor: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Raise TypeError unless the tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"`{name}` must have dtype {names}, got {got}")


def require_same_device(**tensors: Tensor | None) -> torch.device:
    """Raise ValueError, naming both, unless all the tensors that are given share a device."""
    given = [(name, t.device) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, device in given[1:]:
        if device != first:
            raise ValueError(
                f"`{name}` must be on the device of `{first_name}`, {first}, got {device}"
            )
    return first


class Dimensions(dict[str, int]):
    """The sizes of the dimension letters in the tensors of one call, all on one device."""

    _first: tuple[str, Tensor] | None = None

    def require(
        self, name: str, value: object, dtypes: Collection[torch.dtype], letters: str
    ) -> None:
        """Check a tensor's kind, dtype, shape and device, and take the sizes of new letters.

        Args:
            name: the argument's name.
            value: the argument.
            dtypes: those that are allowed.
            letters: as for :func:`require_shape`.

        Raises:
            TypeError: not a tensor, or another dtype.
            ValueError: another shape, or not on the device of the first tensor.
        """
        tensor = require_tensor(name, value)
        require_dtype(name, tensor, dtypes)
        expected, shape = letters.split(), tensor.shape
        is_right = len(expected) == len(shape)
        for letter, size in zip(expected, shape, strict=False):
            is_right = is_right and self.setdefault(letter, size) == size
        if not is_right:
            require_shape(name, tensor, letters, self)  # says what is wrong
        if self._first is None:
            self._first = (name, tensor)
        elif tensor.device != self._first[1].device:
            require_same_device(**{self._first[0]: self._first[1], name: tensor})


def require_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError, listing the choices, unless the value is one of them."""
    if value not in choices:
        known = ", ".join(repr(c) for c in choices)
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}")


def require_int(
    name: str, value: object, low: int, high: int | None = None, *, what: str = ""
) -> int:
    """The value, if it is an int (or its symbol while tracing; not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"`{name}` must be an int{what}, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be {bound}, got {value}")
    return cast(int, value)


def require_finite_rows(name: str, rows: Tensor, *, first: int = 0) -> None:
    """Raise ValueError, naming the rows, where a row of [B, …] holds NaN or infinity."""
    # One reduction settles the usual case: a finite sum has finite terms.
    if bool(torch.isfinite(rows.sum(dtype=torch.float64))):
        return
    bad = (~torch.isfinite(rows.flatten(1)).all(1)).nonzero().flatten() + first
    if len(bad):
        where = "rows" if len(bad) > 1 else "row"
        raise ValueError(
            f"`{name}` must be finite, got NaN or infinity in {where} {listed(bad.tolist(), 10)}"
        )


def require_ids(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise ValueError where an id lies outside [low, high)."""
    if ids.numel() and (int(ids.min()) < low or int(ids.max()) >= high):
        raise ValueError(
            f"`{name}` must lie in [{low}, {high}), got {int(ids.min())} to {int(ids.max())}"
        )


def listed(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few names, and how many more there are, for an error message."""
    shown = ", ".join(map(str, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def suggestions(name: str, known: Iterable[str], limit: int = 5) -> str:
    """The known names closest to an unknown one, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4) or known[-limit:]
    return ", ".join(repr(c) for c in close)
