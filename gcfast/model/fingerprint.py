"""What a database remembers of the model it was built with.

Two things tell one model from another: its persistent tensors, and what it makes of a few fixed
images. The tensors alone are too strict (a half-precision copy holds others, and so does a counter
that a forward pass advances) and too lax (an adapter that is switched off leaves them as they are).
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.errors import ModelMismatchError
from gcfast.model.capture import evaluating
from gcfast.model.network import Network, unwrapped

WRAPPERS = ("module.", "_orig_mod.")
VERSION = 2  # 1 counted every buffer, and did not look at the outputs
IMAGES = 2  # fixed ones
MOST_VALUES = 3 * 16_384**2  # of a fixed image
COPIED_BYTES = 2**23  # of a model on a GPU, at once
NUMBERS = 64  # of each one's output that are kept
# Largest norm-relative difference of the outputs for the same images. The same parameters on
# another device, or with TF32, differ by up to 5e-3; a half-precision or int8 copy by more.
SAME, CONVERTED = 0.01, 0.1


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The persistent tensors of a model: what its ``state_dict`` holds.

    ``architecture`` hashes names and shapes; ``parameters`` and ``buffers`` hash values in float32,
    so that they do not depend on the precision that holds them; ``dtype`` is recorded, not hashed.
    Prefixes that wrappers put before names are stripped.
    """
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    kept = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    architecture = hashlib.sha256()
    for name, tensor in sorted((_stripped(n), t) for n, t in kept.items()):
        architecture.update(f"{name}:{list(tensor.shape)}\n".encode())
    return {
        "version": VERSION,
        "architecture": architecture.hexdigest(),
        "parameters": _hash(tensor for name, tensor in _sorted(kept) if name in parameters),
        "buffers": _hash(tensor for name, tensor in _sorted(kept) if name not in parameters),
        "dtype": _dtypes(kept.values()),
    }


def with_outputs(stored: dict[str, Any], network: Network) -> dict[str, Any]:
    """A fingerprint with what the model makes of fixed images of the size that it has seen.

    One that has that already is returned as it is.
    """
    if network.image_shape is None or "outputs" in stored:
        return stored
    shape = list(network.image_shape)
    return stored | {"images": shape, "outputs": _outputs(network, shape).tolist()}


def check_stored(stored: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for what is no fingerprint."""
    hashes = ("architecture", "parameters", "buffers") if "version" in stored else ("architecture",)
    for key in (*hashes, "dtype"):
        if not isinstance(stored[key], str):
            raise TypeError(f"the fingerprint's {key!r} must be a str, got {stored[key]!r:.60}")
    if "outputs" not in stored:
        return
    shape = stored["images"]
    try:
        outputs = torch.tensor(stored["outputs"], dtype=torch.float32)
    except RuntimeError as error:  # of what is no number
        raise TypeError(f"the fingerprint's 'outputs' must be numbers: {error}") from error
    whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 3 or math.prod(shape) > MOST_VALUES:
        raise ValueError(f"the fingerprint's 'images' must be [3, h, w], got {shape!r:.60}")
    if outputs.ndim != 2 or len(outputs) != IMAGES or not outputs.isfinite().all():
        raise ValueError(f"the fingerprint's 'outputs' must be {IMAGES} lists of numbers")


def difference(stored: dict[str, Any], model: dict[str, Any]) -> str | None:
    """In words, how a model's tensors differ from the stored ones; None where they do not."""
    if stored.get("architecture") != model["architecture"]:
        return "another architecture"
    if stored.get("parameters") != model["parameters"] or stored.get("buffers") != model["buffers"]:
        if stored.get("dtype") != model["dtype"]:
            return (
                f"other parameters (stored as {stored.get('dtype')}, the model's are "
                f"{model['dtype']}: a conversion rounds them)"
            )
        return "other parameters"
    return None


def outputs_differ(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two fingerprints are of models that make other things of the same fixed images."""
    if "outputs" not in one or "outputs" not in two or one["images"] != two["images"]:
        return False
    a, b = torch.tensor(one["outputs"]), torch.tensor(two["outputs"])
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-12)).max()) > SAME


def check_model(stored: dict[str, Any], network: Network, *, what: str = "the database") -> None:
    """Refuse a model that is not the one that a fingerprint is of.

    A copy in another precision is taken with a warning where its outputs for the fixed images are
    within CONVERTED of the stored ones.

    Args:
        stored: a fingerprint, of this version or of version 1.
        network: the model.
        what: was built with the stored one; for the message.

    Raises:
        ModelMismatchError: another model.
    """
    if "version" not in stored:
        differs = difference(stored, _version_1(network.model))
        if differs:
            raise ModelMismatchError(
                f"{what} was built with another model than this one: {differs}"
            )
        return
    now = fingerprint(network.model)
    differs = difference(stored, now)
    if "outputs" not in stored:
        if differs:
            raise ModelMismatchError(
                f"{what} was built with another model than this one: {differs}"
            )
        return
    converted = stored["dtype"] != now["dtype"]
    same_parameters = all(stored[key] == now[key] for key in ("architecture", "parameters"))
    if not converted and not same_parameters:
        raise ModelMismatchError(f"{what} was built with another model than this one: {differs}")
    wanted = torch.tensor(stored["outputs"])
    try:
        got = _outputs(network, stored["images"])
        off = float(((got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)).max())
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelMismatchError(
            f"{what} was built with another model than this one: images of "
            f"{stored['images']} fail in it ({error})"
        ) from error
    if not off <= (CONVERTED if converted else SAME):
        why = (
            differs or "the same parameters, but a switch, a flag or an adapter changes its outputs"
        )
        raise ModelMismatchError(
            f"{what} was built with another model than this one: {why}; its embeddings of fixed "
            f"images differ by {off:.2g} of their norm"
        )
    if converted and not same_parameters:
        warnings.warn(
            f"{what} was built with the model in {stored['dtype']}, and this one is in "
            f"{now['dtype']}: embeddings of fixed images differ by {off:.2g} of their norm",
            stacklevel=3,
        )


def _outputs(network: Network, shape: list[int]) -> Tensor:
    """The outputs for fixed noise, projected at random: [IMAGES, at most NUMBERS] float32, CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((IMAGES, *shape), generator=generator)
    images = images.to(network.device(images.device))
    images = images.to(network.dtype_for(images))
    with evaluating(network.model), torch.no_grad():
        output = network.embedding(network.model(images), len(images)).float().cpu()
    if output.shape[1] <= NUMBERS:
        return output
    projection = torch.randn((output.shape[1], NUMBERS), generator=generator)
    return output @ projection / math.sqrt(NUMBERS)


def _sorted(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: _stripped(item[0]))


def _hash(tensors: Iterable[Tensor]) -> str:
    hashed = hashlib.sha256()
    for values in _on_host(tensors):
        hashed.update(values.numpy().data)
    return hashed.hexdigest()


def _on_host(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bytes of tensors one after the other, floating point as float32, on the CPU.

    Each part is good until the next one. From a GPU many tensors are copied at once, on a stream of
    their own: on the current one each copy would wait for what the model has been given to do
    meanwhile, and each call for the thread that gives it.
    """
    for device, own in groupby(tensors, lambda tensor: tensor.device):
        if device.type != "cuda":
            yield from (_bytes(tensor.cpu()) for tensor in own)
            continue
        host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        for some in _groups(own):
            with torch.cuda.stream(stream):
                whole = torch.cat([_bytes(tensor) for tensor in some])
                for start in range(0, len(whole), COPIED_BYTES):
                    part = whole[start : start + COPIED_BYTES]
                    host[: len(part)].copy_(part, non_blocking=True)
                    stream.synchronize()
                    yield host[: len(part)]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The same each time, since PyTorch keeps the memory of each stream for itself."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in lists of COPIED_BYTES or a little more."""
    some: list[Tensor] = []
    size = 0
    for tensor in tensors:
        some.append(tensor)
        size += 4 * tensor.numel()
        if size >= COPIED_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in a row, of float32 where it is floating point."""
    if tensor.is_floating_point() and tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor.reshape(-1).view(torch.uint8)


def _dtypes(tensors: Iterable[Tensor]) -> str:
    names = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return ", ".join(sorted(names))


@torch.no_grad()
def _version_1(model: nn.Module) -> dict[str, Any]:
    """The fingerprint that databases of formats 1 to 3 have: every buffer, and module classes."""
    model = unwrapped(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = {_stripped(name): tensor for name, tensor in tensors.items()}
    architecture = hashlib.sha256()
    for name, module in model.named_modules():
        architecture.update(f"{_stripped(name)}:{type(module).__qualname__}\n".encode())
    for name, tensor in sorted(tensors.items()):
        architecture.update(f"{name}:{list(tensor.shape)}\n".encode())
    return {
        "architecture": architecture.hexdigest(),
        "parameters": _hash(tensor for _, tensor in sorted(tensors.items())),
        "buffers": None,
        "dtype": _dtypes(tensors.values()),
    }


def _stripped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(f".{wrapper}", ".")
        while name.startswith(wrapper):
            name = name.removeprefix(wrapper)
    return name
