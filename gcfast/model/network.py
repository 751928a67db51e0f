"""The user's model: run for its embedding and one layer's output, and left as it was."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gcfast._checks import require_images, suggestions
from gcfast.errors import UnsupportedModelError
from gcfast.model.capture import (
    Capture,
    Captured,
    current_capture,
    evaluating,
    first_tensor,
)

Reshape = Callable[[Tensor], Tensor]
# What a RuntimeError says where a model cannot take channels-last input.
LAYOUT_WORDS = ("view size is not compatible", "channels_last", "memory format", "stride")


class Network:
    """An embedding network and the layer whose output is explained.

    Args:
        model: images [B, 3, ·, ·] → embeddings [B, D]; any ``nn.Module``. Wrappers of torch.compile
            and of data parallelism are taken off.
        layer: dotted name or module; None finds the last layer with a spatial output at the first
            forward pass.
        output_key: where the embedding is in an output that is a dict, an object or a tuple.
        reshape: from the layer's output to [B, C, H, W], for tokens; it may pick and rearrange
            values, not compute with them, since gradients go through it as well.

    Raises:
        TypeError: a model or layer of another kind.
        ValueError: a layer that the model does not have.
        UnsupportedModelError: a compiled or scripted model, whose layers cannot be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        if reshape is not None and not callable(reshape):
            raise TypeError(f"`reshape` must be callable, got {type(reshape).__name__}")
        self.model = unwrapped(model)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedModelError(
                    f"`model` must not be scripted, got a ScriptModule at {name or 'the top'!r}: "
                    "hooks do not run in it; give the original module"
                )
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise UnsupportedModelError(
                    f"`model` must not be compiled in place, got Module.compile() at "
                    f"{name or 'the top'!r}: hooks do not run in it; give an uncompiled module, or "
                    "torch.compile(model), which can be unwrapped"
                )
            if isinstance(getattr(module, "_orig_mod", None), nn.Module):
                raise UnsupportedModelError(
                    f"`model` must not have compiled parts, got torch.compile() at {name!r}: hooks "
                    "do not run in it; give a model of uncompiled modules"
                )
        self.output_key = output_key
        self.reshape = reshape
        self.layer: nn.Module | None = None
        self.layer_name: str | None = None
        if layer is not None:
            self.set_layer(layer)
        self.channels_last = any(isinstance(m, nn.Conv2d) for m in self.model.modules())
        # Whether a later layer overwrites the captured one in place; None until a pass has told.
        self.clone: bool | None = None
        # Whether the model turns gradients off for a while itself, and back to what they were.
        self.switches_grad = False
        self._lock = threading.Lock()
        self._hooks = 0
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def has_layer(self, name: str) -> bool:
        """Whether the model has a module of this dotted name."""
        return name in dict(self.model.named_modules())

    def set_layer(self, layer: str | nn.Module) -> None:
        """Explain this layer; raises as the class."""
        self.layer_name, self.layer = _find_layer(self.model, layer)

    def device(self, fallback: torch.device) -> torch.device:
        """The device of the first parameter or buffer."""
        # Lazily: this is asked for every batch, and a large model has thousands.
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            return tensor.device
        return fallback

    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter; None where there is none."""
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return None

    def checked(self, name: str, images: object) -> Tensor:
        """Return the images, if they are as the model takes them.

        Raises:
            TypeError: no tensor, or another dtype than the model's outside autocast.
            ValueError: another rank or device.
        """
        images = require_images(name, images)
        device = self.device(images.device)
        if images.device != device:
            raise ValueError(
                f"`{name}` must be on the model's device, {device}, got {images.device}"
            )
        dtype = self.dtype()
        autocast = torch.is_autocast_enabled(images.device.type)
        if dtype is not None and images.dtype != dtype and not autocast:
            wanted, got = (str(d).removeprefix("torch.") for d in (dtype, images.dtype))
            raise TypeError(f"`{name}` must have the model's dtype, {wanted}, got {got}")
        return images

    def embed(self, images: Tensor) -> Captured:
        """One forward pass without a graph, [B, 3, h, w] as the model takes it."""
        if self.clone is None:
            # Only a tensor made outside inference mode counts the writes to it.
            with torch.inference_mode(False), torch.no_grad():
                images = images.clone() if images.is_inference() else images
                capture, output = self._run(images, differentiable=False)
            if capture.tensor is None or capture.tensor.is_inference():
                self.clone = True  # what cannot be told is taken to happen
            else:
                self.clone = capture.tensor._version != capture.version
            if not self.clone:
                return self._captured(capture, output)
        with torch.no_grad():
            return self._captured(*self._run(images, differentiable=False))

    @contextmanager
    def differentiable(
        self, images: Tensor, *, replace: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Captured]:
        """A forward pass whose graph begins at the layer, so that no gradient enters the backbone.

        ``replace`` may put another activation in the place of the layer's output.
        """
        with torch.inference_mode(False):
            images = images.clone() if images.is_inference() else images
            with torch.set_grad_enabled(self.switches_grad):
                capture, output = self._run(images, differentiable=True, replace=replace)
            if not output.requires_grad and not self.switches_grad:
                # A no_grad block in the model that ended behind the layer has set the mode back to
                # ours. Under enable_grad it works; the layers before are in a graph for nothing.
                with torch.enable_grad():
                    capture, output = self._run(images, differentiable=True, replace=replace)
                self.switches_grad = output.requires_grad
            with torch.enable_grad():
                captured = self._captured(capture, output)
                if not captured.output.requires_grad:
                    why = "which the output does not depend on (or the model detaches it)"
                    if output.is_inference():
                        why = "but the model's forward pass runs under torch.inference_mode"
                    raise ValueError(
                        f"`layer` must be on the way to the embedding, got {self.layer_name!r}, "
                        f"{why}"
                    )
                yield captured

    def prepared(self, images: Tensor) -> Tensor:
        """The images in the memory format that the model takes best."""
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images.contiguous()

    def _run(
        self,
        images: Tensor,
        *,
        differentiable: bool,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Capture, Tensor]:
        with evaluating(self.model):
            if self.layer is None:
                self._resolve(images)
            with self._hooked():
                try:
                    return self._forward(self.prepared(images), differentiable, replace)
                except RuntimeError as error:
                    words = str(error)
                    if not self.channels_last or not any(w in words for w in LAYOUT_WORDS):
                        raise
                result = self._forward(images.contiguous(), differentiable, replace)
                self.channels_last = False  # remembered only now that the other layout has worked
                return result

    def _forward(
        self, images: Tensor, differentiable: bool, replace: Callable[[Tensor], Tensor] | None
    ) -> tuple[Capture, Tensor]:
        capture = Capture(self, differentiable=differentiable, replace=replace)
        token = current_capture.set(capture)
        grad_enabled = torch.is_grad_enabled()
        try:
            output = self.model(images)
        finally:
            torch.set_grad_enabled(grad_enabled)
            current_capture.reset(token)
        if capture.calls != 1:
            times = "not at all" if capture.calls == 0 else f"{capture.calls} times"
            raise UnsupportedModelError(
                f"`layer` must run once in a forward pass, got {self.layer_name!r}, "
                f"which ran {times}"
            )
        # What replaces the activation may stand for more images than went in.
        own = capture.tensor if replace is not None else None
        count = len(images) if own is None else len(own)
        return capture, self.embedding(output, count)

    def _captured(self, capture: Capture, output: Tensor) -> Captured:
        tensor = capture.tensor
        got = "no tensor" if tensor is None else list(tensor.shape)
        if tensor is not None and self.reshape is not None:
            tensor = self.reshape(tensor)
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"`reshape` must return a tensor [B, C, H, W], got {type(tensor).__name__}"
                )
            got = f"{list(tensor.shape)} after `reshape`"
        if tensor is None or tensor.ndim != 4 or tensor.shape[2] * tensor.shape[3] <= 1:
            raise ValueError(
                f"`layer` must have a spatial output [B, C, H, W] with H*W > 1, got "
                f"{self.layer_name!r} with {got}; tokens need `reshape` (see gcfast.TokenGrid)"
            )
        return Captured(output, tensor, capture.tensor if capture.differentiable else None)

    def embedding(self, output: Any, count: int) -> Tensor:
        """The [B, D] embedding in what the model returned."""
        key = self.output_key
        if key is not None:
            try:
                by_name = isinstance(key, str) and not _has_items(output)
                output = getattr(output, str(key)) if by_name else output[key]
            except (KeyError, IndexError, AttributeError, TypeError):
                raise ValueError(
                    f"`output_key` must be one of {_keys(output)}, got {key!r}"
                ) from None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"`model` must return a tensor [B, D], got {type(output).__name__}; choose one of "
                f"its parts with `output_key`: {_keys(output)}"
            )
        if output.ndim != 2 or output.shape[0] != count:
            raise ValueError(
                f"`model` must return embeddings of shape [B, D] with B = {count}, "
                f"got {list(output.shape)}"
            )
        if not output.is_floating_point():
            raise TypeError(f"`model` must return floating point, got {output.dtype}")
        return output

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """One hook on the layer, however many threads are inside."""
        assert self.layer is not None
        with self._lock:
            if self._hooks == 0:
                self._handle = self.layer.register_forward_hook(self._hook)
            self._hooks += 1
        try:
            yield
        finally:
            with self._lock:
                self._hooks -= 1
                if self._hooks == 0 and self._handle is not None:
                    self._handle.remove()
                    self._handle = None

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        capture = current_capture.get()
        if capture is None or capture.network is not self:
            return None  # another thread's own use of the model
        return capture.take(output)

    def _resolve(self, images: Tensor) -> None:
        """Find the last layer to finish whose output is spatial: of equals the outermost.

        A module that runs more than once (one activation for all blocks) cannot be explained, and
        an output object may hold tensors that the embedding does not come from: neither is taken.
        """
        with self._lock:
            if self.layer is not None:
                return
            found: list[tuple[str, nn.Module]] = []
            runs: Counter[nn.Module] = Counter()
            thread = threading.get_ident()

            def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    del args
                    if threading.get_ident() != thread:
                        return
                    runs[module] += 1
                    tensor = None if isinstance(output, Mapping) else first_tensor(output)
                    if tensor is None or tensor.ndim != 4:
                        return
                    if tensor.shape[2] * tensor.shape[3] > 1:
                        found.append((name, module))

                return hook

            handles = [
                module.register_forward_hook(note(name))
                for name, module in self.model.named_modules()
                if name
            ]
            try:
                with torch.no_grad():
                    self.model(images[:1].contiguous())
            finally:
                for handle in handles:
                    handle.remove()
            found = [(name, module) for name, module in found if runs[module] == 1]
            if not found:
                raise ValueError(
                    "`layer` must be given: no layer of the model has a spatial output "
                    "[B, C, H, W] with H*W > 1; tokens need `layer` and `reshape`"
                )
            self.layer_name, self.layer = found[-1]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallelism's wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def _find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    names = {name: module for name, module in model.named_modules() if name}
    if isinstance(layer, nn.Module):
        layer = unwrapped(layer)
        for name, module in names.items():
            if module is layer:
                return name, module
        raise ValueError(
            f"`layer` must be a module of `model`, got a {type(layer).__name__} that is not in it"
        )
    if not isinstance(layer, str):
        raise TypeError(f"`layer` must be a dotted name or a module, got {type(layer).__name__}")
    if layer not in names:
        raise ValueError(
            f"`layer` must name a module of `model`, got {layer!r}; close to it: "
            f"{suggestions(layer, names)}"
        )
    return layer, names[layer]


def _has_items(output: Any) -> bool:
    return isinstance(output, dict) or hasattr(output, "keys")


def _keys(output: Any) -> str:
    if _has_items(output):
        return ", ".join(repr(k) for k in output)
    if isinstance(output, tuple | list):
        return f"0 to {len(output) - 1}"
    named = [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]
    return ", ".join(repr(name) for name in named) or "none"
