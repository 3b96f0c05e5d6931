"""Small kernels with planted faults, each beside a correct twin: the one is found, the other passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from tests.ptx.findings import KINDS
from tests.ptx.machine import EndedEarly, Kernel, Machine
from tests.ptx.memory import watched_empty
from tests.ptx.parse import Unsupported
from tests.ptx.program import assemble

WRITE_READ, READ_WRITE = "race, write and read", "race, read and write"

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry planted(.param .u64 .ptr .global .align 1 x, .param .u64 .ptr .global .align 1 out)
.reqntid 64
{
 .reg .b32 %r<10>; .reg .b64 %rd<8>; .reg .pred %p<2>;
 ld.param.b64 %rd1, [x];
 ld.param.b64 %rd2, [out];
 mov.u32 %r1, %tid.x;
 mad.wide.u32 %rd3, %r1, 4, %rd1;
 mad.wide.u32 %rd4, %r1, 4, %rd2;
"""
EXCHANGE = """
 ld.global.b32 {%r2}, [%rd3+0];
 shl.b32 %r3, %r1, 2;
 mov.b32 %r4, memory;
 add.s32 %r5, %r4, %r3;
 WRITE
 xor.b32 %r6, %r3, DISTANCE;
 add.s32 %r7, %r4, %r6;
 ld.shared.b32 %r8, [%r7];
 st.global.b32 [%rd4+0], {%r8};
 ret;
}
"""
PUBLISH = """
 add.s32 %r2, %r1, 5;
 st.global.b32 [%rd4+0], {%r2};
 BARRIER
 mov.b64 %rd5, 1;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 STORE
 ret;
}
"""
STORE, BARRIER = "st.shared.b32 [%r5], %r2;", "bar.sync 0;"
COPY = "cp.async.ca.shared.global [%r5+0], [%rd3+0], 4; cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"
RELEASE = "st.release.sys.global.b64 [%rd1], %rd5;"

WRITTEN = {  # name: PTX, distance between a lane and the one that it reads from, in bytes; wanted finding
    "another warp's, barrier": (STORE + BARRIER, 128, None),
    "another warp's, no barrier": (STORE, 128, WRITE_READ),
    "another lane's, bar.warp.sync": (STORE + "bar.warp.sync -1;", 4, None),
    "another lane's, nothing": (STORE, 4, WRITE_READ),
    "never written": (BARRIER, 0, "shared unwritten"),
    "cp.async, waited for": (COPY + WAIT + BARRIER, 128, None),
    "cp.async, waited for after the barrier": (COPY + BARRIER + WAIT, 128, WRITE_READ),
    "cp.async, not waited for": (COPY + BARRIER, 0, "in flight"),
    "cp.async, all but one waited for": (COPY + "cp.async.wait_group 1;" + BARRIER, 0, "in flight"),
    "a barrier for some lanes": (STORE + "{ .reg .pred q; setp.lt.u32 q, %r1, 7; @q bar.sync 0; }", 0, "divergent"),
    "beyond shared memory": (STORE + BARRIER, 256, "shared out of bounds"),
}
PUBLISHED = {
    "release store": (BARRIER, RELEASE, None),
    "release exchange": (BARRIER, "atom.global.sys.release.exch.b64 %rd6, [%rd1+0], %rd5;", None),
    "release store, no barrier": ("", RELEASE, "not published"),
    "fence and relaxed store": (BARRIER + "fence.acq_rel.sys;", "st.relaxed.sys.global.b64 [%rd1], %rd5;", None),
}


@pytest.fixture
def machine() -> Machine:
    return Machine(6, limit=10_000_000)


def run_text(machine: Machine, body: str) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = Kernel("planted", assemble(HEAD + body), {"x": "*i32", "out": "*i32"}, 256)
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    machine.execute(kernel, (1,), {"x": x, "out": out})
    return x, out


def judge(machine: Machine, wanted: str | None, call: Callable[[], bool]) -> None:
    """``call`` returns True if the result is right, where that is to be."""
    assert wanted is None or wanted in KINDS
    try:
        right = call()
    except EndedEarly:
        right = False
    kinds = {finding.kind for finding in machine.findings}
    assert wanted in kinds if wanted else right and not kinds, "\n".join(map(str, machine.findings))


@pytest.mark.parametrize("name", WRITTEN)
def test_shared_memory(machine, name):
    write, distance, wanted = WRITTEN[name]

    def call() -> bool:
        x, out = run_text(machine, EXCHANGE.replace("WRITE", write).replace("DISTANCE", str(distance)))
        return torch.equal(out, x ^ distance // 4)

    judge(machine, wanted, call)
    if name == "another warp's, no barrier":
        found = str(next(finding for finding in machine.findings if finding.kind == wanted))
        assert "planted" in found and "PTX line" in found and "st.shared.b32" in found and "thread" in found


@pytest.mark.parametrize("name", PUBLISHED)
def test_publishing(machine, name):
    barrier, store, wanted = PUBLISHED[name]

    def call() -> bool:
        _, out = run_text(machine, PUBLISH.replace("BARRIER", barrier).replace("STORE", store))
        return torch.equal(out, torch.arange(5, 69, dtype=torch.int32))

    judge(machine, wanted, call)


@pytest.mark.parametrize(
    "text", ["add.rz.f32 %r2, %r1, %r1;", "mbarrier.init.shared.b64 [memory], 1;", "cvta.to.global.u64 %rd5, %rd1;"]
)
def test_an_unknown_instruction_is_named(text):
    with pytest.raises(Unsupported, match=r"kernel planted, PTX line 15: '.* is not supported"):
        assemble(f"{HEAD} {text}\n ret;\n}}\n")


def test_an_endless_loop_ends(machine):
    with pytest.raises(EndedEarly, match="endless"):
        run_text(machine, " AGAIN: bra AGAIN; }")


# ------------------------------------------------------------------------------------------------ kernels of Triton


@triton.jit
def _reverse_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    y = tl.load(out_ptr + (BLOCK - 1 - at))
    tl.debug_barrier()
    tl.store(out_ptr + at, y)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)
    else:
        tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _last_arriver_kernel(x_ptr, part_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr, SEM: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(part_ptr + at, tl.load(x_ptr + at))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem=SEM) == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(0, tl.num_programs(0)):
            total += tl.load(part_ptr + other * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
        tl.store(out_ptr + tl.arange(0, BLOCK), total)
        tl.store(count_ptr, 0)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    x = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    if ATOMIC:
        tl.atomic_add(out_ptr, x, sem="relaxed")
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SHIFT: tl.constexpr):
    at = tl.arange(0, 32)
    tl.store(out_ptr + at, tl.load((x_ptr + SHIFT).to(tl.pointer_type(tl.int32)) + at))


@triton.jit
def _double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """In place, and a scalar that every lane loads and one stores."""
    x = tl.load(x_ptr)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.full([BLOCK], 0, tl.int32) + x)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr, x + 1)


X = (torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 8).round()  # sums are exact in any order


@pytest.mark.parametrize(("barrier", "wanted"), [(True, None), (False, WRITE_READ)])
def test_store_and_load_by_another_thread(machine, barrier, wanted):
    out = torch.zeros(256)
    arguments = {"x_ptr": X, "out_ptr": out, "BLOCK": 256, "BARRIER": barrier, "num_warps": 4}
    judge(
        machine, wanted, lambda: machine.launch(_reverse_kernel, (1,), arguments) or torch.equal(out, X[:256].flip(0))
    )


@pytest.mark.parametrize(("masked", "wanted"), [(True, None), (False, "out of bounds")])
def test_bounds(machine, masked, wanted):
    out = torch.zeros(200)
    arguments = {"x_ptr": X[:200], "out_ptr": out, "n": 200, "BLOCK": 128, "MASKED": masked, "num_warps": 1}
    judge(machine, wanted, lambda: machine.launch(_copy_kernel, (2,), arguments) or torch.equal(out, X[:200]))


@pytest.mark.parametrize(("n", "wanted"), [(100, None), (150, "gap")])
def test_the_gap_of_a_strided_view(machine, n, wanted):
    wide = torch.zeros(2, 150)
    arguments = {"x_ptr": X[:150], "out_ptr": wide[:, :100], "n": n, "BLOCK": 256, "MASKED": True, "num_warps": 1}
    judge(machine, wanted, lambda: machine.launch(_copy_kernel, (1,), arguments) or torch.equal(wide[0, :100], X[:100]))


@pytest.mark.parametrize(("n", "wanted"), [(128, None), (100, "unwritten")])
def test_memory_that_nobody_wrote(machine, n, wanted):
    with watched_empty():
        x, out = torch.empty(128), torch.zeros(128)
    x[:n] = X[:n]
    arguments = {"x_ptr": x, "out_ptr": out, "n": 128, "BLOCK": 128, "MASKED": True, "num_warps": 1}
    judge(machine, wanted, lambda: machine.launch(_copy_kernel, (1,), arguments) or torch.equal(out[:n], X[:n]))


@pytest.mark.parametrize(
    ("sem", "wanted"), [("acq_rel", None), ("relaxed", WRITE_READ), ("acquire", WRITE_READ), ("release", WRITE_READ)]
)
def test_the_last_arriver_sums(machine, sem, wanted):
    part, count, out = torch.zeros(8 * 128), torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    arguments = {"x_ptr": X, "part_ptr": part, "count_ptr": count, "out_ptr": out, "BLOCK": 128, "SEM": sem}

    def call() -> bool:
        machine.launch(_last_arriver_kernel, (8,), arguments)
        return torch.equal(out, X.view(8, 128).sum(0)) and not count.any()

    judge(machine, wanted, call)


@pytest.mark.parametrize(("atomic", "wanted"), [(True, None), (False, WRITE_READ)])
def test_all_programs_add_to_one_place(machine, atomic, wanted):
    out = torch.zeros(1)
    arguments = {"x_ptr": X, "out_ptr": out, "BLOCK": 128, "ATOMIC": atomic, "num_warps": 1}
    judge(machine, wanted, lambda: machine.launch(_sum_kernel, (8,), arguments) or out.item() == X.sum().item())


@pytest.mark.parametrize(("shift", "wanted"), [(4, None), (1, "misaligned")])
def test_alignment(machine, shift, wanted):
    raw, out = torch.arange(256, dtype=torch.uint8), torch.zeros(32, dtype=torch.int32)
    arguments = {"x_ptr": raw, "out_ptr": out, "SHIFT": shift, "num_warps": 1}

    def call() -> bool:
        machine.launch(_cast_kernel, (1,), arguments)
        return torch.equal(out, raw[shift : shift + 128].clone().view(torch.int32))

    judge(machine, wanted, call)


@pytest.mark.parametrize(
    ("num_warps", "barrier", "wanted"), [(4, True, None), (4, False, READ_WRITE), (1, False, None)]
)
def test_a_scalar_that_all_load_and_one_stores(machine, num_warps, barrier, wanted):
    """Within a warp the load comes first: all of its lanes have it before one stores."""
    one, out = torch.tensor([5], dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    arguments = {"x_ptr": one, "out_ptr": out, "BLOCK": 128, "BARRIER": barrier, "num_warps": num_warps}

    def call() -> bool:
        machine.launch(_double_kernel, (1,), arguments)
        return one.item() == 6 and bool((out == 5).all())

    judge(machine, wanted, call)
