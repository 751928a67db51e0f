"""What a database remembers of the model it was built with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from gcfast.model.network import unwrapped

WRAPPERS = ("module.", "_orig_mod.")


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Architecture, parameters and dtype of a model.

    ``architecture`` hashes the tree of module classes and the names and shapes of the parameters
    and buffers; ``parameters`` hashes their values in float32, so that it does not depend on the
    precision that holds them; ``dtype`` is recorded, not hashed. Prefixes that wrappers put before
    names are stripped.
    """
    model = unwrapped(model)
    architecture, parameters = hashlib.sha256(), hashlib.sha256()
    for name, module in model.named_modules():
        architecture.update(f"{_stripped(name)}:{type(module).__qualname__}\n".encode())
    dtypes = set()
    for name, tensor in sorted(_tensors(model).items()):
        architecture.update(f"{name}:{list(tensor.shape)}\n".encode())
        values = tensor.detach()
        if values.is_floating_point():
            dtypes.add(str(values.dtype).removeprefix("torch."))
            values = values.float()
        contiguous = values.cpu().contiguous().reshape(-1)
        parameters.update(contiguous.view(torch.uint8).numpy().data)
    return {
        "architecture": architecture.hexdigest(),
        "parameters": parameters.hexdigest(),
        "dtype": ", ".join(sorted(dtypes)),
    }


def difference(stored: dict[str, Any], model: dict[str, str]) -> str | None:
    """In words, how a model differs from the stored fingerprint; None where it does not."""
    if stored.get("architecture") != model["architecture"]:
        return "another architecture"
    if stored.get("parameters") != model["parameters"]:
        if stored.get("dtype") != model["dtype"]:
            return (
                f"other parameters (stored as {stored.get('dtype')}, the model's are "
                f"{model['dtype']}: a conversion rounds them)"
            )
        return "other parameters"
    return None


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {_stripped(name): tensor for name, tensor in named}


def _stripped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(f".{wrapper}", ".")
        while name.startswith(wrapper):
            name = name.removeprefix(wrapper)
    return name
