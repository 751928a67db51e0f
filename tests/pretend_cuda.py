"""A CUDA device that is pretended: numbers on the CPU, with the rules that a GPU would enforce.

``torch._subclasses.FakeTensorMode`` does not serve here: without CUDA in the build it stops at a
random number, at autograd and at every value that a build looks at on the host. So tensors here are
real ones behind a wrapper that says which device they are on, and :class:`PretendCuda` sees every
operation. It raises for what a GPU would refuse (tensors of two devices, a kernel that is given
memory of the host, an empty or too large grid, a kernel of one device launched while another is the
current one), for what would be a race (memory used on one stream that another may still write to,
or freed while it is read), and notes whatever would make the host wait. Kernels run interpreted, or
are only checked as they are launched, and the reference gives what they would have given.

What it cannot see: the kernels' own code as a GPU runs it, and the order of programs in a launch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter

import torch
from pretend_memory import HOST, Graph, Place, Pretended, Stream, Wait, entered, where
from pretend_torch import Functions, replace_torch_cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

aten = torch.ops.aten
MAX_GRID = (2**31 - 1, 65535, 65535)
# What tells the host how many elements came out, or a value: it waits for the device.
SHAPES_BY_VALUE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


class PretendCuda(TorchDispatchMode):
    """See the module. ``with PretendCuda(monkeypatch) as cuda``; one at a time.

    Attributes:
        waits: what the host waited in.
        uploads: functions that copied host memory to the device.
        launches: names of the kernels launched.
        forms: what Triton would have compiled for them, each with its kernel's name.
        freed: memory freed under a stream that was still using it.
    """

    def __init__(
        self,
        monkeypatch,
        *,
        devices: int = 2,
        multiprocessors: int = 2,
        interpreted: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.count, self.interpreted = monkeypatch, devices, interpreted
        self.multiprocessors = multiprocessors
        self.waits: list[Wait] = []
        self.uploads: list[str] = []
        self.launches: list[str] = []
        self.forms: set[tuple[object, ...]] = set()
        self.freed: list[str] = []
        self.capturing: Graph | None = None
        self.is_moving = False
        self.host: Counter = Counter()  # what the host knows to have ended

    def __enter__(self):
        self._entered = entered(self)
        self._entered.__enter__()
        self.index = 0
        self.defaults = [Stream(torch.device("cuda", i)) for i in range(self.count)]
        self.streams = list(self.defaults)
        replace_torch_cuda(self)
        self._functions = Functions(self)
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *why):
        super().__exit__(*why)
        self._functions.__exit__(*why)
        self._entered.__exit__(*why)

    def device_of(self, device: object) -> torch.device:
        if device is None:
            return torch.device("cuda", self.index)
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", self.index) if device.index is None else device

    def stream(self, device: object = None) -> Stream:
        return self.streams[self.device_of(device).index]

    @contextlib.contextmanager
    def on_device(self, index: int):
        before = self.index
        self.index = before if index < 0 else index
        try:
            yield
        finally:
            self.index = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None):
        if stream is None:
            yield
            return
        index = stream.device.index
        before, self.streams[index] = self.streams[index], stream
        try:
            with self.on_device(index):
                yield
        finally:
            self.streams[index] = before

    @contextlib.contextmanager
    def captured(self, graph: Graph, *, stream: Stream, **_: object):
        with self.on_stream(stream):
            self.capturing = graph
            try:
                yield
            finally:
                self.capturing = None

    def cuda(self, value, device: int = 0):
        """A tensor, or a module in place, moved to the pretended GPU."""
        if isinstance(value, Tensor):
            return self.wrapped(value.detach().clone(), torch.device("cuda", device))
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        self.cuda(parameter, device), parameter.requires_grad
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.cuda(buffer, device)
        return value

    def wrapped(self, inner: Tensor, device: torch.device, place: Place | None = None) -> Pretended:
        if place is None:
            # What a capture allocates is its pool's, and every replay is behind the one before.
            is_stream = device.type == "cuda" and self.capturing is None
            home = self.stream(device) if is_stream else HOST
            place = Place(home)
            weakref.finalize(place, self._free, home, place.read, place.promised)
        return Pretended(inner, device, place)

    def _free(self, home, read, promised) -> None:
        """The allocator's view of memory that is given back: its own stream may have it next."""
        if home is HOST:
            return
        for queue, time in read.items():
            behind = queue is home or home.seen[queue] >= time or queue in promised
            if queue is not HOST and not behind and self.host[queue] < time:
                self.freed.append(f"freed on its own stream while {queue} may read it")

    def wait(self, what: str, seen: Counter) -> None:
        assert not self.capturing, f"the host waits in a capture: {what} in {where()}"
        self.host |= seen
        self.waits.append(Wait(what, where()))

    def use(self, queue, place: Place, writes: bool, what: str) -> None:
        seen = self.host if queue is HOST else queue.now() | self.host
        earlier = [] if place.written is None else [place.written]
        if writes:
            earlier += place.read.items()
        for other, time in earlier:
            if other is not HOST and other is not queue and seen[other] < time:
                raise AssertionError(
                    f"{what} in {where()}: not ordered behind another stream's use"
                )
        if writes:
            place.written = (queue, self._time(queue))
        place.read[queue] = self._time(queue)  # for the allocator, writing is using too

    @staticmethod
    def _time(queue) -> int:
        return 0 if queue is HOST else queue.time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, types, args, kwargs or {})

    def run(self, func, types, args, kwargs):
        del types
        if func.namespace == "gcfast":  # as eager PyTorch runs it on a GPU
            from gcfast.ops import library

            super().__enter__()
            try:
                return getattr(library, func._opname)._init_fn(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        leaves, _ = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
        pinned = bool(kwargs.get("pin_memory"))
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if not given and (asked is None or asked.type != "cuda") and not pinned:
            return func(*args, **kwargs)
        if asked is not None and asked.type == "cuda":
            asked = self.device_of(asked)
        devices = {leaf.device for leaf in given if leaf.is_cuda}
        if func is aten._to_copy.default and devices and not self.is_moving:
            asked = None  # autograd, for which the tensor is the CPU's
        if func not in COPIES:
            self._require_one_device(func, args, kwargs, leaves, devices)
        inner_args, inner_kwargs = tree_map(
            lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs)
        )
        for name in ("device", "pin_memory"):
            inner_kwargs.pop(name, None)
        if asked is not None and func is not aten._to_copy.default:
            inner_kwargs["device"] = "cpu"
        here = next(iter(devices), torch.device("cpu"))
        target = asked or here
        if func is aten.copy_.default:
            target = args[0].device
        self._order(func, args, kwargs, given, devices | ({target} - {torch.device("cpu")}))
        out = func(*inner_args, **inner_kwargs)
        if self.capturing is not None:
            self._tape(func, inner_args, inner_kwargs, out, args, kwargs, given)
        self._note_waits(func, args, kwargs, devices, target)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        return self._results(func, args, kwargs, out, given, target, pinned)

    def _tape(self, func, inner_args, inner_kwargs, out, args, kwargs, given) -> None:
        written = _written(func, args, kwargs)

        def again() -> None:
            new = func(*inner_args, **inner_kwargs)
            if not written and not func.is_view:
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(value)

        uses = [(leaf.place, any(leaf is w for w in written)) for leaf in given]
        self.capturing.tape.append((again, uses))

    def _require_one_device(self, func, args, kwargs, leaves, devices) -> None:
        if len(devices) > 1:
            raise RuntimeError(f"{func}: tensors on {devices}")
        if not devices:
            return
        if func in INDEXED:  # an index may be on the host, and is copied
            for leaf in tree_leaves(args[1]):
                if isinstance(leaf, Tensor) and not leaf.is_cuda:
                    self.uploads.append(where())
            leaves = [args[0], *tree_leaves(args[2:])]
        strangers = [
            leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cuda and leaf.ndim
        ]
        if strangers:
            shapes = [list(leaf.shape) for leaf in strangers]
            raise RuntimeError(f"{func}: expected all tensors to be on {devices}, got CPU {shapes}")
        del kwargs

    def _order(self, func, args, kwargs, given, devices) -> None:
        on = [device for device in devices if device.type == "cuda"]
        queue = self.stream(on[0]) if on else HOST
        if queue is not HOST:
            queue.seen |= self.host
            queue.time += 1
        written = _written(func, args, kwargs)
        for leaf in given:
            if torch.Tag.inplace_view in func.tags or func.is_view:
                continue
            self.use(queue, leaf.place, any(leaf is w for w in written), str(func))

    def _note_waits(self, func, args, kwargs, devices, target) -> None:
        if not devices:
            # From the host to a device, without waiting where the memory is pinned.
            if target.type == "cuda" and func in COPIES:
                self._note_upload(args[-1] if func is aten.copy_.default else args[0], args, kwargs)
            return
        stream = self.stream(next(iter(devices)))
        if func in READS:
            self.wait("read", stream.now())
        elif func in SHAPES_BY_VALUE or (
            func in INDEXED
            and any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
                for i in tree_leaves(args[1])
            )
        ):
            self.wait("shape", stream.now())
        elif func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            if not source.is_cuda:
                self._note_upload(source, args, kwargs)
            elif target.type == "cpu":
                unbound = kwargs.get("non_blocking") or (
                    func is aten.copy_.default and len(args) > 2 and args[2]
                )
                if not unbound:
                    self.wait("download", stream.now())
                elif not isinstance(args[0], Pretended) or func is aten._to_copy.default:
                    raise AssertionError(f"a copy that is not waited for to pageable: {where()}")

    def _note_upload(self, source, args, kwargs) -> None:
        del args, kwargs
        assert not self.capturing or source.ndim == 0, f"an upload in a capture: {where()}"
        self.uploads.append(where())

    def _results(self, func, args, kwargs, out, given, target, pinned):
        views = func.is_view or torch.Tag.inplace_view in func.tags
        written = _written(func, args, kwargs)
        if written and all(isinstance(w, Pretended) for w in written):
            return return_and_correct_aliasing(func, args, kwargs, out)
        if written:  # a plain host tensor that was copied into
            return written[0]
        if target.type == "cpu" and not pinned and not views:
            return out

        def wrap(tensor):
            if not isinstance(tensor, Tensor):
                return tensor
            place = given[0].place if views and given else None
            got = self.wrapped(tensor, target if not views or not given else given[0].device, place)
            if place is None:
                got.place.written = (HOST, 0) if target.type == "cpu" else self._stamp(target)
            return got

        leaves, spec = tree_flatten(out)
        return tree_unflatten([wrap(leaf) for leaf in leaves], spec)

    def _stamp(self, device):
        stream = self.stream(device)
        return stream, stream.time

    def launch(self, kernel, run, args, grid, warmup, kwargs):
        name = kernel.fn.__name__
        options = {"num_warps", "num_stages", "enable_fp_fusion"}
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for tensor in tensors:
            if not tensor.is_cuda:
                raise ValueError(f"{name}: a pointer argument is in the host's memory")
            if tensor.device.index != self.index:
                raise AssertionError(f"{name}: on {tensor.device}, launched on cuda:{self.index}")
        assert tensors, name
        assert 1 <= len(grid) <= 3, (name, grid)
        for size, most in zip(grid, MAX_GRID, strict=False):
            assert type(size) is int, (name, grid)
            assert 1 <= size <= most, f"{name}: a grid of {grid}"
        for key, value in kwargs.items():
            if key in options or isinstance(value, Tensor):
                continue
            assert isinstance(value, int | float | str), (name, key, value)
            if key.startswith("BLOCK"):
                assert value & (value - 1) == 0, f"{name}: {key} = {value}"
        for value in args:
            assert isinstance(value, Tensor | int | float), f"{name}: {value!r}"
        stream = self.stream()
        stream.seen |= self.host
        stream.time += 1
        for tensor in tensors:
            self.use(stream, tensor.place, False, name)
        for tensor in tensors:
            tensor.place.written = (stream, stream.time)
        self.launches.append(name)
        self.forms.add((name, *_form(kernel, args, kwargs)))
        args, kwargs = tree_map(
            lambda x: x.inner.detach() if isinstance(x, Pretended) else x, (args, kwargs)
        )

        def again() -> None:
            if self.interpreted:
                run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        if self.capturing is not None:
            self.capturing.tape.append((again, [(tensor.place, True) for tensor in tensors]))
        again()


def _form(kernel, args, kwargs) -> list[object]:
    """What Triton compiles by: constants, dtypes, and which integers are 1 or divisible by 16."""
    plain = kernel.kwargs.get("do_not_specialize") or ()
    found: list[object] = sorted((k, v) for k, v in kwargs.items() if not isinstance(v, Tensor))
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, Tensor):
            found.append(value.dtype)
        elif isinstance(value, int):
            kind = "" if name in plain else "1" if value == 1 else "16" if value % 16 == 0 else ""
            found.append((name, kind, abs(value) < 2**31))
    return found


def _written(func, args, kwargs) -> list[Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
