"""Whether a model is still what it was: its tensors, and its modules' flags and numbers."""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter, itemgetter

from torch import Tensor, nn

_version = attrgetter("_version")


class Watch:
    """Whether a model's tensors are those they were, at a few microseconds a hundred tensors."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.children = [(m._modules, name, c) for m in modules for name, c in m._modules.items()]
        self.slots = [
            (held, name)
            for m in modules
            for held in (m._parameters, m._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        # `training` is ours during a pass. PyTorch's own modules, which are most, are not asked:
        # nobody turns a convolution's stride while it is in use.
        self.plain = [
            (vars(m), itemgetter(*names))
            for m in modules
            if not type(m).__module__.startswith("torch.nn.")
            and (names := [n for n, v in vars(m).items() if _is_plain(v) and n != "training"])
        ]

    def state(self) -> tuple[Hashable, Hashable] | None:
        """Where each tensor is and how often it was written to, and the modules' own numbers.

        None where a module is another.
        """
        tensors = self._tensors()
        if tensors is None:
            return None
        places = tuple(map(Tensor.data_ptr, tensors))
        try:
            versions: Hashable = tuple(map(_version, tensors))
        except RuntimeError:  # tensors made in inference mode count no writes
            versions = None
        return (places, versions), self.numbers()

    def kind(self) -> Hashable:
        """What a copy on the same tensors shares: not their values, which may be written to.

        None where a module is another.
        """
        tensors = self._tensors()
        return None if tensors is None else (tuple(map(id, tensors)), self.numbers())

    def _tensors(self) -> list[Tensor] | None:
        """The tensors in their slots; None where a module or a tensor is gone."""
        if any(held.get(name) is not child for held, name, child in self.children):
            return None
        tensors = [held.get(name) for held, name in self.slots]
        return None if any(tensor is None for tensor in tensors) else tensors  # type: ignore[return-value]

    def numbers(self) -> Hashable:
        """The modules' own numbers, flags and names, as text; None where one is gone."""
        try:
            return str([get(held) for held, get in self.plain])
        except KeyError:
            return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(element) for element in value)
    return value is None or isinstance(value, bool | int | float | str)
