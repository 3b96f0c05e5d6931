"""Checks of launchers' arguments. Messages name the argument and its value."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .launch import is_recording

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def refuse_unless(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


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
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
    refuse_unless(x.dtype in allowed, f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, not {names}")
    leading = len(shape) > 0 and shape[0] is ...
    sizes = shape[1:] if leading else shape
    have = x.shape[x.dim() - len(sizes) :] if leading else x.shape
    fits = len(have) == len(sizes) and all(want in (None, size) for want, size in zip(sizes, have, strict=True))
    wanted = "[" + ", ".join({None: "*", ...: "..."}.get(size, str(size)) for size in shape) + "]"
    refuse_unless(fits, f"{name} has shape {list(x.shape)}, not {wanted}")
    where = f"{name} is on device {str(x.device)!r}"
    refuse_unless(device is None or x.device == device, f"{where}, not {str(device)!r}")
    refuse_unless(x.device.type != "meta" or is_recording(), f"{where}, which holds no data")
    if x.numel() > 1:
        last = x.dim() == 0 or x.shape[-1] == 1 or x.stride(-1) == 1
        refuse_unless(last, f"{name} has strides {x.stride()}: its last dimension is not contiguous")
        refuse_unless(not dense or x.is_contiguous(), f"{name} has strides {x.stride()} and is not contiguous")


def check_index(name: str, index: torch.Tensor, low: int, high: int) -> None:
    """With ``SFS_TRITON_DEBUG=1``, refuse values outside ``[low, high)``. Reads the device, so off by default."""
    if os.environ.get("SFS_TRITON_DEBUG") != "1" or is_recording() or index.numel() == 0:
        return
    least, most = index.min().item(), index.max().item()
    refuse_unless(low <= least and most < high, f"{name} holds values in [{least}, {most}], not in [{low}, {high})")
