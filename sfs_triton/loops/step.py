"""One step of a generation, as a chain of device work that the host only starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from ..caching import CachePolicy, Canvas, RowView, Shape
from ..kernels.control import COLUMN, FAST
from ..models.cache import Scope
from ..models.transformer import Transformer
from ..samplers import Sampler, SlowFast
from ..state import DecodeState
from .mailbox import Mailbox


class Step:
    """Where to look, a forward, the head, a decision, a note to the host: for all rows of a state, again and again.

    :meth:`run` reads nothing on the host. What differs from step to step is either on the device, or in the
    :class:`~sfs_triton.caching.Shape` that it is given, so that runs of equal shape are the same work on the same
    buffers and can be captured. The host learns what became of a step from :attr:`mailbox`.
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
        # graphs of steps share what they allocate: one runs at a time, and none leaves anything there for another
        self.pool = torch.cuda.graph_pool_handle() if state.tokens.device.type == "cuda" else None
        sources = {"control": state.control}
        if frames:
            sources |= {"tokens": state.tokens, "commit_step": state.commit_step}
        if state.events is not None:
            sources |= {f"event_{name}": value for name, value in state.events.items()}
            sources["commit_step"] = state.commit_step
        self.mailbox = Mailbox(sources, depth, model.ops.post, state.tokens.device)

    def _allocate(self) -> None:
        model, (batch, length) = self.model, self.state.tokens.shape
        device = self.state.tokens.device
        make = self.policy.store
        branches = (2 if self.sampler.cfg_scale else 1) if make else 0
        self.caches = [make(model.spec, batch, length, device, model.dtype) for _ in range(branches)]
        self._lists = torch.empty((2, batch * length), dtype=torch.int32, device=device)
        self._count, self._unused = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2))
        n_tiles = -(-length * (model.spec.n_heads // model.spec.n_kv_heads) // 16)
        self._counters = torch.zeros(batch * model.spec.n_kv_heads * n_tiles, dtype=torch.int32, device=device)
        self._key_range = torch.empty((batch, 4), dtype=torch.int32, device=device)
        model.reach(length)

    def expect(self, prompts: Sequence[int], masks: Sequence[int]) -> None:
        """Note what the host knows of rows that are to come: prompt lengths, and how many positions are undecided."""
        block = getattr(self.sampler, "block_length", None)
        window = min(n for n in (max(masks), block, self._look["span_cap"], self.state.length) if n is not None)
        self.canvas = Canvas(self.state.length, min(prompts), max(prompts), max(1, window), block)

    @torch.inference_mode()
    def begin(self) -> None:
        """Post how the rows that are in the state now stand."""
        self.mailbox.post()
        self.mailbox.posted += 1

    def fixed(self, rows: Sequence[RowView], number: int) -> Shape:
        """The fixed shape of this generation's step ``number``, given how the rows stand before it."""
        return self.policy.fixed(self.canvas, number, any(row.k == 0 for row in rows))

    def hear(self, number: int, limit: float) -> tuple[list[list[int]], dict[str, numpy.ndarray]]:
        """Control numbers of all rows, and all that was posted, as letter ``number`` has them: the one place where a
        host reads of a generation that runs. Waits for the letter at most ``limit`` seconds."""
        letter = self.mailbox.read(number, limit)
        return letter["control"].tolist(), letter

    def views(self, control: Sequence[Sequence[int]]) -> list[RowView]:
        """The rows that still run, from what was posted of them."""
        running = [(index, row) for index, row in enumerate(control) if not row[COLUMN["done"]]]
        return [self._view(index, row) for index, row in running]

    def _view(self, index: int, row: Sequence[int]) -> RowView:
        start, limit, block_start, block_end, s, e, phase, k, step, left = (row[column] for column in _VIEWED)
        first, stop = block_start, block_end
        if self.by_stage:
            first, stop = s, e if phase == FAST else min(block_end, s + (self.policy.span_cap or block_end))
        wanted = min(max(stop - first, 0), left)
        return RowView(index, start, limit, block_start, block_end, e, phase == FAST, k, step, wanted)

    @torch.inference_mode()
    def run(self, shapes: Sequence[Shape], *, slow: bool = True) -> None:
        """One step. ``slow=False`` says that no row is in its slow stage."""
        ops, state = self.model.ops, self.state
        if shapes[0].kind == "plan":
            self._plan(shapes[0])
        else:
            ops.look(state, **self._look)
        if self.policy.look_ahead:
            state.choice_score.fill_(float("-inf"))  # of what no list holds
        for shape in shapes:
            self._forward(shape)
        self._decide(state, self._rules, slow=slow)
        self.mailbox.post()

    def _list(self, which: int, size: int) -> torch.Tensor:
        """A list of ``size`` for each row, ``[B, size]``, always at the same address."""
        batch = self.state.tokens.shape[0]
        return self._lists[which, : batch * size].view(batch, size)

    def _plan(self, shape: Shape) -> None:
        ops, state, policy = self.model.ops, self.state, self.policy
        rows, target = self._list(0, shape.size), self._list(1, shape.size)
        how = {"look_ahead": policy.look_ahead, "shift": self._shift, "stale": policy.rotate}
        ops.plan(state, rows, target, self._count, **self._look, **how)
        state.listed.copy_(self._count)

    def _forward(self, shape: Shape) -> None:
        """Forward the shape's rows, and put what the head says of those that are looked at into the state."""
        state, ops = self.state, self.model.ops
        batch = None
        if shape.members is not None and len(shape.members) < state.tokens.shape[0]:
            batch = torch.tensor(shape.members, device=state.tokens.device)
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
        if self._draw.temperature > 0:
            keys |= self._noise(target, which, batch)
        token, score = ops.choose(hidden.flatten(0, 1), self.model.weights.head, self._draw, **keys)
        ops.place(state, token, score, target, which=which, row=batch)

    def _scope(self, shape: Shape, batch: torch.Tensor | None) -> Scope:
        """What to forward; fills in the lists and ranges that it points to."""
        state, policy, reach = self.state, self.policy, self.model.ops.reach
        given = {"batch": batch, "counters": self._counters, "features": shape.features}
        if shape.features is not None:
            given["prompt"] = _of(state.start, batch)
        elif policy.store is not None:
            given["store"] = True
            if shape.kind in ("same", "prefix"):
                state.dirty.zero_()
                state.forwarded.copy_(state.step[:, None])
        if shape.kind == "same":
            return Scope(shape.first, shape.first + shape.size, shape.keys, **given)
        rows = None if shape.kind == "prefix" else self._list(0, shape.size)
        if shape.kind != "plan":
            how = {"to_span_end": policy.to_span_end, "block": policy.block}
            reach(state, rows, self._count, self._key_range, **how)
        elif shape.ragged:
            reach(state, None, self._unused, self._key_range, to_span_end=False, block=None)
        given |= {"rows": None if rows is None else _of(rows, batch), "count": _of(self._count, batch)}
        if shape.ragged:
            given["key_range"] = _of(self._key_range, batch)
        return Scope(0, shape.size, shape.keys, **given)

    def _targets(self, shape: Shape, scope: Scope, batch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the scope's rows are wanted, int64 ``[b, T]``, and the positions they decide, int32, -1 idle."""
        compact = self.model.ops.compact
        if shape.kind == "plan":
            target = _of(self._list(1, shape.size), batch)
            slot, _ = compact(target >= 0, capacity=shape.targets)
            select = slot.clamp(min=0).long()
            return select, torch.where(slot < 0, -1, target.gather(1, select))
        target, _ = compact(_of(self.state.inside, batch), capacity=shape.targets)
        first = scope.first + self._shift if scope.rows is None else scope.rows[:, :1] + self._shift
        return (target - first).clamp(min=0).long(), target

    def _noise(
        self, target: torch.Tensor, which: torch.Tensor | None, batch: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What keys the noise of each row of the head: row seed, position and step, int64 ``[R]``."""
        seed, step = (_of(t, batch)[:, None].expand_as(target) for t in (self.state.seed, self.state.step))
        keys = {"seed": seed, "position": target.clamp(min=0).long(), "step": step}
        at = slice(None) if which is None else which.clamp(min=0)
        return {name: value.flatten()[at].contiguous() for name, value in keys.items()}


_VIEWED = [
    COLUMN[name]
    for name in ("start", "limit", "block_start", "block_end", "s", "e", "phase", "k", "step", "masks_left")
]


def _of(x: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """The rows of ``x`` that ``batch`` names, or all of it."""
    return x if batch is None else x[batch]
