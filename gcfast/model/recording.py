"""A copy of a model whose layers keep what they give: no hooks, so that compilers can follow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gcfast.errors import UnsupportedModelError
from gcfast.model.capture import first_tensor

if TYPE_CHECKING:
    from gcfast.model.network import Network

KEPT, CLONES = "_gcfast_kept", "_gcfast_clones"  # attributes of a layer that keeps


class Kept:
    """A layer's outputs in the pass under way.

    A class and not a list: ``torch.export`` puts copies in the place of a module's lists, and the
    layer would go on filling the one that was there before.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def taken(self) -> list[Tensor]:
        """The outputs, which are kept no longer."""
        taken, self.tensors = self.tensors, []
        return taken


def recording_copy(layers: Sequence[Network], kept: Sequence[Kept]) -> nn.Module:
    """A copy of the model's modules, on the same tensors, whose layers keep what they give.

    A layer's class is replaced by a subclass of it rather than the layer by a wrapper, so that a
    model that indexes the layer, or asks for its attributes or its type, finds what it expects.
    """
    model = layers[0].model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, dict(shared))
    except Exception as error:  # whatever the user's own attributes raise
        raise UnsupportedModelError(
            "`model` must be a module that copy.deepcopy can copy, to be exported or to run "
            f"compiled: {error}"
        ) from error
    for network, own in zip(layers, kept, strict=True):
        layer = copied.get_submodule(network.module_name)
        if KEPT not in vars(layer):  # two runs of a module are kept by one
            layer.__class__ = _recording(type(layer))
            vars(layer)[KEPT], vars(layer)[CLONES] = (), False
        vars(layer)[KEPT] += (own,)
        # A later layer may write over it.
        vars(layer)[CLONES] |= network.clone is not False
    return copied


def _recording(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class whose instances keep what they give, if they are told where."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        tensor = first_tensor(output)
        if tensor is not None:
            own = vars(self)
            tensor = tensor.clone() if own[CLONES] else tensor
            for kept in own[KEPT]:
                kept.tensors.append(tensor)
        return output

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        del protocol
        return _new, (kind,), object.__getstate__(self)

    return type(
        kind.__name__,
        (kind,),
        {"forward": forward, "__module__": __name__, "__reduce_ex__": reduce},
    )


def _new(kind: type[nn.Module]) -> nn.Module:
    """An empty layer, for unpickling."""
    recording = _recording(kind)
    return recording.__new__(recording)
