"""Time a call: GPU time from CUDA events around graph replays, or the wall clock where there is no GPU.

A replay holds many launches, each on tensors of its own, so neither launch overhead nor what an earlier launch left in
the L2 cache is measured. A sample is the mean over one replay. Calls that wait for the GPU cannot be captured: they are
timed one by one, and their record says so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from bench.common.figures import percentile
from sfs_triton.kernels.cost import Cost

from .structure import leaves

SAMPLES = 50
TOY_SAMPLES = 3
REPLAY_SECONDS = 2e-3
MAX_LAUNCHES = 256
L2_SIZES = 16  # so many times the L2 cache is read to empty it; that takes longer than the host needs to start a replay


class Ceilings(NamedTuple):
    """Measured peak rates of the GPU."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Timing:
    """Samples in seconds, and how they were taken."""

    samples: list[float]
    method: str
    launches: int  # a sample is the mean of so many
    l2: str | None


def l2_state(cost: Cost, ceilings: Ceilings, wish: str) -> str:
    """``"cold"`` or ``"warm"``: as wished, and with ``"auto"`` cold for what memory bounds."""
    if wish not in ("auto", "cold", "warm"):
        raise ValueError(f"SFS_TRITON_L2={wish!r} is not one of auto, cold, warm")
    if wish != "auto":
        return wish
    memory = cost.bytes / ceilings.bytes_per_second
    return "cold" if memory >= cost.flops / ceilings.flops_per_second else "warm"


def launches_for(seconds: float, copy_bytes: int, free_bytes: int) -> int:
    """Launches in a replay: two milliseconds' worth, while their tensors fit half of the free memory."""
    fits = free_bytes // 2 // max(1, copy_bytes)
    return int(max(1, min(math.ceil(REPLAY_SECONDS / seconds), MAX_LAUNCHES, fits)))


class Copies:
    """``count`` copies of a call's arguments. What the call changes is each copy's own and can be put back.

    With ``shared`` all copies use the same tensors but for those the call changes: they stay in the L2 cache.
    """

    def __init__(self, arguments: dict[str, Any], changed: set[str], count: int, *, shared: bool):
        tensors = leaves(arguments)
        self._fresh = {name: tensors[name].clone() for name in changed}
        kept = {id(x): x for name, x in tensors.items() if name not in changed} if shared else {}
        self.all = [deepcopy(arguments, dict(kept)) for _ in range(count)]

    def restore(self) -> None:
        """Undo what calls changed."""
        for arguments in self.all:
            tensors = leaves(arguments)
            for name, fresh in self._fresh.items():
                tensors[name].copy_(fresh)


def wall_clock(function: Callable[..., Any], arguments: dict[str, Any], changed: set[str]) -> Timing:
    """Time calls one by one on the CPU."""
    copies = Copies(arguments, changed, 1, shared=True)
    samples = []
    for _ in range(TOY_SAMPLES):
        copies.restore()
        began = time.perf_counter()
        function(**copies.all[0])
        samples.append(time.perf_counter() - began)
    return Timing(samples, "wall clock", 1, None)


def _seconds(work: Callable[[], Any]) -> float:
    """Return the GPU time of the work that ``work`` enqueues."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _cache_buffer(device: torch.device) -> torch.Tensor:
    size = L2_SIZES * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(size // 4, device=device)


def _empty_l2(device: torch.device) -> None:
    """Evict the L2 cache by reading: dirty lines left by a write would be written back on the next kernel's time."""
    _cache_buffer(device).sum()


def _waits_for_gpu(work: Callable[[], Any]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def gpu_clock(
    function: Callable[..., Any], arguments: dict[str, Any], changed: set[str], *, device: torch.device, l2: str
) -> Timing:
    """Time calls on the GPU, warmed up, each with the L2 cache ``"cold"`` or ``"warm"``."""
    warm_up = Copies(arguments, changed, 1, shared=True)
    for _ in range(3):
        warm_up.restore()
        estimate = _seconds(lambda: function(**warm_up.all[0]))
    warm_up.restore()
    captured = not _waits_for_gpu(lambda: function(**warm_up.all[0]))
    tensors = leaves(arguments)
    owned = [x for name, x in tensors.items() if l2 == "cold" or name in changed]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    count = launches_for(estimate, sum(x.nbytes for x in owned), free) if captured else 1
    copies = Copies(arguments, changed, count, shared=l2 == "warm")
    results: list[Any] = []  # kept, so that every launch writes to memory of its own

    def work() -> None:
        results[:] = [function(**each) for each in copies.all]

    run = work
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        run = graph.replay
    samples = []
    for _ in range(SAMPLES):
        # the GPU is kept busy until the host has enqueued all that is timed
        if l2 == "warm":
            run()
        copies.restore()
        if l2 == "cold":
            _empty_l2(device)
        samples.append(_seconds(run) / count)
    return Timing(samples, "graph replay" if captured else "events", count, l2)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth (bytes read and written) over 4 GiB, and the rate of a bf16 matrix product of random numbers."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = [_seconds(lambda: target.copy_(source)) for _ in range(SAMPLES)]
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = [_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(SAMPLES)]
    return Ceilings(2 * source.nbytes / percentile(copy, 0.5), 2 * size**3 / percentile(product, 0.5))


class Stopwatch:
    """Times calls on a device, whose ceilings it measures once.

    ``SFS_TRITON_L2`` chooses whether calls find the L2 cache ``cold`` or ``warm``; ``auto``, the default, is cold for
    what memory bounds.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._wish = os.environ.get("SFS_TRITON_L2", "auto")
        self.capability = math.inf  # the interpreter's
        self.ceilings = None
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            self.capability = 10 * major + minor
            self.ceilings = measure_ceilings(device)

    def __call__(
        self, function: Callable[..., Any], arguments: dict[str, Any], changed: set[str], cost: Cost
    ) -> Timing:
        if self.ceilings is None:
            return wall_clock(function, arguments, changed)
        l2 = l2_state(cost, self.ceilings, self._wish)
        return gpu_clock(function, arguments, changed, device=self.device, l2=l2)
