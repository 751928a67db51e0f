"""The user's model: run for its embedding and one layer's output, and left as it was."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gcfast._checks import require_images, suggestions
from gcfast.errors import UnsupportedModelError
from gcfast.model.capture import (
    Capture,
    Captured,
    called,
    current_capture,
    evaluating,
    first_tensor,
)
from gcfast.model.compiled import CompiledPasses, compiler_of
from gcfast.model.finer import Refine, check_finer, checked_names, finer_layers
from gcfast.model.layers import Strides, candidates, default_of, layout_of, note_stride
from gcfast.model.refusals import QUANTIZED, check_model_runs, is_quantized, no_default
from gcfast.model.tokens import Layout, Reshape, TokenGrid, takes_image_size
from gcfast.model.watch import Modules

# What a RuntimeError says where a model cannot take channels-last input.
LAYOUT_WORDS = ("view size is not compatible", "channels_last", "memory format", "stride")

MULTIPLYING = (nn.Conv2d, nn.Linear)  # modules whose weights tell what the model computes in

_T = TypeVar("_T")


class Network:
    """An embedding network and the layer whose output is explained.

    Args:
        model: images [B, 3, ·, ·] → embeddings [B, D]; any ``nn.Module``. Wrappers of torch.compile
            and of data parallelism are taken off.
        layer: dotted name or module, or "NAME@2" for the second run of a module that runs several
            times; None takes the one that :mod:`gcfast.model.layers` finds at the first forward
            pass.
        output_key: where the embedding is in an output that is a dict, an object or a tuple; a path
            such as "vision.image_embeds" in nested ones.
        reshape: from the layer's output, and the images' (h, w) if it takes a second argument, to
            [B, C, H, W]; it may pick and rearrange values, not compute with them, since gradients
            go through it as well. None recognises [B, C, H, W], [B, H, W, C] and tokens.
        refine: names or modules of earlier layers, coarse to fine, whose outputs a pass may take as
            well; "auto" for those that :func:`gcfast.model.finer.finer_layers` finds.

    Raises:
        TypeError: a model or layer of another kind; a model that takes other inputs.
        ValueError: a layer that the model does not have.
        UnsupportedModelError: a compiled, scripted or exported model, whose layers cannot be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        output_key: str | int | None = None,
        reshape: Reshape | None = None,
        refine: Refine = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        if reshape is not None and not callable(reshape):
            raise TypeError(f"`reshape` must be callable, got {type(reshape).__name__}")
        self.model = unwrapped(model)
        check_model_runs(self.model)
        compiler = compiler_of(model)
        # The compiled passes of a model that came compiled; None where it did not, or cannot be.
        self.compiled = None if compiler is None else CompiledPasses(self.model, compiler)
        self.output_key = output_key
        self.reshape = reshape
        # Asked once: a signature is dear, and no compiler traces it.
        self._sized = reshape is not None and takes_image_size(reshape)
        # What stands for `reshape` where none is given: None until a pass has told, or where the
        # layer gives [B, C, H, W].
        self.layout: Layout | None = None
        self._laid_out = reshape is not None
        self.layer: nn.Module | None = None
        self.layer_name: str | None = None
        self.layer_run = 1  # which of the layer's runs in a forward pass
        self.image_shape: tuple[int, ...] | None = None  # of the first images that came
        self.names_run = False  # whether the layer's name says so; else there may be only one
        self.argument = "layer"  # what messages call it
        self.min_places = 2  # H W of the layer's output
        # Whether the model gives scores, [B, D] or one for each pixel as well, not embeddings.
        self.scores = False
        self.refine = refine
        # A network each, of the same model; None until the first pass that asks for them.
        self.finer: tuple[Network, ...] | None = () if refine is None else None
        if layer is not None:
            self.set_layer(layer)
        if refine is not None and refine != "auto":
            self.finer = self._networks(checked_names(refine))
        self.channels_last = any(isinstance(m, nn.Conv2d) for m in self.model.modules())
        # Whether a later layer overwrites the captured one in place; None until a pass has told.
        self.clone: bool | None = None
        # Whether the model turns gradients off for a while itself, and back to what they were.
        self.switches_grad = False
        self._modules = Modules(self.model)
        self._lock = threading.Lock()
        self._hooks = 0
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def has_layer(self, name: str) -> bool:
        """Whether the model has a module of this dotted name."""
        return _name_and_run(name)[0] in dict(self.model.named_modules())

    def set_layer(self, layer: str | nn.Module) -> None:
        """Explain this layer; raises as the class."""
        name, run = _name_and_run(layer) if isinstance(layer, str) else (layer, None)
        found, self.layer = _find_layer(self.model, name, self.argument)
        self.layer_name = found if run is None else f"{found}@{run}"
        self.layer_run = run or 1
        self.names_run = run is not None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the lock and the hook of passes under way."""
        own = {"_lock": None, "_hooks": 0, "_handle": None, "_modules": None, "compiled": None}
        return vars(self) | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._modules = Modules(self.model)
        self._lock = threading.Lock()

    @property
    def module_name(self) -> str:
        """The layer's dotted name, without the run that it may name; "" while it is not known."""
        return _name_and_run(self.layer_name or "")[0]

    def device(self, fallback: torch.device) -> torch.device:
        """The device of the first parameter or buffer."""
        first = _first(self.model, _parameter)
        if first is None:
            first = next(self.model.buffers(), None)
        return fallback if first is None else first.device

    def dtype_for(self, images: Tensor) -> torch.dtype:
        """The dtype in which the model takes images: their own where a layer of it works in that.

        The first parameter would not do: half-precision models keep their norms, and often a loose
        parameter before them, in float32.
        """
        others: list[torch.dtype] = []

        def same(module: nn.Module) -> torch.dtype | None:
            if isinstance(module, MULTIPLYING) and module.weight.is_floating_point():
                dtype: torch.dtype = module.weight.dtype
                if dtype == images.dtype:
                    return dtype
                others.append(dtype)
            return None

        if (found := _first(self.model, same)) is not None:
            return found
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return others[0] if others else next(floating, images.dtype)

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
        dtype = self.dtype_for(images)
        autocast = torch.is_autocast_enabled(images.device.type)
        if images.dtype != dtype and not autocast:
            wanted, got = (str(d).removeprefix("torch.") for d in (dtype, images.dtype))
            raise TypeError(f"`{name}` must have the model's dtype, {wanted}, got {got}")
        return images

    def embed(self, images: Tensor, *, finer: bool = False) -> Captured:
        """One forward pass without a graph, [B, 3, h, w] as the model takes it.

        ``finer`` also takes the outputs of the layers that refine maps.
        """
        if finer and self.finer is None:
            self._find_finer(images[:1])
        layers = (self, *(self.finer or ())) if finer else (self,)
        if any(network.clone is None for network in layers):
            # Only a tensor made outside inference mode counts the writes to it.
            with torch.inference_mode(False), torch.no_grad():
                images = images.clone() if images.is_inference() else images
                capture, output = self._run(images, differentiable=False, finer=finer)
            overwritten = [one.learn() for one in (capture, *capture.finer)]
            if not any(overwritten):
                return self._captured(capture, output, images)
        with torch.no_grad():
            capture, output = self._run_compiled(images, layers) or self._run(
                images, differentiable=False, finer=finer
            )
            return self._captured(capture, output, images)

    @contextmanager
    def differentiable(
        self,
        images: Tensor,
        *,
        replace: Callable[[Tensor], Tensor] | None = None,
        finer: bool = False,
        also: tuple[Network, ...] = (),
    ) -> Iterator[Captured]:
        """A forward pass whose graph begins at the layer, so that no gradient enters the backbone.

        ``replace`` may put another activation in the place of the layer's output; ``finer`` is as
        for :meth:`embed`. ``also`` are networks of the same model whose layers are captured too;
        the graph then begins at the first of the layers to run.
        """
        if finer and self.finer is None:
            self._find_finer(images[:1])
        with torch.inference_mode(False):
            images = images.clone() if images.is_inference() else images
            with torch.set_grad_enabled(self.switches_grad):
                capture, output = self._run(images, True, replace, finer, also)
            if not output.requires_grad and not self.switches_grad:
                # A no_grad block in the model that ended behind the layer has set the mode back to
                # ours. Under enable_grad it works; the layers before are in a graph for nothing.
                with torch.enable_grad():
                    capture, output = self._run(images, True, replace, finer, also)
                self.switches_grad = output.requires_grad
            with torch.enable_grad():
                captured = self._captured(capture, output, images)
                if not captured.output.requires_grad:
                    raise self.without_gradient(inference=output.is_inference())
                yield captured

    def without_gradient(self, *, inference: bool = False) -> ValueError:
        """Say that no gradient comes from the embedding to the layer, and why."""
        why = "which the output does not depend on (or the model detaches it)"
        if inference:
            why = "but the model's forward pass runs under torch.inference_mode"
        elif is_quantized(self.model):
            why = f"but {QUANTIZED}: give the model that it was made from"
        return ValueError(
            f"`layer` must be on the way to the embedding, got {self.layer_name!r}, {why}"
        )

    def prepared(self, images: Tensor) -> Tensor:
        """The images in the memory format that the model takes best."""
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images.contiguous()

    def _run(
        self,
        images: Tensor,
        differentiable: bool,
        replace: Callable[[Tensor], Tensor] | None = None,
        finer: bool = False,
        also: tuple[Network, ...] = (),
    ) -> tuple[Capture, Tensor]:
        with evaluating(self.model, self._modules):
            if self.image_shape is None:
                self.image_shape = tuple(images.shape[1:])
            if self.layer is None:
                self._resolve(images)
            layers = (self.finer or ()) if finer else ()
            hooked = (self, *layers, *also)
            for network in hooked:
                network._hook_layer()
            try:
                options = differentiable, replace, layers, also
                try:
                    return self._forward(self.prepared(images), *options)
                except RuntimeError as error:
                    words = str(error)
                    if not self.channels_last or not any(w in words for w in LAYOUT_WORDS):
                        raise
                result = self._forward(images.contiguous(), *options)
                self.channels_last = False  # remembered only now that the other layout has worked
                return result
            finally:
                for network in hooked:
                    network._unhook_layer()

    def _run_compiled(
        self, images: Tensor, layers: tuple[Network, ...]
    ) -> tuple[Capture, Tensor] | None:
        """The same without a graph, through the model's own compiler; None where it has none."""
        if self.compiled is None:
            return None
        try:
            output, taken = self.compiled(layers, self.prepared(images))
        except Exception as error:
            # It is loaded already where a model is compiled, and takes seconds where none is.
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, UnsupportedModelError | TorchDynamoException):
                raise
            warnings.warn(
                f"the model runs uncompiled, since a copy of it that also gives the output of "
                f"{self.layer_name!r} cannot be compiled: {error}",
                stacklevel=2,
            )
            self.compiled = None
            return None
        captures = []
        for network, runs in zip(layers, taken, strict=True):
            network.check_runs(len(runs))
            one = Capture(network)
            one.tensor = runs[network.layer_run - 1]
            captures.append(one)
        captures[0].finer = tuple(captures[1:])
        # A compiler may hand out the same memory again, and the embeddings are the caller's.
        return captures[0], self.embedding(output, len(images)).clone()

    def _forward(
        self,
        images: Tensor,
        differentiable: bool,
        replace: Callable[[Tensor], Tensor] | None,
        layers: tuple[Network, ...],
        also: tuple[Network, ...],
    ) -> tuple[Capture, Tensor]:
        finer = tuple(
            # A pass with a graph does not learn whether it is overwritten.
            Capture(network, clones=network.clone is not False if differentiable else None)
            for network in layers
        )
        capture = Capture(self, differentiable=differentiable, replace=replace, finer=finer)
        capture.also = tuple(Capture(network, differentiable=True) for network in also)
        for one in (capture, *capture.also):
            one.joins = bool(also)
        token = current_capture.set(capture)
        grad_enabled = torch.is_grad_enabled()
        try:
            output = called(self.model, images)
        finally:
            torch.set_grad_enabled(grad_enabled)
            current_capture.reset(token)
        for one in (capture, *finer, *capture.also):
            one.network.check_runs(one.calls)
        if capture.late is not None:
            raise ValueError(
                f"`refine` must name layers that run before {self.layer_name!r}, the one that is "
                f"explained, got {capture.late!r}"
            )
        # What replaces the activation may stand for more images than went in.
        own = capture.tensor if replace is not None else None
        count = len(images) if own is None else len(own)
        return capture, self.embedding(output, count)

    def check_runs(self, runs: int) -> None:
        """Raise UnsupportedModelError unless a pass ran the layer once, or as often as it says."""
        if runs < self.layer_run or (runs > 1 and not self.names_run):
            times = "not at all" if runs == 0 else f"{runs} times"
            hint = f"; 'NAME@{runs}' is its last run" if runs > 1 else ""
            raise UnsupportedModelError(
                f"`{self.argument}` must run once in a forward pass, got {self.layer_name!r}, "
                f"which ran {times}{hint}"
            )

    def arranged(self, tensor: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The layer's output, or a gradient of its shape, as [B, C, H, W]."""
        if self.reshape is not None:
            return self.reshape(tensor, image_size) if self._sized else self.reshape(tensor)  # type: ignore[call-arg]
        return tensor if self.layout is None else self.layout(tensor, image_size)

    def share(self, activations: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
        """The part of the images that activations [B, C, H, W] lie on; see :class:`Captured`."""
        reshape = self.reshape or self.layout
        if not isinstance(reshape, TokenGrid):
            return 1.0, 1.0
        covered = reshape.covered((activations.shape[2], activations.shape[3]), image_size)
        return covered[0] / image_size[0], covered[1] / image_size[1]

    def _captured(self, capture: Capture, output: Tensor, images: Tensor) -> Captured:
        tensor = capture.tensor
        size = (images.shape[2], images.shape[3])
        got = "no tensor" if tensor is None else list(tensor.shape)
        if tensor is not None:
            if not self._laid_out:
                self._lay_out(tensor, images)
            if self.reshape is not None or self.layout is not None:
                tensor = self.arranged(tensor, size)
                if not isinstance(tensor, Tensor):
                    raise TypeError(
                        f"`reshape` must return a tensor [B, C, H, W], got {type(tensor).__name__}"
                    )
                got = f"{list(tensor.shape)} after `reshape`"
        if (
            tensor is None
            or tensor.ndim != 4
            or tensor.shape[2] * tensor.shape[3] < self.min_places
        ):
            raise ValueError(
                f"`{self.argument}` must have a spatial output [B, C, H, W] with H*W > 1, got "
                f"{self.layer_name!r} with {got}; tokens need `reshape` (see gcfast.TokenGrid), "
                "and gcfast.layers(model, image) lists the layers that can be explained"
            )
        leaf = capture.tensor if capture.differentiable else None
        share = self.share(tensor, size)
        finer = tuple(
            one.network._captured(one, output, images).activations for one in capture.finer
        )
        check_finer(self, tensor, share, [one.network for one in capture.finer], finer, size)
        also = tuple(one.network._captured(one, output, images) for one in capture.also)
        return Captured(output, tensor, leaf, size, share, finer, also)

    def _lay_out(self, tensor: Tensor, images: Tensor) -> None:
        """Find the layout of the layer's output, by a pass of one image where tokens need it."""
        assert self.layer is not None
        size, strides = (images.shape[2], images.shape[3]), Strides()
        shape: Sequence[int] = (1, *tensor.shape[1:])
        if tensor.ndim == 3:
            shape, strides = self._tokens_of_one(images[:1])
        spatial, layout = layout_of(shape, self.layer, size, strides)
        if tensor.ndim == 4 and not spatial and min(tensor.shape[2:]) > 1:
            raise ValueError(
                f"`{self.argument}` must have an output that lies on the image, got "
                f"{self.layer_name!r} with {list(tensor.shape)} for images of "
                f"{size[0]} x {size[1]}: neither [B, C, H, W] nor [B, H, W, C] does; give "
                "`reshape`, or take a layer of gcfast.layers"
            )
        with self._lock:
            self.layout, self._laid_out = layout, True

    def _tokens_of_one(self, image: Tensor) -> tuple[Sequence[int], Strides]:
        """The shape of the layer's output for one image, and the convolutions' strides."""
        strides, shapes = Strides(), []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, nn.Conv2d) and isinstance(output, Tensor) and output.ndim == 4:
                note_stride(module, args, output, image.shape[2:], strides)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            found = first_tensor(output)
            if found is not None:
                shapes.append(found.shape)

        assert self.layer is not None
        handles = [
            m.register_forward_hook(note) for m in self.model.modules() if isinstance(m, nn.Conv2d)
        ]
        handles.append(self.layer.register_forward_hook(keep))
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(image.detach().contiguous())
        finally:
            for handle in handles:
                handle.remove()
        return shapes[min(self.layer_run, len(shapes)) - 1], strides

    def embedding(self, output: Any, count: int) -> Tensor:
        """The [B, D] embedding in what the model returned; [B, D, 1, 1] is flattened.

        Of a model that gives ``scores`` they may have further dimensions.
        """
        if self.output_key is not None:
            output = _part(output, self.output_key, count)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"`model` must return a tensor [B, D], got {type(output).__name__}; choose one of "
                f"its parts with `output_key`: {_keys(output, count)}"
            )
        one_each = _is_embedding(output, count)
        dense = self.scores and output.ndim > 2 and output.shape[0] == count and not one_each
        if not one_each and not dense:
            what = "scores" if self.scores else "embeddings"
            raise ValueError(
                f"`model` must return {what} of shape [B, D] with B = {count}, "
                f"got {list(output.shape)}"
            )
        if not output.is_floating_point():
            raise TypeError(f"`model` must return floating point, got {output.dtype}")
        if output.ndim == 2 or dense:
            return output
        # The graph of a differentiable pass goes on through the view, though its block has ended.
        with torch.set_grad_enabled(output.requires_grad):
            return output.flatten(1)

    def _hook_layer(self) -> None:
        """One hook on the layer, however many threads have asked for it."""
        assert self.layer is not None
        with self._lock:
            if self._hooks == 0:
                self._handle = self.layer.register_forward_hook(self._hook)
            self._hooks += 1

    def _unhook_layer(self) -> None:
        with self._lock:
            self._hooks -= 1
            if self._hooks == 0 and self._handle is not None:
                self._handle.remove()
                self._handle = None

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        capture = current_capture.get()
        if capture is None:
            return None  # another thread's own use of the model
        for one in capture.all():
            if one.network is self:
                return one.take(output)
        return None

    def _resolve(self, images: Tensor) -> None:
        """Take the default layer of :mod:`gcfast.model.layers`."""
        with self._lock:
            if self.layer is not None:
                return
            found = candidates(self.model, images[:1].contiguous(), self.embedding, every=False)
            default = default_of(found)
            if default is None:
                raise no_default(self.model, found)
            if self.reshape is None:
                self.layout, self._laid_out = default.layout, True
            self.set_layer(default.name)

    def _networks(self, layers: Sequence[str | nn.Module]) -> tuple[Network, ...]:
        """A network for each layer that refines maps."""
        found = []
        for layer in layers:
            network = Network(self.model)
            network.argument = "refine"
            network.set_layer(layer)
            found.append(network)
        return tuple(found)

    def _find_finer(self, image: Tensor) -> None:
        """Take the layers of :mod:`gcfast.model.finer`, which "auto" means."""
        grid = self.embed(image).activations.shape[2:]
        assert self.layer is not None
        with self._lock:
            if self.finer is None:
                at = (self.layer, self.layer_run)
                found = finer_layers(self.model, image.contiguous(), self.embedding, at, grid)
                self.finer = self._networks([one.name for one in found])


def _first(model: nn.Module, part: Callable[[nn.Module], _T | None]) -> _T | None:
    """The part of the first module that has it, in the order of ``modules()``.

    Whose generators take longer: this is asked for every batch.
    """
    pending: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    while pending:
        module = pending.pop()
        if module is None or module in seen:
            continue
        if (found := part(module)) is not None:
            return found
        seen.add(module)
        pending += [*module._modules.values()][::-1]
    return None


def _parameter(module: nn.Module) -> Tensor | None:
    return next((p for p in module._parameters.values() if p is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallelism's wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def _find_layer(model: nn.Module, layer: str | nn.Module, argument: str) -> tuple[str, nn.Module]:
    names = {name: module for name, module in model.named_modules() if name}
    if isinstance(layer, nn.Module):
        layer = unwrapped(layer)
        for name, module in names.items():
            if module is layer:
                return name, module
        raise ValueError(
            f"`{argument}` must be a module of `model`, got a {type(layer).__name__} that is not "
            "in it"
        )
    if not isinstance(layer, str):
        raise TypeError(
            f"`{argument}` must be a dotted name or a module, got {type(layer).__name__}"
        )
    if layer not in names:
        raise ValueError(
            f"`{argument}` must name a module of `model`, got {layer!r}; close to it: "
            f"{suggestions(layer, names)}"
        )
    return layer, names[layer]


def _name_and_run(name: str) -> tuple[str, int | None]:
    """Name and run of "NAME@2"; the run is None where none is given."""
    head, mark, run = name.rpartition("@")
    return (head, int(run)) if mark and run.isdigit() and int(run) else (name, None)


def _part(output: Any, key: str | int, count: int) -> Any:
    """What is under a key, or at the end of a path of keys, in an output."""
    found = output
    steps = key.split(".") if isinstance(key, str) and key not in _parts(output) else [key]
    for step in steps:
        parts = _parts(found)
        if step in parts:
            found = parts[step]
            continue
        try:  # by number, also in an output object of named parts
            found = list(parts.values())[int(step)]
        except (ValueError, IndexError):
            raise ValueError(
                f"`output_key` must be one of {_keys(output, count)}, got {key!r}"
            ) from None
    return found


def _parts(output: Any) -> dict[str | int, Any]:
    """The named or numbered parts of a model's output."""
    if isinstance(output, Mapping):
        return dict(output)
    if hasattr(output, "_asdict"):  # a named tuple
        return dict(output._asdict())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if isinstance(output, Tensor) or not hasattr(output, "__dict__"):
        return {}
    return {name: value for name, value in vars(output).items() if not name.startswith("_")}


def _keys(output: Any, count: int) -> str:
    """The keys that would give an embedding, or else all there are."""
    usable = list(_embeddings(output, count)) or list(_parts(output))
    if len(usable) > 1 and usable == list(range(len(usable))):
        return f"0 to {len(usable) - 1}"
    return ", ".join(map(repr, usable)) or "none"


def _embeddings(output: Any, count: int, prefix: str = "", depth: int = 3) -> Iterator[str | int]:
    for name, value in _parts(output).items():
        if isinstance(value, Tensor):
            if _is_embedding(value, count) and value.is_floating_point():
                yield f"{prefix}{name}" if prefix else name
        elif depth:
            yield from _embeddings(value, count, f"{prefix}{name}.", depth - 1)


def _is_embedding(tensor: Tensor, count: int) -> bool:
    """Whether a tensor is [B, D], or [B, D, 1, 1] as some models pool."""
    # Not `len`, which fixes a batch size that is being exported as any.
    alike = tensor.ndim >= 2 and tensor.shape[0] == count
    return alike and all(n == 1 for n in tensor.shape[2:])
