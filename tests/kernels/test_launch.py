"""Launches: errors, the checks and configurations that are remembered, and the variants that requests can ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
import triton
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.kernels.resources import SHARED_LIMIT, TARGETS
from bench.kernels.states import decode_state
from sfs_triton import FixedSteps, SlowFast, Threshold
from sfs_triton.kernels import check, cycle, gather, launch, norm, publish, rope_cache, scatter_choices, select
from sfs_triton.kernels import list_positions as lists
from sfs_triton.kernels import mark_candidates as candidates
from sfs_triton.kernels.attention import attention, attention_config
from sfs_triton.kernels.errors import KernelError
from sfs_triton.kernels.launch import Launch, recording
from sfs_triton.kernels.linear import linear, linear_silu_mul
from sfs_triton.kernels.lm_head import lm_head_config
from sfs_triton.kernels.mlp import silu_mul
from tests.support.paths import ROOT

META = torch.device("meta")


def variant(launch: Launch) -> tuple:
    """Return what Triton compiles a launch's variant for."""
    options, kernel = launch.kernel.kwargs, launch.kernel
    annotations, key = kernel.fn.__annotations__, []
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            free = name in (options["do_not_specialize_on_alignment"] or ())
            key.append((name, value.dtype, free or value.storage_offset() * value.itemsize % 16 == 0))
        elif name in kernel.arg_names and "constexpr" not in str(annotations.get(name, "")) and value is not None:
            wide = isinstance(value, int) and not -(2**31) <= value < 2**31
            free = name in (options["do_not_specialize"] or ())
            key.append((name, type(value), wide, None if free else (value == 1, value % 16 == 0)))
        else:
            key.append((name, value))
    return kernel.fn.__name__, *key


def variants(call: Callable[[], object]) -> list[tuple]:
    with recording() as launches:
        call()
    assert launches
    return [variant(each) for each in launches]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.skipif(isinstance(norm._rms_norm_kernel, triton.JITFunction), reason="reads the interpreter's kernels")
class TestVariants:
    """Two requests that differ in numbers alone run the same compiled code."""

    def test_of_the_cycle_machine(self):
        def step(look_ahead: int, span_cap: int, **numbers):
            sampler = SlowFast(eos_stop=True, **numbers)
            rules = sampler.rules(look_ahead=look_ahead, partial=True, span_cap=span_cap)
            state = decode_state(sampler, batch=2, prompt=20, response=44, device=META)
            return variants(lambda: cycle.decide_cycle(state, rules))

        one = step(4, 16, spread_limit=1.0, k_max=8, window=2, block_length=16, min_parallel=2, max_cycles=2)
        other = step(17, 1, spread_limit=0.31, k_max=1, window=7, block_length=1, min_parallel=1, max_cycles=32)
        assert one == other

    @pytest.mark.parametrize("sampler", [Threshold, FixedSteps])
    def test_of_the_block_machine(self, sampler):
        def step(**numbers):
            mine = sampler(**numbers)
            state = decode_state(mine, batch=1, prompt=20, response=44, device=META)
            return variants(lambda: select.decide_block(state, mine.rules()))

        assert step(block_length=16, steps=3) == step(block_length=1, steps=16)

    def test_of_lists(self):
        def step(length: int, capacity: int, offset: int, span_cap: int, look_ahead: int):
            flags = [empty(2, length, dtype=torch.bool) for _ in range(3)]
            control, forwarded = empty(2, len(cycle.CONTROL), dtype=torch.int64), empty(2, length, dtype=torch.int64)
            buffer = empty(offset + 2 * capacity, dtype=torch.int32)[offset:].view(2, capacity)
            count, ranges = empty(2, dtype=torch.int32), {"by_stage": True, "span_cap": span_cap}
            entry = empty(2 * capacity, dtype=torch.int32), empty(2 * capacity)
            canvas = empty(2, length, dtype=torch.int64), empty(2, length)
            return [
                *variants(lambda: candidates.mark_candidates(flags[0], control, flags[1], **ranges)),
                *variants(
                    lambda: lists.list_positions(
                        *[flags[0], control, flags[1], forwarded, flags[2], buffer, buffer, count],
                        **ranges,
                        look_ahead=look_ahead,
                    )
                ),
                *variants(lambda: scatter_choices.scatter_choices(*entry, buffer, *canvas)),
                *variants(lambda: gather.compact(flags[0], capacity=capacity)),
                *variants(lambda: gather.embedding(empty(50, 64), canvas[0], buffer)),
            ]

        assert step(100, 40, 0, 1, 0) == step(107, 33, 3, 48, 16)

    def test_of_positions_at_odd_places(self):
        def step(first: int):
            place = empty(100, dtype=torch.int64)[first : first + 40]
            canvas = empty(1, 100, dtype=torch.int64)[:, first : first + 40]
            heads = [empty(1, 40, 2, 64) for _ in range(3)]
            return [
                *variants(lambda: rope_cache.rope_cache(*heads, empty(128, 64), empty(128, 64), place)),
                *variants(lambda: gather.embedding(empty(50, 64), canvas)),
            ]

        assert step(0) == step(3)

    def test_of_publishing_parts_of_a_state(self):
        def step(slot: int, length: int):
            canvas = empty(4, length, dtype=torch.int64)
            counter, published = (empty(1, dtype=torch.int64) for _ in range(2))
            ring = empty(slot + 3 * length, dtype=torch.int64)[slot:].view(3, length)
            return variants(lambda: publish.publish([canvas[slot]], [ring], counter, published))

        assert step(0, 48) == step(1, 63)


class Failing:
    """A kernel whose start fails."""

    fn = launch.launch  # any function has a name and a module
    __name__ = "failing"

    def __init__(self, error: Exception):
        self._error = error

    def __getitem__(self, grid):
        def run(**arguments):
            raise self._error

        return run


@pytest.mark.parametrize(
    "error", [OutOfResources(102400, 101376, "shared memory"), PTXASError("no such instruction"), TritonError("other")]
)
def test_an_error_of_triton_is_one_of_the_package(error):
    x = torch.zeros(3, 5)
    with pytest.raises(KernelError) as raised:
        launch.launch(Failing(error), (1,), x_ptr=x, n_rows=3, BLOCK_M=16, num_stages=4)
    assert raised.value.__cause__ is error
    for part in ("launch.failing", "'cpu'", str(error), "x_ptr=[3, 5]", "BLOCK_M=16", "num_stages=4"):
        assert part in str(raised.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(OSError, match="no disk"):
        launch.launch(Failing(OSError("no disk")), (1,), x_ptr=torch.zeros(1))


def test_errors_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from sfs_triton.kernels.errors import KernelError\n"
        "assert issubclass(KernelError, RuntimeError)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# One call each of what a layer launches, over arguments made once.
CALLS = {
    "rms_norm": lambda x, cache: norm.rms_norm(x, x[0, 0], 1e-5, residual=x.clone()),
    "silu_mul": lambda x, cache: silu_mul(x),
    "rope_cache": lambda x, cache: rope_cache.rope_cache(
        *[x.view(1, 3, 2, 16)] * 3, *[torch.ones(8, 16)] * 2, torch.arange(3)[None], k_cache=cache, v_cache=cache
    ),
    "attention": lambda x, cache: attention(x.view(1, 3, 2, 16), cache, cache),
    "linear": lambda x, cache: linear(x[0], cache[0, :, 0].repeat(1, 2), residual=x[0, :, :7], out=x[0, :, :7].clone()),
    "linear_silu_mul": lambda x, cache: linear_silu_mul(x[0], x[0, :2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_layouts_are_checked_once(monkeypatch, name):
    checked = []
    real = check.check_tensor
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sfs_triton.kernels.") and hasattr(module, "check_tensor"):
            monkeypatch.setattr(module, "check_tensor", lambda *a, **k: (checked.append(a[0]), real(*a, **k)))
    x, cache = torch.randn(1, 3, 32), torch.randn(1, 7, 2, 16)  # shapes that no other test has
    CALLS[name](x, cache)
    assert checked
    checked.clear()
    CALLS[name](x, cache)
    assert checked == []
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    CALLS[name](x, cache)
    assert checked


def test_what_did_not_pass_is_refused_every_time():
    bad = torch.zeros(3, 7, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(ValueError, match="x has dtype float64"):
            norm.rms_norm(bad, torch.ones(7), 1e-5)
    for wrong in ([1.0], None):
        with pytest.raises(ValueError, match="x is a"):
            check.checked_once(lambda x: check.check_tensor("x", x, dtype=torch.float32, shape=[None]))(wrong)


def test_what_passed_while_recording_is_refused_without_data():
    x = empty(3, 9)
    with recording():
        norm.rms_norm(x, x[0], 1e-5)
    with pytest.raises(ValueError, match="x is on device 'meta', which holds no data"):
        norm.rms_norm(x, x[0], 1e-5)


def test_the_count_is_published_by_a_release_store():
    """A plain store of 8 bytes is atomic over every bus; an exchange is so where the host takes part in atomics."""
    code = (
        "import torch\n"
        "from triton.runtime.driver import driver\n"
        "from bench.kernels.resources import CompilingDriver\n"
        "from sfs_triton.kernels.launch import recording\n"
        "from sfs_triton.kernels.publish import publish\n"
        "make = lambda *shape: torch.empty(shape, dtype=torch.int64, device='meta')\n"
        "with recording() as launches:\n"
        "    publish([make(40)], [make(4, 40)], make(1), make(1))\n"
        "driver.set_active(CompilingDriver(90))\n"
        "launch, = launches\n"
        "print(launch.kernel.warmup(grid=launch.grid, **launch.arguments).asm['ptx'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ptx = done.stdout
    assert ptx.count("st.release.sys.global.b64") == 1 and "atom." not in ptx
    assert ptx.rindex("bar.sync") < ptx.index("st.release.sys.global.b64")


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_fit_a_block_and_programs_a_multiprocessor(target):
    """What the compiler adds to the tiles is seen by the ahead-of-time tests."""
    limit = SHARED_LIMIT[target]
    for rows in (1, 16, 32, 64, 128, 500):
        for itemsize, float8, noise in product((2, 4), (False, True), (False, True)):
            tile = lm_head_config(rows, 126464, itemsize, noise, 132, float8=float8, shared=limit)
            weights = 1 if float8 else itemsize
            used = (tile.num_stages - 1) * tile.BLOCK_K * (tile.BLOCK_T * itemsize + tile.BLOCK_V * weights)
            assert tile.num_stages >= 2 and used <= limit - 4096
            n_tiles = -(-rows // tile.BLOCK_T)
            assert used <= limit // -(-tile.programs // 132) or tile.programs > 2 * 132 or n_tiles > 132
        for heads, itemsize in product((8, 32), (2, 4)):
            tile = attention_config(1, rows, 32, heads, 2176, 128, itemsize, shared=limit)
            used = 128 * itemsize * (tile.BLOCK_M + 2 * (tile.num_stages - 1) * tile.BLOCK_N)
            assert tile.num_stages >= 2 and used <= limit - 4096


def test_a_recorder_has_its_targets_memory():
    with recording(SHARED_LIMIT[89]):
        assert launch.shared_memory(META) == 101376
    assert launch.shared_memory(META) == launch.H200_SHARED_MEMORY == SHARED_LIMIT[90]
