"""What stands for torch.cuda, and what Python asks of tensors; see pretend_cuda.py."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from pretend_memory import Event, Graph, Pretended, Stream
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gcfast import reference

aten = torch.ops.aten


def replace_torch_cuda(mode: Any) -> None:
    """What stands for torch.cuda, and for the launchers where kernels are not interpreted."""
    properties = SimpleNamespace(multi_processor_count=mode.multiprocessors)
    stands = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: mode.index,
        "device": lambda device: mode.on_device(mode.device_of(device).index),
        "device_of": lambda tensor: mode.on_device(tensor.get_device()),
        "Stream": Stream,
        "Event": Event,
        "current_stream": mode.stream,
        "stream": mode.on_stream,
        "synchronize": lambda device=None: mode.stream(device).synchronize(),
        "get_device_properties": lambda _: properties,
        "mem_get_info": lambda _=None: (2**34, 2**35),
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
        "graph": mode.captured,
    }
    for name, stand in stands.items():
        mode.patch.setattr(torch.cuda, name, stand)
    autocast, on, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    # C++ takes the tensors for the CPU's, and so does its autocast.
    mapped = {"cuda": "cpu"}
    mode.patch.setattr(
        torch, "autocast", lambda kind, *a, **k: autocast(mapped.get(kind, kind), *a, **k)
    )
    mode.patch.setattr(
        torch, "is_autocast_enabled", lambda *kind: on(*(mapped.get(k, k) for k in kind))
    )
    mode.patch.setattr(torch, "get_autocast_dtype", lambda kind: dtype(mapped.get(kind, kind)))
    mode.patch.setattr(torch.amp, "is_autocast_available", lambda kind: kind in ("cpu", "cuda"))
    # `module.double()` would set `.data`, which reaches the wrapper and not what it wraps.
    mode.patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    from gcfast.kernels import launch

    mode.patch.setattr(launch, "_multiprocessors", lambda _: mode.multiprocessors)
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def launched(kernel, *args, grid, warmup, **kwargs):
        return mode.launch(kernel, run, args, grid, warmup, kwargs)

    mode.patch.setattr(InterpretedFunction, "run", launched)
    if mode.interpreted:
        return
    for name in ("sparse_cam", "knn", "top_m", "grad_weights", "head_grad_weights",
                 "sample_triplets", "mean_cotangents"):  # fmt: skip
        module = importlib.import_module(f"gcfast.kernels.{name}")
        launch_name = f"launch_{name}"
        stand = _launcher(mode, getattr(module, launch_name), getattr(reference, name))
        mode.patch.setattr(module, launch_name, stand)


def _launcher(mode: Any, launch, wanted):
    """The launcher, whose kernels are checked and not run, with the reference's numbers."""

    def launched(*args, precision="ieee", config=None, **kwargs):
        assert config is None
        more = {"precision": precision} if launch.__name__.startswith("launch_head") else {}
        out = launch(*args, **kwargs, **more)
        inner = tree_map(
            lambda x: x.inner.detach() if isinstance(x, Pretended) else x, (args, kwargs)
        )

        def again() -> None:
            values = tree_leaves(wanted(*inner[0], **inner[1]))
            for tensor, value in zip(tree_leaves(out), values, strict=True):
                assert tensor.dtype == value.dtype, (launch.__name__, tensor.dtype, value.dtype)
                tensor.inner.copy_(value)

        if mode.capturing is not None:
            mode.capturing.tape.append((again, []))
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            again()
        return out

    return launched


class Functions(TorchFunctionMode):
    """What Python asks of tensors without an operation, and what C++ would answer for the CPU."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        kwargs = kwargs or {}
        stand = getattr(self, f"_{getattr(func, '__name__', '')}", None)
        if stand is not None and args and isinstance(args[0], Tensor):
            return stand(func, *args, **kwargs)
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "cuda":
            # Below the mode C++ would make it where it is asked for.
            return self._moved(None, func(*args, **{**kwargs, "device": "cpu"}), (device,), {})
        return func(*args, **kwargs)

    def _to(self, func, tensor, *args, **kwargs):
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        return self._moved(func, tensor, args, kwargs)

    def _moved(self, func, tensor, args, kwargs):
        """C++ takes a pretended tensor for the CPU's: told to go where it is, it would copy."""
        del func
        device = kwargs.pop("device", None)
        rest = list(args)
        if rest and isinstance(rest[0], str | torch.device | int):
            device = rest.pop(0)
        elif rest and rest[0] is None:
            rest.pop(0)
        if rest and isinstance(rest[0], torch.dtype):
            kwargs["dtype"] = rest.pop(0)
        kwargs.setdefault("non_blocking", rest.pop(0) if rest else False)
        device = tensor.device if device is None else torch.device(device)
        if device.type == "cuda":
            device = self.mode.device_of(device)
        dtype = kwargs.get("dtype") or tensor.dtype
        if device == tensor.device and dtype == tensor.dtype and not kwargs.get("copy"):
            return tensor
        self.mode.is_moving = True
        try:
            return aten._to_copy.default(
                tensor, dtype=dtype, device=device, non_blocking=kwargs["non_blocking"],
                memory_format=kwargs.get("memory_format"),
            )  # fmt: skip
        finally:
            self.mode.is_moving = False

    def _cpu(self, func, tensor):
        return self._moved(func, tensor, ("cpu",), {})

    def _cuda(self, func, tensor, device=None, **kwargs):
        return self._moved(func, tensor, (self.mode.device_of(device),), kwargs)

    def _type_as(self, func, tensor, other):
        return self._moved(func, tensor, (other.device, other.dtype), {})

    def _numpy(self, func, tensor, **kwargs):
        if not isinstance(tensor, Pretended):
            return func(tensor, **kwargs)
        if tensor.is_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return tensor.inner.numpy()

    def _tolist(self, func, tensor):
        if isinstance(tensor, Pretended) and tensor.is_cuda:
            return self._cpu(func, tensor).tolist()
        return func(tensor.inner if isinstance(tensor, Pretended) else tensor)

    def _data_ptr(self, func, tensor):
        return func(tensor.inner if isinstance(tensor, Pretended) else tensor)

    def _is_pinned(self, func, tensor, *args):
        return isinstance(tensor, Pretended) or func(tensor, *args)
