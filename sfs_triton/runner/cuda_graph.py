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
    """Replay one captured graph per step.

    Graphs exist for each shape of the policy's steps (``region``: a planned step and a refresh) at one, two, four...
    up to all canvases. Sequences that join or leave change the buffers that graphs read, and need no new graphs.

    The host keeps ``ahead`` replays queued beyond the one it waits for, where these forward short lists of positions
    and their shape follows from the step number alone. Otherwise it waits for each output before it launches the next
    step, at the cost of a read of pinned memory. Neither makes a CUDA call. Surplus replays find no running sequence
    and change nothing, but take the time of a step, so whole-canvas steps are not queued.

    Args:
        ahead: replays to queue beyond the one that is waited for.
        step_limit: seconds that a step may take before the loop raises.
        capture: function that returns the replay of a step of one shape; tests on a CPU pass another one.
    """

    name = "replay"

    def __init__(self, ahead: int = 1, step_limit: float = 60.0, capture: Capture | None = None):
        self._ahead, self._step_limit, self._capture = ahead, step_limit, capture or capture_graph
        self._graphs: WeakKeyDictionary[Step, dict[Shape, Callable[[], None]]] = WeakKeyDictionary()

    def canvas_length(self, longest: int, most: int) -> int:
        return min(-(-longest // _LENGTHS) * _LENGTHS, max(longest, most))

    def prepare(self, step: Step) -> None:
        """Capture the graphs that ``step`` can need and does not have."""
        depth = step.mailbox.depth
        require(self._ahead < depth, f"ahead={self._ahead} is not below {depth}, as many letters as a mailbox holds")
        graphs = self._graphs.setdefault(step, {})
        for shape in step.fixed_shapes():
            if shape not in graphs:
                graphs[shape] = self._capture(step, shape)

    def run(self, step: Step) -> Reports:
        """Step until no sequence runs; yield one report per step."""
        mailbox, graphs = step.mailbox, self._graphs[step]
        ahead = self._ahead if step.policy.foreseen else 0
        due: deque[Turn] = deque()  # plans of this round, not launched
        queued: deque[tuple[int, Turn, bool]] = deque()  # outputs not yet read
        try:
            while True:
                # launch before waiting, so that the device has work while the host reads and plans
                while len(queued) <= ahead and (due := due or deque(step.fixed_turns(step.running()))):
                    (shape,) = due[0].shapes
                    if queued and shape.kind != "plan":  # a surplus step over whole canvases would cost too much
                        break
                    # outputs read since this plan was made may have ended its sequences
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
                if takers:  # none: a surplus replay
                    yield Report(takers, step.control, letter, last)
        except Exception:
            queued.clear()  # do not wait for a failed device: this step is not used again
            raise
        finally:
            last_queued = max((number for number, *_ in queued), default=0)
            mailbox.wait(last_queued, self._step_limit)  # leave no replay in flight


def capture_graph(step: Step, shape: Shape) -> Callable[[], None]:
    """Capture a step of this shape and return its replay; all sequences in the state must be done.

    Warm-up and capture share a stream and with it the workspace that cuBLAS keeps per stream. Workspaces are freed
    before and after: one from a graph's pool must not outlive the graph by use in others. Inference mode is off during
    the capture, since it would mark the random state that torch shares between graphs.
    """
    device = step.state.tokens.device
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step.run([shape])  # warm-up: a capture must not load or compile anything
        step.mailbox.posted += 1
    torch.cuda.synchronize(device)
    gc.collect()  # destroying a graph during a capture may invalidate the capture
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    how = {"pool": step.pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # the outer context restores the stream: a failed capture leaves its own as the current one
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
