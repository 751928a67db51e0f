"""Forward passes through the compiler that the user's model was wrapped with.

Hooks do not run in compiled code. So what is compiled is a copy of the modules, on the same
tensors, that gives the explained layer's output beside its own (:mod:`gcfast.model.recording`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gcfast.model.recording import Kept, recording_copy
from gcfast.model.watch import Watch

if TYPE_CHECKING:
    from gcfast.model.network import Network

Outputs = tuple[Any, tuple[list[Tensor], ...]]  # the model's own, and each layer's, run by run


Compiler = Callable[[nn.Module], nn.Module]


def compiler_of(model: nn.Module) -> Compiler | None:
    """Return what wraps a module as ``torch.compile`` has wrapped a model; None where it has not.

    PyTorch's compiler is not imported for that, which takes seconds.
    """
    while True:
        context = getattr(model, "dynamo_ctx", None)
        if context is not None and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            wrapper: Any = type(model)
            return lambda module: wrapper(module, context)
        if not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return None
        model = model.module


class _Recorded(nn.Module):
    """The model's output, and the outputs of layers."""

    def __init__(self, layers: Sequence[Network]) -> None:
        super().__init__()
        self.kept = tuple(Kept() for _ in layers)
        self.model = recording_copy(layers, self.kept)
        self.eval()

    def forward(self, images: Tensor) -> Outputs:
        output = self.model(images)
        return output, tuple(kept.taken() for kept in self.kept)


class CompiledPasses:
    """The compiled forward passes of a network; compiled anew when the model has changed.

    Args:
        model: the user's, unwrapped.
        compiler: of :func:`compiler_of`.
    """

    def __init__(self, model: nn.Module, compiler: Compiler) -> None:
        self.model = model
        self.compiler = compiler
        # What a layer gives passes through the copy, so one thread at a time.
        self.lock = threading.Lock()
        self._watch = Watch(model)
        self._state = self._watch.kind()
        self._passes: dict[tuple[str | None, ...], nn.Module] = {}

    def __call__(self, layers: Sequence[Network], images: Tensor) -> Outputs:
        """Run the model.

        Args:
            layers: whose outputs are wanted; a pass without compiler has shown what they are.
            images: [B, 3, h, w].

        Returns:
            What the model returned, and a list for each layer of what its runs gave.

        Raises:
            UnsupportedModelError: a model that cannot be copied.
            Exception: whatever the compiler raises.
        """
        with self.lock:
            state = self._watch.kind()
            if state is None or state != self._state:
                self._watch = Watch(self.model)
                self._state = self._watch.kind()
                self._passes.clear()
            key = tuple(layer.layer_name for layer in layers)
            if key not in self._passes:
                self._passes[key] = self.compiler(_Recorded(layers))
            outputs: Outputs = self._passes[key](images)
            return outputs
