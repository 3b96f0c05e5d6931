"""The loop that replays captured CUDA graphs. It has not run on a GPU yet."""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from ..decoding.caching import Shape
from ..errors import require
from .report import Report, Reports
from .step import Step, Turn

_LENGTHS = 64  # canvases are rounded up to a multiple, so that prompts of similar length share graphs

Capture = Callable[[Step, Shape], Callable[[], None]]


class ReplayLoop:
    """Replays a graph a step: one for each shape that a policy's steps have (of ``region``: a step and a refresh), and
    for one, two, four... up to all canvases. Rows that come or go change what the graphs read, and need no others.

    The host queues ``ahead`` replays beyond the one that it waits for, where they are short lists of rows and their
    shape follows from the step's number alone; else it waits for each step's letter before it starts the next, which
    costs a read of pinned memory. Neither asks the device. Replays that turn out to be surplus find no row running and
    change nothing, but take their time, which is why whole canvases are not queued.

    Args:
        ahead: replays that are queued beyond the one that is waited for.
        step_limit: seconds that a step may take before the loop gives up.
        capture: makes a replay of a step of one shape; tests run on a CPU with another one.
    """

    name = "replay"

    def __init__(self, ahead: int = 1, step_limit: float = 60.0, capture: Capture | None = None):
        self._ahead, self._step_limit, self._capture = ahead, step_limit, capture or capture_graph
        self._graphs: WeakKeyDictionary[Step, dict[Shape, Callable[[], None]]] = WeakKeyDictionary()

    def canvas_length(self, longest: int, most: int) -> int:
        return min(-(-longest // _LENGTHS) * _LENGTHS, max(longest, most))

    def prepare(self, step: Step) -> None:
        """Capture what ``step`` can need and has not been captured."""
        depth = step.mailbox.depth
        require(self._ahead < depth, f"ahead={self._ahead} is not below {depth}, as many letters as a mailbox holds")
        graphs = self._graphs.setdefault(step, {})
        for shape in step.fixed_shapes():
            if shape not in graphs:
                graphs[shape] = self._capture(step, shape)

    def run(self, step: Step) -> Reports:
        """Step until no row runs; yields a report a step."""
        mailbox, graphs = step.mailbox, self._graphs[step]
        ahead = self._ahead if step.policy.foreseen else 0
        due: deque[Turn] = deque()  # of this round, not started
        queued: deque[tuple[int, Turn, bool]] = deque()  # letters that are to come
        try:
            while True:
                while len(queued) <= ahead and (due := due or deque(step.fixed_turns(step.running()))):
                    (shape,) = due[0].shapes
                    if queued and shape.kind != "plan":
                        break
                    if (turn := step.still(due.popleft())) is None:
                        continue
                    step.aim(turn)
                    graphs[shape]()
                    step.started(turn)
                    queued.append((mailbox.posted, turn, not due))
                if not queued:
                    return
                number, turn, last = queued.popleft()
                takers = step.takers(turn, number)
                letter = step.hear(number, self._step_limit)
                if takers:
                    yield Report(takers, step.control, letter, last)
        except Exception:
            queued.clear()  # nothing more is waited for: no one uses this step again
            raise
        finally:
            mailbox.wait(max((number for number, *_ in queued), default=0), self._step_limit)  # a device at rest


def capture_graph(step: Step, shape: Shape) -> Callable[[], None]:
    """A graph of a step of this shape; rows that the state holds must be done.

    Warm-up and capture share a stream, so that they share what cuBLAS keeps for one, and that is given back before and
    after: a workspace from a graph's pool must not outlive it in other graphs. Inference mode is left for the capture,
    since it would mark the random state that torch keeps for all of them.
    """
    device = step.state.tokens.device
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step.run([shape])  # loads and compiles what a capture must not
        step.mailbox.posted += 1
    torch.cuda.synchronize(device)
    gc.collect()  # a graph that is destroyed during a capture may end it
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    how = {"pool": step.pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # the outer one, because a capture that fails leaves its stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.inference_mode(False):
            with torch.cuda.graph(graph, **how):
                step.run([shape])
            graph.instantiate()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
