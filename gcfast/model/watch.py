"""Whether a model is still what it was: its tensors, and its modules' flags and numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, call, itemgetter
from typing import Any

from torch import Tensor, nn

_training, _version = attrgetter("training"), attrgetter("_version")


class _Held:
    """What many dicts hold, gathered in C: a model has hundreds, which each call asks."""

    def __init__(self, dicts: Iterable[Mapping[str, Any]]) -> None:
        dicts = list(dicts)
        self._values = [held.values for held in dicts if held]
        self._empty = [held for held in dicts if not held]

    def now(self) -> list[Any] | None:
        """The values of all, in order; None where one that was empty is not."""
        return None if any(self._empty) else list(chain.from_iterable(map(call, self._values)))


class Modules:
    """A model's modules, listed again only where one has been added, taken out or exchanged."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._listed = self._list()

    def current(self) -> list[nn.Module]:
        """All modules, as ``model.modules()`` has them."""
        modules, held, children = self._listed
        if held.now() != children:  # by identity, since modules define no equality
            # One assignment, since other threads may be asking.
            modules, *_ = self._listed = self._list()
        return modules

    def in_training(self) -> list[nn.Module]:
        """Those whose flag is set."""
        return list(filter(_training, self.current()))

    def _list(self) -> tuple[list[nn.Module], _Held, list[Any] | None]:
        modules = list(self._model.modules())
        held = _Held(m._modules for m in modules)
        return modules, held, held.now()


class Watch:
    """Whether a model's tensors are those they were, at a few microseconds a hundred tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = Modules(model)
        self._watched = modules = self._modules.current()
        self._slots = _Held(held for m in modules for held in (m._parameters, m._buffers))
        self._count = len(_tensors(self._slots.now()))
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
        """The tensors in their slots; None where a module is another, or a tensor new or gone."""
        if self._modules.current() is not self._watched:
            return None
        tensors = _tensors(self._slots.now())
        return tensors if len(tensors) == self._count else None

    def numbers(self) -> Hashable:
        """The modules' own numbers, flags and names, as text; None where one is gone."""
        try:
            return str([get(held) for held, get in self.plain])
        except KeyError:
            return None


def _tensors(values: list[Any] | None) -> list[Tensor]:
    return [value for value in values or () if value is not None]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(element) for element in value)
    return value is None or isinstance(value, bool | int | float | str)
