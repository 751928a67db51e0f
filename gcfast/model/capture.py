"""Taking one layer's output out of a forward pass, for any number of threads at once."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gcfast.model.watch import Modules

if TYPE_CHECKING:
    from gcfast.model.network import Network


CALLED = (
    "gcfast calls a model with images [B, 3, h, w] alone; one that takes a dict, keywords or "
    "several inputs goes into a module whose forward(images) calls it, see the how-to on layers"
)


class Captured(NamedTuple):
    """What one forward pass gave."""

    output: Tensor  # [B, D], the model's own output in its own dtype
    activations: Tensor  # [B, C, H, W]
    leaf: Tensor | None  # the layer's output as the graph's first node, where a graph was asked for
    image_size: tuple[int, int]  # h, w
    # The part of the image's height and width that the activations lie on, from the top left; 1
    # but for patches that do not come out even, which leave a rest or reach beyond.
    share: tuple[float, float]
    # [B, C', H', W'] of the layers that refine maps, coarse to fine, where they were asked for.
    finer: tuple[Tensor, ...] = ()
    also: tuple[Captured, ...] = ()  # of the same pass, by other networks of the model


class Capture:
    """One call's capture. A context variable holds it, so that threads do not see each other's."""

    def __init__(
        self,
        network: Network,
        *,
        differentiable: bool = False,
        replace: Callable[[Tensor], Tensor] | None = None,
        finer: tuple[Capture, ...] = (),
        clones: bool | None = None,
    ) -> None:
        self.network = network
        self.differentiable = differentiable
        self.replace = replace
        self.finer = finer  # of the same pass, of layers before this one
        self.also: tuple[Capture, ...] = ()  # of the same pass, of layers anywhere
        self.joins = False  # whether the graph may have begun at another layer
        self.clones = network.clone if clones is None else clones
        self.late: str | None = None  # one of those that had not run before this one
        self.tensor: Tensor | None = None
        self.version: int | None = None
        self.calls = 0

    def all(self) -> tuple[Capture, ...]:
        """This one and those of the same pass."""
        return (self, *self.finer, *self.also)

    def take(self, output: Any) -> Any:
        """Keep the layer's output; returns what the model goes on with, None for the same."""
        self.calls += 1
        if self.calls != self.network.layer_run:
            return None
        tensor = first_tensor(output)
        if tensor is None:
            return None
        self.late = next((f.network.layer_name for f in self.finer if f.tensor is None), None)
        if not tensor.is_floating_point():
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(
                f"`layer` must give floating point, got {self.network.layer_name!r} with {got}"
            )
        if self.differentiable or self.replace is not None:
            leaf = tensor if self.joins and tensor.requires_grad else tensor.detach()
            if self.replace is not None:
                leaf = self.replace(leaf)
            if self.differentiable:
                leaf = leaf.requires_grad_()
                # The layers before this one ran without a graph; from here on there is one. The
                # no_grad block round the forward pass sets the mode back.
                torch.set_grad_enabled(True)
            self.tensor = leaf
            # The copy, not the leaf, goes on: the next layer may work in place.
            return with_first_tensor(output, leaf.clone())
        tensor = tensor.detach()  # of a graph that was made for nothing
        if self.clones:
            self.tensor = tensor.clone()
        else:
            self.tensor = tensor
            self.version = None if tensor.is_inference() else tensor._version
        return None

    def learn(self) -> bool:
        """Note whether a later layer has overwritten the tensor; True: it was, and nobody knew."""
        if self.network.clone is not None:
            return False
        if self.tensor is None or self.tensor.is_inference():
            self.network.clone = True  # what cannot be told is taken to happen
        else:
            self.network.clone = self.tensor._version != self.version
        return self.network.clone


current_capture: ContextVar[Capture | None] = ContextVar("gcfast_capture", default=None)


class _EvalGuard:
    """Evaluation mode while any thread is inside; the flags come back when the last one leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.training: list[nn.Module] = []

    def enter(self, modules: Modules) -> None:
        with self.lock:
            if self.inside == 0:
                self.training = modules.in_training()
                for module in self.training:
                    module.training = False
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for module in self.training:
                    module.training = True
                self.training = []


_guards: weakref.WeakKeyDictionary[nn.Module, _EvalGuard] = weakref.WeakKeyDictionary()
_guards_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module, modules: Modules | None = None) -> Iterator[None]:
    """The model in evaluation mode inside the block, whatever it was outside, for any thread.

    To list its ``modules`` anew for each block takes longer than to ask them.
    """
    with _guards_lock:
        guard = _guards.setdefault(model, _EvalGuard())
    guard.enter(modules or Modules(model))
    try:
        yield
    finally:
        guard.leave()


def called(model: nn.Module, images: Tensor) -> Any:
    """Run the model; an error that other inputs may be the cause of says how it was called."""
    try:
        return model(images)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if CALLED not in getattr(error, "__notes__", ()):
            error.add_note(CALLED)
        raise


def first_tensor(output: Any) -> Tensor | None:
    """A layer's tensor: its output, or the first one in a tuple, a dict or an output object."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return next((value for value in output.values() if isinstance(value, Tensor)), None)
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The layer's output with another tensor in the place of its first."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if isinstance(value, Tensor))
        changed: Any = copy.copy(output)
        changed[key] = tensor
        return changed
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: tensor})
    return type(output)((tensor, *output[1:]))
