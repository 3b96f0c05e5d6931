"""The loop inside conditional nodes: what can be known without a GPU, and the probes for one."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from sfs_triton.errors import ArgumentError, SfsError  # noqa: E402
from sfs_triton.kernels.conditional import LIBRARY, MAX_FLAGS, NO_HANDLE, set_condition  # noqa: E402
from sfs_triton.kernels.launch import recording  # noqa: E402
from sfs_triton.loops import device_while  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STEP, REFRESH, GO_ON, BRANCH, CONTEXT = 1001, 1002, 1003, 1004, 77
KINDS = {"KERNEL": 0, "MEMCPY": 1, "MEMSET": 2, "HOST": 3, "GRAPH": 4, "EMPTY": 5, "MEM_ALLOC": 10, "CONDITIONAL": 13}
BRANCHES = {"IF": 0, "WHILE": 1, "SWITCH": 2}


class Conditional:
    """The parameters as the binding has them: bodies are behind a null pointer until the node is added."""

    bodies: list[int] | None = None

    @property
    def phGraph_out(self) -> list[int]:
        assert self.bodies is not None, "a real binding would have crashed"
        return self.bodies


class PlainTypes:
    """Stands in for the types and constants of ``cuda.bindings.driver``, where that is not installed."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = SimpleNamespace(**{f"CU_GRAPH_NODE_TYPE_{kind}": number for kind, number in KINDS.items()})
    CUgraphConditionalNodeType = SimpleNamespace(**{f"CU_GRAPH_COND_TYPE_{kind}": n for kind, n in BRANCHES.items()})
    CUgraphEdgeData = CUgraphNode = CUgraphConditionalHandle = CUcontext = staticmethod(lambda value=0: value)

    @staticmethod
    def CUgraphNodeParams():
        return SimpleNamespace(type=None, conditional=Conditional())

    @staticmethod
    def fill(params, bodies: list[int]) -> None:
        params.conditional.bodies = bodies


class RealTypes:
    """The types of an installed binding. Bodies go where the driver would put them."""

    def __init__(self):
        self._module = pytest.importorskip("cuda.bindings.driver")
        self._arrays = []

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def fill(self, params, bodies: list[int]) -> None:
        self._arrays.append((ctypes.c_void_p * len(bodies))(*bodies))
        out = ctypes.c_void_p.from_address(params.getPtr() + 32)
        assert out.value is None
        out.value = ctypes.addressof(self._arrays[-1])


class FakeDriver:
    """Hands out numbers and keeps what was added: ``{graph: [(node, kind, what it runs after, what it is)]}``."""

    def __init__(self, types, version: int = 12080):
        self._types, self._version, self._numbers = types, version, itertools.count(1)
        self.handles, self.nodes = [], {}

    def __getattr__(self, name: str):
        if name.startswith("cu"):  # a call that is not faked
            raise AttributeError(name)
        return getattr(self._types, name)

    def cuDriverGetVersion(self):
        return 0, self._version

    def cuGraphCreate(self, flags):
        graph = next(self._numbers)
        self.nodes[graph] = []
        return 0, graph

    def cuCtxGetCurrent(self):
        return 0, self._types.CUcontext(CONTEXT)

    def cuGraphInstantiate(self, graph, flags):
        return 0, -graph

    def cuGraphConditionalHandleCreate(self, graph, context, default, flags):
        assert flags == 1, "the default would be ignored"
        handle = self._types.CUgraphConditionalHandle(100 + next(self._numbers))
        self.handles.append((int(handle), int(graph), int(context), default))
        return 0, handle

    def _node(self, graph, after, count, kind, what):
        assert len(after) == count
        node = self._types.CUgraphNode(next(self._numbers))
        self.nodes[graph].append((int(node), kind, [int(other) for other in after], what))
        return node

    def cuGraphAddChildGraphNode(self, graph, after, count, child):
        return 0, self._node(graph, after, count, "child", child)

    def cuGraphAddNode(self, graph, after, edges, count, params):
        assert len(edges) == count
        asked = params.conditional
        assert int(params.type) == KINDS["CONDITIONAL"]
        bodies = [self.cuGraphCreate(0)[1] for _ in range(asked.size)]
        what = (int(asked.handle), int(asked.ctx), bodies)
        kind = {number: kind for kind, number in BRANCHES.items()}[int(asked.type)]
        node = self._node(graph, after, count, kind, what)
        self._types.fill(params, bodies)
        return 0, node


class FakeDriver12(FakeDriver):
    """Version 12 of the binding: edge data came with a second name."""

    cuGraphAddNode_v2 = FakeDriver.cuGraphAddNode

    def cuGraphAddNode(self, graph, after, count, params):
        raise NotImplementedError


@pytest.fixture(
    params=[(FakeDriver, PlainTypes), (FakeDriver12, PlainTypes), (FakeDriver, RealTypes)],
    ids=["version 13", "version 12", "types of cuda-bindings"],
)
def fake(request) -> FakeDriver:
    driver, types = request.param
    return driver(types())


def _assembled(fake: FakeDriver, *, refresh: bool, switch: bool = True):
    root = fake.cuGraphCreate(0)[1]
    make = device_while.Assembler(fake, root, fake.CUcontext(CONTEXT))
    others = (REFRESH, BRANCH) if refresh else (None, None)
    handles = device_while.assemble(make, STEP, GO_ON, *others, switch)
    assert [(int(handle), root, CONTEXT, int(i == 0)) for i, handle in enumerate(handles)] == fake.handles
    ((_, kind, after, (handle, context, (body,))),) = fake.nodes[root]
    assert (kind, after, handle, context) == ("WHILE", [], int(handles[0]), CONTEXT)
    return [int(handle) for handle in handles], fake.nodes[body]


def test_loop_of_steps(fake):
    handles, ((first, *rest), last) = _assembled(fake, refresh=False)
    assert len(handles) == 1
    assert rest == ["child", [], STEP] and last[1:] == ("child", [first], GO_ON)


def test_loop_with_switch(fake):
    (_, branch), (chosen, switched, last) = _assembled(fake, refresh=True)
    assert chosen[1:] == ("child", [], BRANCH)
    number, kind, after, (handle, context, bodies) = switched
    assert (kind, after, handle, context) == ("SWITCH", [chosen[0]], branch, CONTEXT)
    assert [fake.nodes[body][0][1:] for body in bodies] == [("child", [], STEP), ("child", [], REFRESH)]
    assert last[1:] == ("child", [number], GO_ON)


def test_loop_with_two_ifs(fake):
    (_, *branches), (chosen, first, second, last) = _assembled(fake, refresh=True, switch=False)
    assert [node[1] for node in (chosen, first, second, last)] == ["child", "IF", "IF", "child"]
    assert [node[2] for node in (first, second, last)] == [[chosen[0]], [first[0]], [second[0]]]
    assert [node[3][0] for node in (first, second)] == branches and len(set(branches)) == 2
    assert [fake.nodes[node[3][2][0]][0][3] for node in (first, second)] == [REFRESH, STEP]


def test_calls_exist_in_the_binding():
    """Names and numbers of arguments: a call that is refused for either raises TypeError before it needs a driver."""
    driver = pytest.importorskip("cuda.bindings.driver")
    params = driver.CUgraphNodeParams()
    params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    nodes, edges = [driver.CUgraphNode(7)], [driver.CUgraphEdgeData()]
    add = "cuGraphAddNode_v2" if hasattr(driver, "cuGraphAddNode_v2") else "cuGraphAddNode"
    calls = {
        add: (5, nodes, edges, 1, params),
        "cuGraphAddChildGraphNode": (5, nodes, 1, 6),
        "cuGraphConditionalHandleCreate": (5, driver.CUcontext(3), 1, driver.CU_GRAPH_COND_ASSIGN_DEFAULT),
        "cuGraphCreate": (0,),
        "cuGraphGetNodes": (5, 0),
        "cuGraphNodeGetType": (nodes[0],),
        "cuGraphChildGraphNodeGetGraph": (nodes[0],),
        "cuGraphInstantiate": (5, 0),
        "cuGraphLaunch": (driver.CUgraphExec(3), 17),
        "cuGraphExecDestroy": (driver.CUgraphExec(3),),
        "cuGraphDestroy": (5,),
        "cuCtxGetCurrent": (),
        "cuDriverGetVersion": (),
    }
    if torch.cuda.is_available():
        assert all(callable(getattr(driver, name)) for name in calls)  # made-up handles are not for a real driver
        return
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match="driver"):
            getattr(driver, name)(*arguments)


def test_a_failed_call_is_named():
    status = IntEnum("CUresult", {"CUDA_ERROR_INVALID_VALUE": 1}).CUDA_ERROR_INVALID_VALUE
    with pytest.raises(SfsError, match="cuGraphCreate failed: CUDA_ERROR_INVALID_VALUE"):
        device_while._call(SimpleNamespace(cuGraphCreate=lambda flags: (status, None)), "cuGraphCreate", 0)


# --- what a machine can do ---


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with a GPU and this driver, or with this failure instead of one."""

    def pretend(driver) -> None:
        def found():
            if isinstance(driver, Exception):
                raise driver
            return driver

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(device_while, "_driver", found)

    return pretend


def _with_version(version: int) -> FakeDriver:
    return FakeDriver(PlainTypes(), version)


@pytest.mark.parametrize(
    ("driver", "wanted"),
    [
        (_with_version(13010), (True, True, "")),
        (_with_version(12080), (True, True, "")),
        (_with_version(12060), (True, False, "the driver is for CUDA 12.6, SWITCH needs 12.8")),
        (_with_version(12020), (False, False, "the driver is for CUDA 12.2, WHILE and IF need 12.4")),
        (ImportError("No module named 'cuda'"), (False, False, "no cuda-bindings: No module named 'cuda'")),
        (OSError("libcuda"), (False, False, "CUDA cannot be asked: OSError: libcuda")),
    ],
    ids=["13.1", "12.8", "12.6", "12.2", "no bindings", "broken"],
)
def test_supported(machine, driver, wanted):
    machine(driver)
    assert device_while.supported() == wanted


def test_supported_with_old_bindings(machine, monkeypatch):
    old = SimpleNamespace(CU_GRAPH_COND_TYPE_IF=0, CU_GRAPH_COND_TYPE_WHILE=1)
    monkeypatch.setattr(PlainTypes, "CUgraphConditionalNodeType", old)
    machine(_with_version(13000))
    assert device_while.supported() == (True, False, "cuda-bindings are too old for SWITCH, which needs 12.8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_supported_without_a_gpu():
    assert device_while.supported() == (False, False, "no CUDA device")


def test_build_refuses(machine):
    flag, graph = torch.zeros(1), object()
    with pytest.raises(ArgumentError, match="refresh and refresh_flag are given together"):
        device_while.build(graph, done=flag, refresh=graph)
    machine(_with_version(12060))
    with pytest.raises(ArgumentError, match="switch=True cannot be built: the driver is for CUDA 12.6"):
        device_while.build(graph, done=flag, switch=True)
    machine(_with_version(12020))
    with pytest.raises(ArgumentError, match="device_while loop cannot be built: .* need 12.4"):
        device_while.build(graph, done=flag)


@pytest.mark.parametrize("switch", [False, True], ids=["if", "switch"])
def test_build_hands_each_condition_its_handle(machine, monkeypatch, switch):
    """From launches that are recorded, not captured: which flag sets which conditional node."""
    driver = _with_version(12080)
    machine(driver)
    numbers = iter((GO_ON, BRANCH))
    captured = {}

    def capture(work):
        with recording() as launches:
            work()
        captured[number := next(numbers)] = [launch.arguments for launch in launches]
        return SimpleNamespace(raw_cuda_graph=lambda: number)

    monkeypatch.setattr(device_while, "_captured", capture)
    monkeypatch.setattr(device_while, "audit", lambda graph, name: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done, flag = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    step, refresh = (SimpleNamespace(raw_cuda_graph=lambda number=number: number) for number in (STEP, REFRESH))
    loop = device_while.build(step, done=done, refresh=refresh, refresh_flag=flag, switch=switch)
    assert loop.executable == -loop.root
    set_ = {
        number: [(x["flags_ptr"] is flag, x["WHEN"], x["handle_ptr"].item()) for x in launches]
        for number, launches in captured.items()
    }
    while_, *branches = (handle for handle, *_ in driver.handles)
    assert set_[GO_ON] == [(False, False, while_)]
    assert set_[BRANCH] == [(True, when, handle) for handle, when in zip(branches, (True, False), strict=False)]
    assert len(branches) == (1 if switch else 2)


# --- audit ---


class Nodes:
    """A driver that knows graphs by number: ``{graph: [type or the number of a child graph]}``."""

    def __init__(self, graphs: dict[int, list]):
        self._graphs = graphs

    def cuGraphGetNodes(self, graph, count):
        nodes = self._graphs[graph]
        return 0, (nodes if count else None), len(nodes)

    def cuGraphNodeGetType(self, node):
        return 0, SimpleNamespace(name=f"CU_GRAPH_NODE_TYPE_{'GRAPH' if isinstance(node, int) else node}")

    def cuGraphChildGraphNodeGetGraph(self, node):
        return 0, node


def test_audit(monkeypatch):
    graphs = {1: ["KERNEL", 2, "MEMCPY"], 2: ["KERNEL", 3], 3: [], 4: [5], 5: ["KERNEL", "MEM_ALLOC", "HOST"]}
    monkeypatch.setattr(device_while, "_driver", lambda: Nodes(graphs | {6: ["CONDITIONAL"]}))
    one, four, six = (SimpleNamespace(raw_cuda_graph=lambda number=number: number) for number in (1, 4, 6))
    assert device_while.audit(one) == {"KERNEL": 2, "GRAPH": 2, "MEMCPY": 1}
    with pytest.raises(ArgumentError, match="step holds nodes of type HOST, MEM_ALLOC, which a body may not"):
        device_while.audit(four, name="step")
    with pytest.raises(ArgumentError, match="graph holds nodes of type CONDITIONAL"):
        device_while.audit(six)


# --- the kernel that sets a condition; its values are checked with the cases of bench/kernels ---

COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from bench.kernels.resources import CompilingDriver
from sfs_triton.kernels.conditional import set_condition
from sfs_triton.kernels.launch import recording
from triton.runtime.driver import driver

flags, handle = (torch.empty(1, dtype=torch.int64, device="meta") for _ in range(2))
with recording() as launches:
    set_condition(flags, when=False, handle=handle)
found = {}
for capability in (90, 100):
    driver.set_active(CompilingDriver(capability))
    compiled = launches[0].kernel.warmup(grid=launches[0].grid, **launches[0].arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        elf = subprocess.run([tool, "-elf", path], capture_output=True, text=True, check=True).stdout
    found[capability] = [compiled.asm["ptx"], elf]
print(json.dumps(found))
"""


def test_the_kernel_compiles_to_a_call():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for capability, (ptx, elf) in json.loads(done.stdout).items():
        assert ptx.count("call.uni") == ptx.count("call.uni cudaGraphSetConditional,") == 1, capability
        assert ptx.count(".func") == ptx.count(".extern .func cudaGraphSetConditional") == 1, capability
        assert elf.count("externs:") == elf.count("externs:\tcudaGraphSetConditional(") == 1, capability


def test_handle_that_stands_for_none():
    assert f"icmp ne i64 %handle, {NO_HANDLE}\n" in LIBRARY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flags": torch.zeros(2, 1, dtype=torch.int64)}, "flags is not a tensor of one dimension"),
        ({"flags": [0]}, "flags is not a tensor of one dimension"),
        ({"flags": torch.zeros(2)}, "flags has dtype float32"),
        ({"flags": torch.zeros(0, dtype=torch.int64)}, "flags has 0 values"),
        ({"flags": torch.zeros(MAX_FLAGS + 1, dtype=torch.int64)}, "flags has 1025 values, not 1 to 1024"),
        ({"handle": torch.zeros(1, dtype=torch.int32)}, "handle has dtype int32"),
        ({"handle": torch.zeros(2, dtype=torch.int64)}, r"handle has shape \[2\]"),
        ({"value": torch.zeros(1, dtype=torch.int64)}, "value has dtype int64"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_set_condition_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        set_condition(**{"flags": torch.zeros(1, dtype=torch.int64), "when": True} | arguments)


def test_only_a_handle_needs_the_library():
    flags = torch.empty(3, dtype=torch.int64, device="meta")
    with recording() as launches:
        set_condition(flags, when=True, value=torch.empty(1, dtype=torch.int32, device="meta"))
        set_condition(flags, when=True, handle=flags[:1])
    assert "extern_libs" not in launches[0].arguments
    assert Path(launches[1].arguments["extern_libs"]["sfs_conditional"]).read_text() == LIBRARY


# --- probes, for a GPU ---

SECONDS = 20


@pytest.fixture(scope="module")
def gpu():
    """A GPU on which a kernel of ours sets a condition. Tried with an IF first: a WHILE would never end if not."""
    support = device_while.supported()
    if not support.loop:
        pytest.skip(support.reason)
    assert _an_if_runs(1) and not _an_if_runs(0)
    return support


def _wait() -> None:
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + SECONDS
    while not event.query():
        assert time.monotonic() < end, f"not done after {SECONDS} s"
        time.sleep(0.001)


def _capture(work) -> torch.cuda.CUDAGraph:
    return device_while._captured(work)


def _an_if_runs(flag: int) -> bool:
    """``root: set the condition from a flag -> IF { ran = 1 }``: whether the body ran."""
    driver, call = device_while._driver(), device_while._call
    flags, ran = torch.full((1,), flag, device="cuda"), torch.zeros(1, device="cuda")
    handle = torch.full((1,), NO_HANDLE, device="cuda")
    body = _capture(lambda: ran.fill_(1))
    setter = _capture(lambda: set_condition(flags, when=True, handle=handle))
    root = call(driver, "cuGraphCreate", 0)
    make = device_while.Assembler(driver, root, call(driver, "cuCtxGetCurrent"))
    condition = make.handle(0)
    handle.fill_(int(condition))
    _, (inner,) = make.conditional(root, [make.child(root, [], setter.raw_cuda_graph())], "IF", condition)
    make.child(inner, [], body.raw_cuda_graph())
    executable = call(driver, "cuGraphInstantiate", root, 0)
    ran.zero_()
    torch.cuda.synchronize()
    device_while.DeviceWhile(executable, root, ()).launch()
    _wait()
    return bool(ran.item())


class Counting:
    """Bodies that count to ten, note which of them ran, and ask for a refresh every third time."""

    def __init__(self):
        self.count, self.done, self.flag = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(3))
        self.log = torch.zeros(16, dtype=torch.int64, device="cuda")
        self.marks = [torch.full((1,), mark, device="cuda") for mark in (1, 2)]

    def body(self, mark: int) -> None:
        self.log.scatter_(0, self.count.clamp(max=15), self.marks[mark])
        self.count.add_(1)
        self.flag.copy_(self.count % 3 == 0)
        self.done.copy_(self.count >= 10)

    def run(self, loop: device_while.DeviceWhile) -> list[int]:
        for x in (self.count, self.done, self.flag, self.log):
            x.zero_()
        loop.launch()
        _wait()
        return self.log.tolist()


@pytest.mark.gpu
def test_while_counts_to_ten(gpu):
    counting = Counting()
    loop = device_while.build(_capture(lambda: counting.body(0)), done=counting.done)
    for _ in range(2):  # a second launch starts from the condition's default
        assert counting.run(loop) == [1] * 10 + [0] * 6
    loop.close()


@pytest.mark.gpu
@pytest.mark.parametrize("switch", [False, True], ids=["if", "switch"])
def test_while_branches(gpu, switch):
    if switch and not gpu.switch:
        pytest.skip(gpu.reason)
    counting = Counting()
    bodies = [_capture(lambda mark=mark: counting.body(mark)) for mark in (0, 1)]
    flags = {"done": counting.done, "refresh_flag": counting.flag}
    loop = device_while.build(bodies[0], refresh=bodies[1], switch=switch, **flags)
    for _ in range(2):
        assert counting.run(loop) == [1, 1, 1, 2, 1, 1, 2, 1, 1, 2] + [0] * 6
    loop.close()


@pytest.mark.gpu
def test_audit_of_cublas():
    support = device_while.supported()
    if not support.loop:
        pytest.skip(support.reason)
    x, w = (torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    found = device_while.audit(_capture(lambda: torch.mm(x, w, out=out)), name="matmul")
    print(f"a cuBLAS matmul is captured as {found}")
    assert found["KERNEL"] >= 1
