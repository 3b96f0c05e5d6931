"""The loop in which Python calls each operation: the CPU product path, and the oracle for loops on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..caching import CachePolicy, RowView
from ..errors import NumericalFault, StepCapExceeded
from ..kernels.control import FAST
from ..models.cache import Scope
from ..models.transformer import Transformer
from ..samplers import Sampler, SlowFast
from ..state import COLUMN, DecodeState


class StepReport(NamedTuple):
    """What one step did, for traces: each running row's scope and how many rows were recomputed, by row number."""

    step: int
    scopes: dict[int, Scope]
    recomputed: dict[int, int]


@dataclass(frozen=True)
class HostView:
    """What the host reads of the device state before a step: the rows still running and how many positions they look
    at. The positions themselves, row after row, stay on the device."""

    rows: dict[int, RowView]
    wanted: dict[int, torch.Tensor]


class EagerLoop:
    """Steps a :class:`DecodeState` to its end.

    Rows whose scopes are equal are forwarded together; rows that differ (in prompt length, stage or span) on their own,
    so no row pays for another's length and each gets the bits it would get alone or in its group.
    """

    def __init__(self, model: Transformer, sampler: Sampler, policy: CachePolicy):
        self.model, self.sampler, self.policy = model, sampler, policy
        self._draw = sampler.draw()
        self._ratio = getattr(policy, "ratio", 0.0)
        self._by_stage = isinstance(sampler, SlowFast)
        if self._by_stage:
            self._rules, self._decide = sampler.rules(), model.ops.decide_cycle
        else:
            self._rules, self._decide = sampler.rules(policy.opening(model.spec.shifted)), model.ops.decide_block

    @torch.inference_mode()
    def start(self, state: DecodeState) -> None:
        """Allocate caches for ``state`` and remember which positions were given."""
        self._given = ~state.masked
        shape = (self.model.spec, *state.tokens.shape, self.model.device, self.model.dtype)
        make = self.policy.cache_class
        branches = 2 if self.sampler.cfg_scale else 1
        self._caches = [make(*shape) if make else None for _ in range(branches)]
        self._starts = state.start.tolist()

    def read(self, state: DecodeState) -> HostView:
        """The one place where a step reads the device on the host."""
        control = state.control.tolist()
        faults = {index: row[COLUMN["fault"]] for index, row in enumerate(control) if row[COLUMN["fault"]]}
        broken = [f"row {index} at step {fault - 1}" for index, fault in faults.items() if fault > 0]
        if broken:
            raise NumericalFault(f"the model produced NaN logits: {', '.join(broken)}")
        stuck = [f"row {index} at step {-fault}" for index, fault in faults.items() if fault < 0]
        if stuck:
            raise StepCapExceeded(f"still undecided at the step cap of their sampler: {', '.join(stuck)}")
        rows = {}
        for index, row in enumerate(control):
            if not row[COLUMN["done"]]:
                rows[index] = RowView(
                    start=row[COLUMN["start"]],
                    limit=row[COLUMN["limit"]],
                    block_start=row[COLUMN["block_start"]],
                    block_end=row[COLUMN["block_end"]],
                    e=row[COLUMN["e"]],
                    fast=row[COLUMN["phase"]] == FAST,
                    k=row[COLUMN["k"]],
                    step=row[COLUMN["step"]],
                )
        inside = self.model.ops.look(state, by_stage=self._by_stage)
        pieces = inside.nonzero()[:, 1].split(inside.sum(1).tolist())
        return HostView(rows, {index: pieces[index] for index in rows})

    @torch.inference_mode()
    def step(self, state: DecodeState) -> StepReport | None:
        """One forward and one decision for every row that still runs; None when there is none."""
        view = self.read(state)
        if not view.rows:
            return None
        scopes = {index: self.policy.scope(row) for index, row in view.rows.items()}
        groups: dict[tuple[Scope, int], list[int]] = {}
        for index, scope in scopes.items():
            prompt = self._starts[index] if scope.features is not None else 0
            groups.setdefault((scope, prompt), []).append(index)
        for (scope, prompt), members in groups.items():
            self._forward(state, scope, prompt, members, _padded([view.wanted[i] for i in members], scope.stop - 1))
        self._decide(state, self._rules, slow=not all(row.fast for row in view.rows.values()))
        recomputed = {index: scope.recomputed(self._starts[index], self._ratio) for index, scope in scopes.items()}
        return StepReport(max(row.step for row in view.rows.values()), scopes, recomputed)

    def _forward(self, state: DecodeState, scope: Scope, prompt: int, members: list[int], places: torch.Tensor) -> None:
        """Forward one group and put its choices at ``places [b, m]`` into ``state.token`` and ``state.score``."""
        widest = places.shape[1]
        rows = torch.tensor(members, device=places.device)
        select = (places - 1).clamp(min=scope.first) if self.model.spec.shifted else places
        features = (prompt, self._ratio) if scope.features is not None else None
        whole = state.tokens[rows, scope.first : scope.stop]
        hidden = self.model.forward(whole, scope, self._caches[0], rows, select, features)
        if self.sampler.cfg_scale:
            blank = whole.masked_fill(self._given[rows, scope.first : scope.stop], state.mask_id)
            unconditional = self.model.forward(blank, scope, self._caches[1], rows, select, features)
            hidden = hidden + self.sampler.cfg_scale * (hidden - unconditional)
        keys = {}
        if self._draw.temperature > 0:
            keys = {
                "seed": state.seed[rows].repeat_interleave(widest),
                "position": places.flatten(),
                "step": state.step[rows].repeat_interleave(widest),
            }
        token, score = self.model.ops.choose(hidden.flatten(0, 1), self.model.weights.head, self._draw, **keys)
        state.token[rows[:, None], places] = token.view(places.shape).long()
        state.score[rows[:, None], places] = score.view(places.shape)


def _padded(positions: list[torch.Tensor], idle: int) -> torch.Tensor:
    """Positions ``[b, m]``: rows with fewer repeat their last one; a row that looks at none forwards ``idle``."""
    widest = max(1, max(map(len, positions)))
    rows = []
    for at in positions:
        last = at[-1:] if len(at) else at.new_full((1,), idle)
        rows.append(at if len(at) == widest else torch.cat((at, last.expand(widest - len(at)))))
    return torch.stack(rows)
