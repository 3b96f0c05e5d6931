"""Checks of launchers' arguments. Messages name the argument and its value."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from .launch import is_recording

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def refuse_unless(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def checked_once(check: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a check of positional arguments so that a combination of layouts that has passed is not checked again.

    Of a tensor it may depend on dtype, shape, strides and device alone, of other arguments on their values; it
    returns what follows from those. With ``SFS_TRITON_DEBUG=1``, where checks read values, nothing is remembered.
    """
    passed: dict[tuple, Any] = {}

    @wraps(check)
    def run(*arguments: Any) -> Any:
        if os.environ.get("SFS_TRITON_DEBUG") == "1":
            return check(*arguments)
        key = (is_recording(), *[_layout(x) if isinstance(x, torch.Tensor) else x for x in arguments])
        try:
            if key in passed:
                return passed[key]
        except TypeError:  # an argument of a wrong type, without a hash: the check says which
            return check(*arguments)
        result = check(*arguments)
        if len(passed) >= _MOST_LAYOUTS:
            passed.clear()
        passed[key] = result
        return result

    return run


_MOST_LAYOUTS = 4096  # steps of exact shapes have new ones all the time


def _layout(x: torch.Tensor) -> tuple:
    return x.dtype, x.shape, x.stride(), x.device


def check_tensor(
    name: str,
    x: torch.Tensor,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence,
    device: torch.device | None = None,
    dense: bool = False,
) -> None:
    """Refuse anything but a tensor of one of the dtypes, of ``shape`` and on ``device``.

    In ``shape`` None is any size, and a leading ``...`` any number of leading dimensions. The last dimension
    must be contiguous; with ``dense`` the whole tensor.
    """
    refuse_unless(isinstance(x, torch.Tensor), f"{name} is a {type(x).__name__}, not a tensor")
    if not (x.dtype == dtype if isinstance(dtype, torch.dtype) else x.dtype in dtype):
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, not {names}")
    size = x.shape
    leading = len(shape) > 0 and shape[0] is ...
    sizes = shape[1:] if leading else shape
    have = size[len(size) - len(sizes) :] if leading else size
    if len(have) != len(sizes) or any(want not in (None, got) for want, got in zip(sizes, have, strict=True)):
        wanted = "[" + ", ".join({None: "*", ...: "..."}.get(want, str(want)) for want in shape) + "]"
        raise ValueError(f"{name} has shape {list(size)}, not {wanted}")
    where = x.device
    if device is not None and where != device:
        raise ValueError(f"{name} is on device {str(where)!r}, not {str(device)!r}")
    if where.type == "meta" and not is_recording():
        raise ValueError(f"{name} is on device 'meta', which holds no data")
    if x.numel() > 1:
        if len(size) > 0 and size[-1] != 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}: its last dimension is not contiguous")
        if dense and not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()} and is not contiguous")


def check_index(name: str, index: torch.Tensor, low: int, high: int) -> None:
    """With ``SFS_TRITON_DEBUG=1``, refuse values outside ``[low, high)``. Reads the device, so off by default."""
    if os.environ.get("SFS_TRITON_DEBUG") != "1" or is_recording() or index.numel() == 0:
        return
    least, most = index.min().item(), index.max().item()
    refuse_unless(low <= least and most < high, f"{name} holds values in [{least}, {most}], not in [{low}, {high})")
