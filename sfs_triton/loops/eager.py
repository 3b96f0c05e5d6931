"""The loop in which Python calls each operation: the CPU product path, and the oracle for loops on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import ops
from ..caching import CachePolicy, RowView
from ..errors import StepCapExceeded
from ..models.cache import Scope
from ..models.transformer import Transformer
from ..samplers import Sampler, SlowFast
from ..state import CONTROL, DecodeState
from ..torch_ops.cycle import FAST

_COLUMN = {name: index for index, name in enumerate(CONTROL)}


class StepReport(NamedTuple):
    """What one step did, for traces: each running row's scope, by row number."""

    step: int
    scopes: dict[int, Scope]


@dataclass(frozen=True)
class HostView:
    """What the host reads of the device state before a step: the rows still running and the positions they look at."""

    rows: dict[int, RowView]
    wanted: dict[int, list[int]]


class EagerLoop:
    """Steps a :class:`DecodeState` to its end.

    Rows whose scopes are equal are forwarded together; rows that differ (in prompt length, stage or span) on their own,
    so no row pays for another's length and each gets the bits it would get alone or in its group.
    """

    def __init__(self, model: Transformer, sampler: Sampler, policy: CachePolicy):
        self.model, self.sampler, self.policy = model, sampler, policy
        self._draw = sampler.draw()
        if isinstance(sampler, SlowFast):
            self._rules, self._decide, self._looked_at = sampler.rules(), ops.decide_cycle, ops.cycle_looked_at
        else:
            self._rules = sampler.rules(policy.opening(model.spec.shifted))
            self._decide, self._looked_at = ops.decide_block, ops.block_looked_at

    @torch.inference_mode()
    def start(self, state: DecodeState) -> None:
        """Allocate caches for ``state`` and remember which positions were given."""
        self._given = ~state.masked
        shape = (self.model.spec, *state.tokens.shape, self.model.device, self.model.dtype)
        make = self.policy.cache_class
        branches = 2 if self.sampler.cfg_scale else 1
        self._caches = [make(*shape) if make else None for _ in range(branches)]
        lengths = (state.end - state.start).tolist()
        self._steps_left = max(self.sampler.step_cap(length) for length in lengths)
        self._starts = state.start.tolist()

    def read(self, state: DecodeState) -> HostView:
        """The one place where the host reads the device."""
        control = state.control.tolist()
        rows = {}
        for index, row in enumerate(control):
            if not row[_COLUMN["done"]]:
                rows[index] = RowView(
                    start=row[_COLUMN["start"]], limit=row[_COLUMN["limit"]], block_start=row[_COLUMN["block_start"]],
                    block_end=row[_COLUMN["block_end"]], e=row[_COLUMN["e"]], fast=row[_COLUMN["phase"]] == FAST,
                    k=row[_COLUMN["k"]], step=row[_COLUMN["step"]])
        wanted: dict[int, list[int]] = {index: [] for index in rows}
        if rows:
            for index, position in self._looked_at(state).nonzero().tolist():
                wanted[index].append(position)
        return HostView(rows, wanted)

    @torch.inference_mode()
    def step(self, state: DecodeState) -> StepReport | None:
        """One forward and one decision for every row that still runs; None when there is none."""
        view = self.read(state)
        if not view.rows:
            return None
        if self._steps_left == 0:
            raise StepCapExceeded(f"rows {sorted(view.rows)} still run after the step cap of their sampler")
        self._steps_left -= 1
        scopes = {index: self.policy.scope(row) for index, row in view.rows.items()}
        groups: dict[tuple[Scope, int], list[int]] = {}
        for index, scope in scopes.items():
            prompt = self._starts[index] if scope.features is not None else 0
            groups.setdefault((scope, prompt), []).append(index)
        for (scope, prompt), members in groups.items():
            self._forward(state, scope, prompt, members, [view.wanted[index] for index in members])
        self._decide(state, self._rules)
        return StepReport(max(row.step for row in view.rows.values()), scopes)

    def _forward(self, state: DecodeState, scope: Scope, prompt: int, members: list[int],
                 wanted: list[list[int]]) -> None:
        """Forward one group and put its choices into ``state.token`` and ``state.score``."""
        device = state.tokens.device
        widest = max(1, max(map(len, wanted)))
        # rows that look at fewer positions repeat their last one; a row that looks at none still forwards
        padded = [(w or [scope.stop - 1]) + (w or [scope.stop - 1])[-1:] * (widest - max(1, len(w))) for w in wanted]
        places = torch.tensor(padded, device=device)
        rows = torch.tensor(members, device=device)
        select = (places - 1).clamp(min=0) if self.model.spec.shifted else places
        features = (prompt, getattr(self.policy, "ratio", 0.0)) if scope.features is not None else None
        whole = state.tokens[rows, scope.first : scope.stop]
        hidden = self.model.forward(whole, scope, self._caches[0], rows, select, features)
        if self.sampler.cfg_scale:
            blank = whole.masked_fill(self._given[rows, scope.first : scope.stop], state.mask_id)
            unconditional = self.model.forward(blank, scope, self._caches[1], rows, select, features)
            hidden = hidden + self.sampler.cfg_scale * (hidden - unconditional)
        logits = self.model.head(hidden.flatten(0, 1))
        keys = (None, None, None)
        if self._draw.temperature > 0:
            keys = (state.seed[rows].repeat_interleave(widest), places.flatten(),
                    state.step[rows].repeat_interleave(widest))
        token, score = ops.confidence(logits, self._draw, *keys)
        state.token[rows[:, None], places] = token.view(places.shape)
        state.score[rows[:, None], places] = score.view(places.shape)
