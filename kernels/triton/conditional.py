"""Setting the condition of a CUDA graph's conditional node from a Triton kernel.

Only device code can set it, by ``cudaGraphSetConditional``, and Triton has no such operation. So a few lines of LLVM
call it and are linked into the kernel by Triton's ``extern_libs``: ptxas knows the function (it refuses other
undefined ones), and the driver resolves it when it loads the kernel. Compiled ahead of time; it has not run on a GPU.
"""

from __future__ import annotations

from functools import reduce

import torch
import triton
import triton.language as tl

from .check import INTEGERS, check_tensor, refuse_unless
from .cost import Cost
from .launch import launch

NO_HANDLE = -1  # set nothing: outside the graph that owns a handle the call is an illegal access
MAX_FLAGS = 1024

# One thread calls; ptxas does not check the signature. There is a result because Triton's external functions have one.
LIBRARY = f"""
declare void @cudaGraphSetConditional(i64, i32)
declare i32 @llvm.nvvm.read.ptx.sreg.tid.x()

define i32 @sfs_set_condition(i64 %handle, i32 %value) {{
  %thread = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %first = icmp eq i32 %thread, 0
  %known = icmp ne i64 %handle, {NO_HANDLE}
  %calls = and i1 %first, %known
  br i1 %calls, label %set, label %end
set:
  call void @cudaGraphSetConditional(i64 %handle, i32 %value)
  br label %end
end:
  ret i32 0
}}
"""


@tl.core.extern
def _set(handle, value, _semantic=None):
    symbols = {(tl.int64, tl.int32): ("sfs_set_condition", tl.int32)}
    return tl.core.extern_elementwise("", "", [handle, value], symbols, is_pure=False, _semantic=_semantic)


@triton.jit(do_not_specialize=["n_flags"])
def _set_condition_kernel(
    flags_ptr,
    handle_ptr,
    value_ptr,
    n_flags,
    stride_flags,
    HAS_HANDLE: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    WHEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    at = tl.arange(0, BLOCK_N)
    flags = tl.load(flags_ptr + at.to(tl.int64) * stride_flags, mask=at < n_flags, other=1)
    value = tl.min((flags != 0).to(tl.int32), axis=0)
    if not WHEN:
        value = 1 - value
    if HAS_VALUE:
        tl.store(value_ptr, value)
    if HAS_HANDLE:
        _set(tl.load(handle_ptr), value)


def library() -> str:
    """Path of :data:`LIBRARY` in Triton's cache, in a folder named after its content. Written anew, atomically."""
    key = reduce(lambda sum_, byte: (sum_ * 31 + byte) % 2**61, LIBRARY.encode(), 0)
    return triton.runtime.cache.get_cache_manager(f"{key:016x}").put(LIBRARY, "conditional.ll", binary=False)


def set_condition(
    flags: torch.Tensor, *, when: bool, handle: torch.Tensor | None = None, value: torch.Tensor | None = None
) -> None:
    """``(flags != 0).all() == when``, as 0 or 1, becomes the condition of ``handle``: other values would match no body.

    Args:
        flags: ``[n]``, int32 or int64, at most 1,024; any stride, so a column of the control matrix will do.
        when: False to go on until all flags are set, True to branch on a flag that is.
        handle: ``[1]``, int64: a ``CUgraphConditionalHandle``, read when the kernel runs. So a launch can be captured
            before its handle exists, and no variant is compiled for a value. :data:`NO_HANDLE` sets nothing: launched
            so, outside any graph, the kernel is warm for its capture.
        value: ``[1]``, int32; receives the condition as well, for tests and traces.
    """
    refuse_unless(isinstance(flags, torch.Tensor) and flags.dim() == 1, "flags is not a tensor of one dimension")
    check_tensor("flags", flags[:, None], dtype=INTEGERS, shape=[None, 1])
    refuse_unless(1 <= len(flags) <= MAX_FLAGS, f"flags has {len(flags)} values, not 1 to {MAX_FLAGS}")
    if handle is not None:
        check_tensor("handle", handle, dtype=torch.int64, shape=[1], device=flags.device)
    if value is not None:
        check_tensor("value", value, dtype=torch.int32, shape=[1], device=flags.device)
    launch(
        _set_condition_kernel,
        (1,),
        flags_ptr=flags,
        handle_ptr=handle,
        value_ptr=value,
        n_flags=len(flags),
        stride_flags=flags.stride(0),
        HAS_HANDLE=handle is not None,
        HAS_VALUE=value is not None,
        WHEN=when,
        BLOCK_N=triton.next_power_of_2(len(flags)),
        num_warps=1,
        **({} if handle is None else {"extern_libs": {"sfs_conditional": library()}}),
    )


def set_condition_cost(n_flags: int) -> Cost:
    """Flags and handle read, the condition written."""
    return Cost(bytes=8 * n_flags + 8 + 4, flops=2 * n_flags)
