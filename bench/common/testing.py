"""Helpers shared by tests and benchmarks: an error budget, poisoned outputs, guard bands, a check for host reads, a
faster interpreter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfs_triton.ops.torch import host
from sfs_triton.self_check.budget import assert_within_budget  # noqa: F401  tests import it from here

_BAND = 1024  # bytes on each side, and so that what lies between stays aligned


def poison(dtype: torch.dtype) -> float | int:
    """Return a value that spoils every result computed from it: NaN, or an integer far outside every tensor."""
    if dtype.is_floating_point:
        return float("nan")
    return {torch.bool: 1, torch.uint8: 0xAB, torch.int8: -0x55}.get(dtype, -0x55555556)


class Guards:
    """Tensors between bands of poison. Reading a band spoils a result, writing one is found by :meth:`check`. In the
    interpreter :func:`guarded_loads` finds every read of a band."""

    alive: weakref.WeakSet[Guards] = weakref.WeakSet()

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = device
        self._bands: list[torch.Tensor] = []
        self.alive.add(self)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A dense tensor full of poison."""
        count, band = torch.Size(shape).numel(), _BAND // dtype.itemsize
        buffer = torch.full((count + 2 * band,), poison(dtype), dtype=dtype, device=self._device)
        self._bands += [buffer[:band], buffer[band + count :]]
        return buffer[band : band + count].view(shape)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """A dense copy of ``x``."""
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def check_loads(self, addresses: numpy.ndarray) -> None:
        """Raise AssertionError if one of ``addresses`` is in a band."""
        for band in self._bands:
            first = band.data_ptr()
            outside = (addresses >= first) & (addresses < first + band.nbytes)
            assert not outside.any(), f"loaded outside a {band.dtype} tensor"

    def check(self) -> None:
        """Raise AssertionError if a band was written."""
        for band in self._bands:
            wanted = torch.full_like(band, poison(band.dtype))
            assert torch.equal(band.view(torch.uint8), wanted.view(torch.uint8)), f"wrote outside a {band.dtype} tensor"


_READS = {  # operations whose result, or the size of it, the host takes from the device
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_READERS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")
_WAITS = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in _READS:
            raise AssertionError(f"{func} reads on the host")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise AssertionError(f"{func} without output_size reads its size on the host")
        if name == "index_fill" and any(isinstance(value, torch.Tensor) for value in args[3:]):
            raise AssertionError(f"{func} reads its value on the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in args[1]):
                raise AssertionError(f"{func} with a mask reads on the host how many are set")
        source, target = _copied(name, args, kwargs)
        if source.type != "cpu" and target.type == "cpu":
            raise AssertionError(f"{func} copies from {str(source)!r} to the host")
        with self:  # an operation that is made of others is watched through those
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _copied(name: str, args: tuple, kwargs: dict) -> tuple[torch.device, torch.device]:
    """The devices that a copy goes from and to; of anything else twice the same."""
    if name in ("copy_", "copy"):
        return args[1].device, args[0].device
    if name == "_to_copy":
        return args[0].device, torch.device(kwargs.get("device") or args[0].device)
    return (torch.device("cpu"),) * 2


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{name} reads or waits on the host")

    return refuse


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Raise AssertionError where torch, called within, makes the host read a value, or wait for the device.

    On a CPU, where a read costs nothing and shows nowhere, it finds what would be a synchronisation on a GPU: values
    taken out of tensors, sizes that depend on values, and copies from another device. Making tensors of what the host
    knows is fine. Holds for torch's operations in this thread, and for methods of tensors in all threads. Operations
    take the way that they take on a GPU.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(host, "reads_are_free", lambda x: False))
        for owner, name in (*((torch.Tensor, name) for name in _READERS), *_WAITS):
            stack.enter_context(mock.patch.object(owner, name, _refusal(f"{owner.__name__}.{name}")))
        stack.enter_context(_NoReads())
        yield


@contextmanager
def guarded_loads() -> Iterator[None]:
    """Raise AssertionError where an interpreted kernel loads from a band of :class:`Guards`.

    This finds loads that no result depends on. Does nothing where kernels are compiled.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load = builder.create_masked_load

    def checked(pointers, mask, *options):
        for guards in Guards.alive:
            guards.check_loads(pointers.data[mask.data.astype(bool)])
        return load(pointers, mask, *options)

    with mock.patch.object(builder, "create_masked_load", checked):
        yield


@contextmanager
def brisk_interpreter(*, overflow_checks: bool = True) -> Iterator[None]:
    """Patch Triton's language for the interpreter once, instead of at every launch and every nested call.

    Patching takes a quarter of the interpreter's time; its checks of integer overflow take a sixth. Numpy warnings are
    off for values computed in elements that a mask discards. Results stay the same. Patches private parts of triton
    (3.6 to 3.9), so it is for tests only. Does nothing where kernels are compiled.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = replace(builder.options, sanitize_overflow=overflow_checks)
    languages = {"tl": triton.language, "core": triton.language.core}  # as kernels have it, and as triton's library has
    patches = interpreter._patch_lang(SimpleNamespace(__globals__=languages))
    with (
        mock.patch.object(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None)),
        mock.patch.object(builder, "options", options),
        numpy.errstate(divide="ignore", invalid="ignore", over="ignore"),
    ):
        yield
    patches.restore()
