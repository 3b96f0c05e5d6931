"""Publishing to the host ring: copies of tensors in a ring of pinned host memory, then their number in ``published``.

Kernels can address pinned host memory. ``published`` is stored by one thread, as a release at system scope, after all
copies: those of its own program before a barrier, those of earlier launches in stream order. So a host that reads
``published = t``, and orders its later reads after that one, sees the copies of counter ``t - 1`` in slot
``(t - 1) % depth``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .cost import Cost
from .launch import cdiv, launch

_WORDS = {1: torch.uint8, 4: torch.int32, 8: torch.int64}  # by itemsize: copies are of raw bits
_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)
_MAX_ELEMENTS = 2**30


@triton.jit
def _store_release(at, value, INTERPRETED: tl.constexpr):
    """Store an int64 scalar to memory of the host, after all that this thread has seen stored.

    A plain store of 8 aligned bytes is atomic over every bus. An atomic exchange is so only where the host takes
    part in atomics, and it waits for an answer over the bus.
    """
    if INTERPRETED:
        tl.store(at, value)
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first st.release.sys.global.b64 [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,l",
            args=[at.to(tl.int64), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["n", "depth"], do_not_specialize_on_alignment=["source_ptr", "ring_ptr"])
def _copy_kernel(source_ptr, ring_ptr, counter_ptr, n, depth, BLOCK_N: tl.constexpr):
    slot = tl.load(counter_ptr) % depth
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(ring_ptr + slot * n + at, tl.load(source_ptr + at, mask=at < n, other=0), mask=at < n)


@triton.jit(do_not_specialize=["n", "depth"], do_not_specialize_on_alignment=["source_ptr", "ring_ptr"])
def _publish_kernel(
    source_ptr,
    ring_ptr,
    counter_ptr,
    published_ptr,
    n,
    depth,
    HAS_SOURCE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    counter = tl.load(counter_ptr)
    if HAS_SOURCE:
        ring_ptr += counter % depth * n
        for begin in range(0, n, BLOCK_N):
            at = begin + tl.arange(0, BLOCK_N)
            tl.store(ring_ptr + at, tl.load(source_ptr + at, mask=at < n, other=0), mask=at < n)
    tl.debug_barrier()  # all threads have the counter, and have written their share of the ring
    tl.store(counter_ptr, counter + 1)
    _store_release(published_ptr, counter + 1, INTERPRETED)


@dataclass(frozen=True)
class PublishConfig:
    BLOCK_N: int
    num_warps: int
    with_count: bool


def publish_config(n: int, itemsize: int) -> PublishConfig:
    """Return the launch for a source of ``n`` elements: 64 bytes per thread at a time.

    Up to 64 KiB the program that stores ``published`` copies it: two iterations of 32 KiB take less than a launch.
    """
    with_count = n * itemsize <= 65536
    block = min(triton.next_power_of_2(max(n, 1)), (32768 if with_count else 8192) // itemsize)
    return PublishConfig(BLOCK_N=block, num_warps=max(1, block * itemsize // 2048), with_count=with_count)


def publish(
    sources: Sequence[torch.Tensor],
    rings: Sequence[torch.Tensor],
    counter: torch.Tensor,
    published: torch.Tensor,
    *,
    config: PublishConfig | None = None,
) -> None:
    """``ring[counter % depth] = source`` for each source, then ``counter += 1``, then ``published = counter``.

    One launch per source, and one more for ``published`` if even the smallest source is large.

    Args:
        sources: dense tensors of any shapes, of bool, uint8, int32, int64, float32 or float64.
        rings: for each source ``[depth, *shape]`` of its dtype, dense, in pinned memory of the host, or where the
            source is. ``depth`` is the same for all; a host has ``depth - 1`` further copies to read a slot.
        counter: int64 ``[1]`` where the sources are, never negative: how often something was published.
        published: int64 ``[1]``, where the rings are.
        config: for all sources.
    """
    check_tensor("counter", counter, dtype=torch.int64, shape=[1])
    check_tensor("published", published, dtype=torch.int64, shape=[1])
    _check_place("published", published, counter.device)
    refuse_unless(len(sources) == len(rings), f"{len(sources)} sources and {len(rings)} rings")
    depth = len(rings[0]) if rings and rings[0].dim() else 1
    for index, (source, ring) in enumerate(zip(sources, rings, strict=True)):
        name = f"sources[{index}]", f"rings[{index}]"
        check_tensor(name[0], source, dtype=_DTYPES, shape=[...], device=counter.device, dense=True)
        refuse_unless(source.numel() <= _MAX_ELEMENTS, f"{name[0]} has more than {_MAX_ELEMENTS} elements")
        check_tensor(name[1], ring, dtype=source.dtype, shape=[depth, *source.shape], dense=True)
        _check_place(name[1], ring, counter.device)
    refuse_unless(depth > 0, "rings[0] has no slots")
    pairs = [(source, ring) for source, ring in zip(sources, rings, strict=True) if source.numel()]
    pairs.sort(key=lambda pair: -pair[0].nbytes)
    last = None
    if pairs and (config or publish_config(pairs[-1][0].numel(), pairs[-1][0].itemsize)).with_count:
        last = pairs.pop()
    for source, ring in pairs:
        copy = config or publish_config(source.numel(), source.itemsize)
        launch(
            _copy_kernel,
            (cdiv(source.numel(), copy.BLOCK_N),),
            source_ptr=_words(source),
            ring_ptr=_words(ring),
            counter_ptr=counter,
            n=source.numel(),
            depth=depth,
            BLOCK_N=copy.BLOCK_N,
            num_warps=copy.num_warps,
        )
    n, itemsize = (0, 1) if last is None else (last[0].numel(), last[0].itemsize)
    config = config or publish_config(n, itemsize)
    launch(
        _publish_kernel,
        (1,),
        source_ptr=None if last is None else _words(last[0]),
        ring_ptr=None if last is None else _words(last[1]),
        counter_ptr=counter,
        published_ptr=published,
        n=n,
        depth=depth,
        HAS_SOURCE=last is not None,
        INTERPRETED=not isinstance(_publish_kernel, triton.JITFunction),
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )


def _words(x: torch.Tensor) -> torch.Tensor:
    return x.view(_WORDS[x.itemsize])


def _check_place(name: str, x: torch.Tensor, device: torch.device) -> None:
    """Refuse tensors that kernels cannot address: neither on their own device nor in pinned host memory."""
    if x.device == device:
        return
    refuse_unless(device.type == "cuda" and x.device.type == "cpu", f"{name} is on device {str(x.device)!r}")
    refuse_unless(x.is_pinned(), f"{name} is in memory of the host that is not pinned")


def publish_cost(n_bytes: int) -> Cost:
    """The sources read and their slots written once; the counter read and written, and the published."""
    return Cost(bytes=2 * n_bytes + 3 * 8, flops=0)
