"""A whole generation as one CUDA graph: captured bodies inside conditional nodes. Assembly only, for probes on a GPU.

::

    WHILE (some row is not done) {
        set the branch from refresh_flag
        SWITCH (branch) { step, refresh }       before CUDA 12.8: IF (branch) { refresh } IF (not) { step }
        set the WHILE from done
    }

Nothing here has run on a GPU, and no part of the engine chooses it. What is checked without one: the order and the
parameters of the calls, and that the kernel which sets conditions compiles (:mod:`sfs_triton.kernels.conditional`).

Everything in a body is a child graph, the launches that set conditions too: they read their handles from memory, so
Triton launches and torch captures them like any other work, before the graph exists that owns the handles. What CUDA
asks for: handles belong to the root graph, each to one conditional node; a child graph holds kernels, copies within
device or pinned memory, fills, empty nodes and child graphs, but no allocation and no conditional node. Torch's random
numbers repeat in bodies, since only ``CUDAGraph.replay`` moves their offset on. A WHILE cannot be cancelled: bodies
must set ``done`` at a step cap, as ``decide`` does.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import SfsError, require

WHILE_DRIVER, SWITCH_DRIVER = 12040, 12080  # as drivers report what CUDA they are for; IF comes with WHILE
BODY_NODES = {"KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH"}


class Support(NamedTuple):
    """Whether the loop can be assembled, whether with SWITCH, and what is in the way of either."""

    loop: bool
    switch: bool
    reason: str


def supported() -> Support:
    """What this machine can assemble. Never raises."""
    try:
        return _supported()
    except Exception as error:  # whatever a broken installation has to say
        return Support(False, False, f"CUDA cannot be asked: {type(error).__name__}: {error}")


def _supported() -> Support:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return Support(False, False, "no CUDA device")
    try:
        driver = _driver()
    except ImportError as error:
        return Support(False, False, f"no cuda-bindings: {error}")
    version = _call(driver, "cuDriverGetVersion")
    is_ = f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}"
    if version < WHILE_DRIVER:
        return Support(False, False, f"{is_}, WHILE and IF need 12.4")
    if version < SWITCH_DRIVER:
        return Support(True, False, f"{is_}, SWITCH needs 12.8")
    if not hasattr(driver.CUgraphConditionalNodeType, "CU_GRAPH_COND_TYPE_SWITCH"):
        return Support(True, False, "cuda-bindings are too old for SWITCH, which needs 12.8")
    return Support(True, True, "")


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    return _value(name, getattr(driver, name)(*arguments))


def _value(name: str, result: tuple) -> Any:
    """What a call returned beside its status: a value, or a tuple of none or several. Raises on a bad status."""
    status, *values = result
    if int(status) != 0:
        raise SfsError(f"{name} failed: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)


def audit(graph: torch.cuda.CUDAGraph, *, name: str = "graph") -> dict[str, int]:
    """How many nodes of which type a captured graph holds, those of its child graphs included.

    Raises:
        ArgumentError: it holds some that a child graph in a body may not; the message names their types.
    """
    driver, found, graphs = _driver(), Counter(), [graph.raw_cuda_graph()]
    while graphs:
        inner = graphs.pop()
        _, count = _call(driver, "cuGraphGetNodes", inner, 0)
        for node in _call(driver, "cuGraphGetNodes", inner, count)[0] if count else []:
            kind = _call(driver, "cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_")
            found[kind] += 1
            if kind == "GRAPH":
                graphs.append(_call(driver, "cuGraphChildGraphNodeGetGraph", node))
    refused = sorted(found.keys() - BODY_NODES)
    require(not refused, f"{name} holds nodes of type {', '.join(refused)}, which a body may not")
    return dict(found)


@dataclass(frozen=True)
class Assembler:
    """Adds nodes to ``root`` and to the bodies inside it. Graphs are integers, nodes and handles the binding's own."""

    driver: Any
    root: Any
    context: Any

    def handle(self, default: int) -> Any:
        """A new condition that is ``default`` whenever ``root`` is launched."""
        flags = self.driver.CU_GRAPH_COND_ASSIGN_DEFAULT
        return _call(self.driver, "cuGraphConditionalHandleCreate", self.root, self.context, default, flags)

    def child(self, graph: Any, after: list, child: int) -> Any:
        """Add a copy of ``child``, to run after the nodes ``after``."""
        return _call(self.driver, "cuGraphAddChildGraphNode", graph, after, len(after), child)

    def conditional(self, graph: Any, after: list, kind: str, handle: Any, size: int = 1) -> tuple[Any, list[int]]:
        """Add a conditional node; the node and its ``size`` bodies, still empty."""
        driver, params = self.driver, self.driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = getattr(driver.CUgraphConditionalNodeType, f"CU_GRAPH_COND_TYPE_{kind}")
        params.conditional.size = size
        params.conditional.ctx = self.context
        # version 12 of the binding has the call with edge data under this name, and takes no None for them
        add = "cuGraphAddNode_v2" if hasattr(driver, "cuGraphAddNode_v2") else "cuGraphAddNode"
        edges = [driver.CUgraphEdgeData() for _ in after]
        # Bodies are behind a null pointer until the node is added: reading them, or printing params as a traceback
        # with its frames' arguments does, crashes. So params are in no such frame should the call fail.
        node = _value(add, getattr(driver, add)(graph, after, edges, len(after), params))
        return node, [int(body) for body in params.conditional.phGraph_out]


def assemble(make: Assembler, step: int, go_on: int, refresh: int | None, branch: int | None, switch: bool) -> list:
    """Fill ``make.root`` with raw graphs; the handles that ``go_on`` (the first) and ``branch`` (others) are to set."""
    loop = make.handle(1)
    _, (body,) = make.conditional(make.root, [], "WHILE", loop)
    if refresh is None:
        make.child(body, [make.child(body, [], step)], go_on)
        return [loop]
    last = make.child(body, [], branch)
    handles = [make.handle(0) for _ in range(1 if switch else 2)]
    if switch:
        last, bodies = make.conditional(body, [last], "SWITCH", handles[0], 2)
        for inner, graph in zip(bodies, (step, refresh), strict=True):
            make.child(inner, [], graph)
    else:
        for handle, graph in zip(handles, (refresh, step), strict=True):
            last, (inner,) = make.conditional(body, [last], "IF", handle)
            make.child(inner, [], graph)
    make.child(body, [last], go_on)
    return [loop, *handles]


@dataclass(frozen=True)
class DeviceWhile:
    """An executable graph, with what must live as long: the memory of its bodies, flags and handles."""

    executable: Any
    root: Any
    kept: tuple

    def launch(self) -> None:
        """Queue the loop on torch's current stream; returns at once. The first iteration always runs."""
        _call(_driver(), "cuGraphLaunch", self.executable, torch.cuda.current_stream().cuda_stream)

    def close(self) -> None:
        """Free the graphs. The loop must have ended."""
        _call(_driver(), "cuGraphExecDestroy", self.executable)
        _call(_driver(), "cuGraphDestroy", self.root)


def build(
    step: torch.cuda.CUDAGraph,
    *,
    done: torch.Tensor,
    refresh: torch.cuda.CUDAGraph | None = None,
    refresh_flag: torch.Tensor | None = None,
    switch: bool | None = None,
) -> DeviceWhile:
    """The loop over captured bodies, ready to launch. Waits for the device, so not for use within a generation.

    Args:
        step, refresh: captured with ``torch.cuda.CUDAGraph(keep_graph=True)``. Each leaves both flags as the next
            iteration is to find them. Without ``refresh`` every iteration is a step.
        done: ``[B]``, int32 or int64, on the device: the loop ends once none is 0.
        refresh_flag: ``[1]``, likewise: other than 0 if the next iteration is a refresh.
        switch: branch by SWITCH or by two IF; None takes SWITCH where there is one.
    """
    require((refresh is None) == (refresh_flag is None), "refresh and refresh_flag are given together or not at all")
    support = supported()
    require(support.loop, f"the device_while loop cannot be built: {support.reason}")
    require(support.switch or not switch, f"switch=True cannot be built: {support.reason}")
    switch = support.switch if switch is None else switch
    for name, graph in (("step", step), ("refresh", refresh)):
        if graph is not None:
            audit(graph, name=name)
    with torch.cuda.device(done.device):
        return _build(step, done, refresh, refresh_flag, switch)


def _build(step, done, refresh, refresh_flag, switch: bool) -> DeviceWhile:
    from ..kernels.conditional import NO_HANDLE, set_condition

    driver = _driver()
    handles = torch.full((3,), NO_HANDLE, dtype=torch.int64, device=done.device)
    while_, *branches = handles.split(1)

    def set_branch() -> None:
        for handle, when in zip(branches, (True,) if switch else (True, False), strict=False):
            set_condition(refresh_flag, when=when, handle=handle)

    go_on = _captured(lambda: set_condition(done, when=False, handle=while_))
    branch = None if refresh is None else _captured(set_branch)
    root = _call(driver, "cuGraphCreate", 0)
    make = Assembler(driver, root, _call(driver, "cuCtxGetCurrent"))
    raw = [graph and graph.raw_cuda_graph() for graph in (step, go_on, refresh, branch)]
    values = [int(handle) for handle in assemble(make, *raw, switch)]
    if NO_HANDLE % 2**64 in values:
        raise SfsError("CUDA made a handle that stands for none here")
    handles[: len(values)] = torch.tensor([value - (value >> 63 << 64) for value in values])  # as signed integers
    torch.cuda.synchronize()  # launches may come from another stream
    kept = (step, refresh, go_on, branch, done, refresh_flag, handles)
    return DeviceWhile(_call(driver, "cuGraphInstantiate", root, 0), root, kept)


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``work`` as a graph that can become a child. It runs once before, since compiling fails in a capture."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        work()
    return graph
