"""What kernel tests and benchmarks share: an error budget, poisoned outputs, guard bands, a brisker interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy
import torch

_BAND = 1024  # bytes on each side, and so that what lies between stays aligned


def poison(dtype: torch.dtype) -> float | int:
    """A value that spoils whatever reads it: NaN, or an integer far outside every tensor."""
    if dtype.is_floating_point:
        return float("nan")
    return {torch.bool: 1, torch.uint8: 0xAB, torch.int8: -0x55}.get(dtype, -0x55555556)


class Guards:
    """Tensors between bands of poison. Reading a band spoils a result, writing one is found by :meth:`check`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = device
        self._bands: list[torch.Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A dense tensor full of poison."""
        count, band = torch.Size(shape).numel(), _BAND // dtype.itemsize
        buffer = torch.full((count + 2 * band,), poison(dtype), dtype=dtype, device=self._device)
        self._bands += [buffer[:band], buffer[band + count :]]
        return buffer[band : band + count].view(shape)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """A dense copy of ``x``."""
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def check(self) -> None:
        """Raise AssertionError if a band was written."""
        for band in self._bands:
            wanted = torch.full_like(band, poison(band.dtype))
            assert torch.equal(band.view(torch.uint8), wanted.view(torch.uint8)), f"wrote outside a {band.dtype} tensor"


def assert_within_budget(
    actual: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, *, tolerance: float = 1e-6
) -> None:
    """``actual`` may err as much as torch does in its own dtype, and ``tolerance`` of the largest value more.

    Args:
        actual: the kernel's result.
        truth: the same in float32 or float64.
        same_dtype: torch's result in the kernel's dtype.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    assert actual.dtype == same_dtype.dtype, f"dtype {actual.dtype}, not {same_dtype.dtype}"
    if truth.numel() == 0:
        return
    wide = truth.double()
    finite = wide.isfinite()
    assert torch.equal(actual.double()[~finite].nan_to_num(), wide[~finite].nan_to_num()), "other NaN or infinities"
    error = (actual.double() - wide)[finite].abs()
    assert not error.isnan().any(), "NaN where there should be none"
    if error.numel() == 0:
        return
    allowed = (same_dtype.double() - wide)[finite].abs().max() + tolerance * wide[finite].abs().max()
    # a result is rounded once more than the truth: half a unit in its last place is nobody's error
    allowed = allowed + wide[finite].abs().max() * torch.finfo(actual.dtype).eps / 2
    assert error.max() <= allowed, f"error {error.max():.3e}, allowed {allowed:.3e}"


@contextmanager
def brisk_interpreter(*, overflow_checks: bool = True) -> Iterator[None]:
    """Triton's interpreter, which patches its language anew at every launch and every nested call, patched once.

    That is a quarter of its time; its checks of integer overflow are a sixth. Nor does numpy warn of what is computed
    in lanes that a mask discards. Results stay the same. Reaches into parts of triton (3.6 to 3.9) that are its own
    business, so it is for tests only. Does nothing where kernels are compiled.
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
