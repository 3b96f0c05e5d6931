"""One step of a generation: a chain of device work that the host launches and does not steer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch

from ..decoding.caching import CachePolicy, Canvas, RowView, Shape
from ..decoding.samplers import Sampler, SlowFast
from ..kernels.control import COLUMN, CONTROL, FAST
from ..models.cache import Scope
from ..models.transformer import Transformer
from .host_ring import Mailbox
from .state import DecodeState, send


class Turn(NamedTuple):
    """Step plan: the slots that take a step together, the step number of each, and the shapes to launch. ``slow``: some
    sequences may be in their slow stage."""

    steps: dict[int, int]
    shapes: list[Shape]
    slow: bool = True


class Step:
    """Device work of one step, for the sequences in the slots of a state: candidates, forward, head, decide, publish.

    :meth:`run` reads nothing on the host. Values that differ from step to step are on the device or in the
    :class:`~sfs_triton.decoding.caching.Shape` argument, so runs of equal shape do the same work on the same buffers
    and can be captured. The host reads the output of a step from :attr:`mailbox`, the host ring.

    Sequences join and leave between steps, in stream order with the device's other work. Outputs of steps that were
    launched before a sequence joined or was dropped are not valid for its slot and are ignored there.
    """

    def __init__(
        self,
        model: Transformer,
        sampler: Sampler,
        policy: CachePolicy,
        state: DecodeState,
        *,
        frames: bool = False,
        depth: int = 4,
    ):
        self.model, self.sampler, self.policy, self.state = model, sampler, policy, state
        self.by_stage = isinstance(sampler, SlowFast)
        self._draw, self._shift = sampler.draw(), int(model.spec.shifted)
        self._look = {"by_stage": self.by_stage, "span_cap": policy.span_cap if self.by_stage else None}
        self._rules = sampler.rules(policy.opening(model.spec.shifted), **policy.rules)
        self._decide = model.ops.decide_cycle if self.by_stage else model.ops.decide_block
        self._allocate()
        # graphs share a memory pool: one runs at a time, and none keeps data there for another
        self.pool = torch.cuda.graph_pool_handle() if state.tokens.device.type == "cuda" else None
        sources = {"control": state.control}
        if frames:
            sources |= {"tokens": state.tokens, "commit_step": state.commit_step}
        if state.events is not None:
            sources |= {f"event_{name}": value for name, value in state.events.items()}
            sources["commit_step"] = state.commit_step
        self.mailbox = Mailbox(sources, depth, model.ops.publish, state.tokens.device)
        self.control = [[int(name == "done") for name in CONTROL] for _ in range(self.slots)]  # as last read
        self._since = [0] * self.slots  # number of the first output that is valid for the sequence in a slot
        self._started = [0] * self.slots  # launched steps of that sequence

    @property
    def slots(self) -> int:
        return self.state.tokens.shape[0]

    def _allocate(self) -> None:
        model, (batch, length) = self.model, self.state.tokens.shape
        device = self.state.tokens.device
        make = self.policy.store
        branches = (2 if self.sampler.cfg_scale else 1) if make else 0
        self.caches = [make(model.local, batch, length, device, model.dtype) for _ in range(branches)]
        self._lists = torch.empty((2, batch * length), dtype=torch.int32, device=device)
        self._count, self._unused = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2))
        n_tiles = -(-length * (model.local.n_heads // model.local.n_kv_heads) // 16)
        self._counters = torch.zeros(batch * model.local.n_kv_heads * n_tiles, dtype=torch.int32, device=device)
        self._key_range = torch.empty((batch, 4), dtype=torch.int32, device=device)
        self._aimed = torch.arange(batch, device=device)
        self._parked = torch.zeros(batch, dtype=torch.bool, device=device)
        self._aim = (tuple(range(batch)), frozenset())  # present values of those two
        model.ensure_rope_length(length)

    # ------------------------------------------------------------------------------------------ join and leave

    def expect(self, prompts: Sequence[int], masks: Sequence[int]) -> None:
        """Set the bounds of the sequences to accept: their prompt lengths and numbers of undecided positions."""
        block = getattr(self.sampler, "block_length", None)
        window = min(n for n in (max(masks), block, self._look["span_cap"], self.state.length) if n is not None)
        self.canvas = Canvas(self.state.length, min(prompts), max(prompts), max(1, window), block)

    def join(self, slot: int, row: list[int], start: int, **settings: Any) -> None:
        """Put a canvas into a free slot; arguments as for :meth:`DecodeState.put`. The next step includes it."""
        self.control[slot] = self.state.put(slot, row, start, **settings)
        self._since[slot], self._started[slot] = self.mailbox.posted + 1, 0

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """End a sequence: it takes no further step. Steps already launched still run; their outputs are ignored."""
        self.state.done[slot : slot + 1].fill_(1)
        self.control[slot][COLUMN["done"]] = 1
        self._since[slot] = self.mailbox.posted + 1

    def hear(self, number: int, limit: float) -> dict[str, numpy.ndarray]:
        """Read output ``number`` of the host ring, waiting at most ``limit`` seconds, and update :attr:`control` by it.

        The only host read of running sequences; finished ones are read from the outbox of their slot.
        """
        letter = self.mailbox.read(number, limit)
        for slot, row in enumerate(letter["control"].tolist()):
            if self._since[slot] <= number:
                self.control[slot] = row
        return letter

    def views(self, control: Sequence[Sequence[int]]) -> list[RowView]:
        """Return the running sequences, read from their control numbers."""
        running = [(index, row) for index, row in enumerate(control) if not row[COLUMN["done"]]]
        return [self._view(index, row) for index, row in running]

    def running(self) -> list[RowView]:
        """Return the sequences not known to be finished, each at the next step to launch for it."""
        return [row._replace(step=self._started[row.index]) for row in self.views(self.control)]

    def takers(self, turn: Turn, number: int) -> list[RowView]:
        """Return the sequences that take the step of output ``number``, in their state before that step."""
        return [row for row in self.views(self.control) if row.index in turn.steps and self._since[row.index] <= number]

    def _view(self, index: int, row: Sequence[int]) -> RowView:
        start, limit, block_start, block_end, s, e, phase, k, step, left = (row[column] for column in _VIEWED)
        first, stop = block_start, block_end
        if self.by_stage:
            first, stop = s, e if phase == FAST else min(block_end, s + (self.policy.span_cap or block_end))
        wanted = min(max(stop - first, 0), left)
        return RowView(index, start, limit, block_start, block_end, e, phase == FAST, k, step, wanted)

    # ------------------------------------------------------------------------------------------------ step plans

    def fixed(self, rows: Sequence[RowView], number: int) -> Shape:
        """Return the fixed shape in which these sequences take their step ``number``."""
        return self.policy.fixed(self.canvas, number, any(row.k == 0 for row in rows))

    def fixed_shapes(self) -> list[Shape]:
        """Return every fixed shape of a step plan: each for one, two, four... canvases, and for all of them."""
        sizes = [size for power in range(self.slots.bit_length()) if (size := 1 << power) < self.slots]
        aimed = [shape._replace(aimed=self.slots > 1) for shape in self.policy.shapes(self.canvas)]
        return [shape._replace(members=size) for shape in aimed for size in sizes] + aimed

    def tight_turns(self, rows: Sequence[RowView]) -> list[Turn]:
        """Return step plans of exact shapes: as large as the sequences need."""
        turns = []
        for group in self.policy.together(rows):
            aimed = len(group) < len(rows)
            shapes = [shape._replace(aimed=aimed) for shape in self.policy.tight(group, self.canvas)]
            steps = {row.index: row.step for row in group}
            turns.append(Turn(steps, shapes, slow=not all(row.fast for row in group)))
        return turns

    def fixed_turns(self, rows: Sequence[RowView]) -> list[Turn]:
        """Return step plans of fixed shapes: one per shape, padded with slots whose sequences are done."""
        # graphs are captured for powers of two and for all slots, so a group is padded up to a captured size, or split
        # into captured sizes where too few slots are spare
        groups: dict[Shape, list[int]] = {}
        for row in rows:
            groups.setdefault(self.fixed([row], row.step)._replace(aimed=self.slots > 1), []).append(row.index)
        steps, turns = {row.index: row.step for row in rows}, []
        for shape, group in groups.items():
            # a listed step leaves a parked sequence alone (its list is empty), but a whole-canvas step overwrites the
            # cache of every member, so no running sequence can be padding there
            spare = [slot for slot in range(self.slots) if slot not in (group if shape.kind != "prefix" else steps)]
            while group:
                size = self._size(len(group), len(spare))
                members = None if size == self.slots else size
                turns.append(Turn({slot: steps[slot] for slot in group[:size]}, [shape._replace(members=members)]))
                group = group[size:]
        return turns

    def still(self, turn: Turn) -> Turn | None:
        """Return the plan without sequences that have ended, or whose slot was reused, since it was made."""
        running = {row.index: row.step for row in self.running()}
        steps = {slot: number for slot, number in turn.steps.items() if running.get(slot) == number}
        return turn._replace(steps=steps) if steps else None

    def _size(self, rows: int, spare: int) -> int:
        """Return the number of canvases in a step plan for ``rows`` sequences and ``spare`` slots of padding."""
        size = min(1 << (rows - 1).bit_length(), self.slots)
        return size if size <= rows + spare else 1 << (rows.bit_length() - 1)

    def aim(self, turn: Turn) -> None:
        """Set the slots that take the next step of an ``aimed`` shape; all others keep their state."""
        # captured graphs read the order of slots and the parked flags at fixed addresses. The first slots of the order
        # are forwarded: the plan's, then padding; running sequences that must not be written to come last.
        shape = turn.shapes[0]
        if not shape.aimed:
            return
        taken, every = frozenset(turn.steps), range(self.slots)
        parked = frozenset(row.index for row in self.views(self.control)) - taken
        order = tuple(turn.steps)
        if isinstance(shape.members, int):
            running = taken | (parked if shape.kind == "prefix" else frozenset())
            order += tuple(slot for slot in every if slot not in running)
        order += tuple(slot for slot in every if slot not in order)
        if self._aim != (order, parked):  # consecutive steps mostly have the same slots, and then need no copies
            self._aim = order, parked
            send(self._aimed, list(order))
            send(self._parked, [slot in parked for slot in every])

    def started(self, turn: Turn) -> None:
        """Count a step that has just been launched or replayed."""
        self.mailbox.posted += 1
        for slot in turn.steps:
            self._started[slot] += 1

    # ------------------------------------------------------------------------------------------------ on the device

    @torch.inference_mode()
    def run(self, shapes: Sequence[Shape], *, slow: bool = True) -> None:
        """Launch one step. ``slow=False``: no sequence is in its slow stage."""
        ops, state, aimed = self.model.ops, self.state, shapes[0].aimed
        if aimed:  # parked sequences count as done for the length of this step
            done = state.done.clone()
            state.done.masked_fill_(self._parked, 1)
        if shapes[0].kind == "plan":
            self._plan(shapes[0])
        else:
            ops.mark_candidates(state, **self._look)
        if self.policy.look_ahead:
            state.choice_score.fill_(float("-inf"))  # for positions in no list
        for shape in shapes:
            self._forward(shape)
        self._decide(state, self._rules, slow=slow)
        if aimed:
            state.done.copy_(torch.where(self._parked, done, state.done))
        self.mailbox.post()

    def _list(self, which: int, size: int) -> torch.Tensor:
        """Return a list of ``size`` positions per slot, ``[B, size]``, always at the same address."""
        batch = self.state.tokens.shape[0]
        return self._lists[which, : batch * size].view(batch, size)

    def _plan(self, shape: Shape) -> None:
        ops, state, policy = self.model.ops, self.state, self.policy
        rows, target = self._list(0, shape.size), self._list(1, shape.size)
        how = {"look_ahead": policy.look_ahead, "shift": self._shift, "stale": policy.rotate}
        ops.list_positions(state, rows, target, self._count, **self._look, **how)
        state.listed.copy_(self._count)

    def _forward(self, shape: Shape) -> None:
        """Forward the shape's positions; write tokens and scores of the candidates among them to the state."""
        state, ops = self.state, self.model.ops
        batch = self._batch(shape.members)
        scope = self._scope(shape, batch)
        select, target = self._targets(shape, scope, batch)
        tokens = _of(state.tokens, batch)
        hidden = self.model.forward(tokens, scope, self.caches[0] if self.caches else None, select)
        if self.sampler.cfg_scale:
            blank = tokens.masked_fill(_of(state.given, batch), state.mask_id)
            unconditional = self.model.forward(blank, scope, self.caches[1] if self.caches else None, select)
            hidden = hidden + self.sampler.cfg_scale * (hidden - unconditional)
        which, keys = None, {}
        if shape.ragged:
            which, keys["count"] = ops.compact((target >= 0).view(1, -1))
            which = keys["rows"] = which[0]
        if self._draw.noise or self._draw.nucleus:
            keys |= self._row_numbers(target, which, batch)
        token, score = self.model.choose(hidden.flatten(0, 1), self._draw, **keys)
        ops.scatter_choices(state, token, score, target, which=which, row=batch)

    def _batch(self, members: tuple[int, ...] | int | None) -> torch.Tensor | None:
        """Return the slots as an index; None for all of them."""
        if members is None or isinstance(members, tuple) and len(members) == self.slots:
            return None
        if isinstance(members, int):
            return self._aimed[:members]
        return torch.tensor(members, device=self.state.tokens.device)

    def _scope(self, shape: Shape, batch: torch.Tensor | None) -> Scope:
        """Return the scope to forward, with its lists and ranges written to fixed buffers."""
        state, policy, position_ranges = self.state, self.policy, self.model.ops.position_ranges
        given = {"batch": batch, "counters": self._counters, "features": shape.features}
        if shape.features is not None:
            given["prompt"] = _of(state.start, batch)
        elif policy.store is not None:
            given["store"] = True
            # a whole-canvas step refreshes every cached position; ``ops.list_positions`` notes the same of listed ones
            if shape.kind in ("same", "prefix"):
                here = (state.done == 0)[:, None]
                state.dirty.masked_fill_(here, False)
                torch.where(here, state.step[:, None], state.forwarded, out=state.forwarded)
        if shape.kind == "same":
            return Scope(shape.first, shape.first + shape.size, shape.keys, **given)
        rows = None if shape.kind == "prefix" else self._list(0, shape.size)
        if shape.kind != "plan":
            how = {"to_span_end": policy.to_span_end, "block": policy.block}
            position_ranges(state, rows, self._count, self._key_range, **how)
        elif shape.ragged:
            # only key ranges are missing: ``ops.list_positions`` has written list and count, which must not change
            position_ranges(state, None, self._unused, self._key_range, to_span_end=False, block=None)
        given |= {"rows": None if rows is None else _of(rows, batch), "count": _of(self._count, batch)}
        if shape.ragged:
            given["key_range"] = _of(self._key_range, batch)
        return Scope(0, shape.size, shape.keys, **given)

    def _targets(self, shape: Shape, scope: Scope, batch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices into the scope to select, int64 ``[b, T]``, and the positions they decide, int32, -1 idle."""
        compact = self.model.ops.compact
        if shape.kind == "plan":
            target = _of(self._list(1, shape.size), batch)
            slot, _ = compact(target >= 0, capacity=shape.targets)
            select = slot.clamp(min=0).long()
            return select, torch.where(slot < 0, -1, target.gather(1, select))
        target, _ = compact(_of(self.state.candidate, batch), capacity=shape.targets)
        first = scope.first + self._shift if scope.rows is None else scope.rows[:, :1] + self._shift
        return (target - first).clamp(min=0).long(), target

    def _row_numbers(
        self, target: torch.Tensor, which: torch.Tensor | None, batch: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return sampling parameters per row of the head, ``[R]``: temperature and noise keys, or ``top_p``."""
        state, draw = self.state, self._draw
        names = ("temperature", "seed", "step") * draw.noise + ("top_p",) * draw.nucleus
        numbers = {name: _of(getattr(state, name), batch)[:, None].expand_as(target) for name in names}
        if draw.noise:
            numbers["position"] = target.clamp(min=0).long()
        at = slice(None) if which is None else which.clamp(min=0)
        return {name: value.flatten()[at].contiguous() for name, value in numbers.items()}


_VIEWED = [
    COLUMN[name]
    for name in (
        *("start", "limit", "block_start", "block_end", "span_start", "span_end"),
        *("stage", "stage_step", "step", "masks_left"),
    )
]


def _of(x: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of ``x`` at ``batch``, or all of ``x`` if that is None."""
    return x if batch is None else x[batch]
