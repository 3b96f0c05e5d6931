"""Model runner: every device tensor of a persistent batch, and one step as device work that the host does not steer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy
import torch

from ..decoding.params import BatchKey
from ..decoding.samplers import Sampler
from ..decoding.step_plan import Forward, Positions, StepOutput, StepPlan
from ..kernels.control import Progress
from ..models.cache import KVCache, Scope, Vectors
from ..models.earlier import EarlierSteps
from ..models.transformer import Transformer
from .cuda_graph import launching
from .end_of_think import EndOfThink, Raised, end_of_think
from .host_ring import HostRing
from .prompt_embeds import PromptEmbeds
from .state import DecodeState, send

CANVAS_BYTES = 130  # estimate per position of a canvas: decode state on the device, and copies in the host's rings
_SLEPT, _LONGEST_SLEEP = 0.8, 0.05  # part of a step's last duration that the next wait for one sleeps; seconds
_ABANDONED: list[HostRing] = []  # a device that still runs may write there, so the memory is never freed


class ModelRunner:
    """Launch step plans and collect their outputs, for the sequences in the slots of a persistent batch.

    All tensors are allocated once, at fixed addresses. A step is a chain of device work: candidates, forward, head,
    decision, copy to the host ring. It reads nothing on the host: values that differ from step to step are on the
    device or in its :class:`~sfs_triton.decoding.step_plan.Forward`, so steps of equal shape do the same work on the
    same buffers and can be captured. Sequences join and leave between steps, in stream order with other work.

    Args:
        response: most positions of a sequence from its prompt's end on.
        depth: outputs that the host ring holds.
        captures: steps can be captured. Without, plain torch publishes their outputs by copies of its own.
    """

    def __init__(
        self,
        model: Transformer,
        key: BatchKey,
        slots: int,
        length: int,
        response: int,
        depth: int = 4,
        captures: bool = True,
    ):
        self.model, self.slots, self.length = model, slots, length
        self.sampler, self.policy = key.sampler, key.cache
        self._draw, self._shift = self.sampler.draw(), int(model.spec.shifted)
        self._narrowing = self.sampler.narrowing()
        by_stage = self.sampler.by_stage
        self._stages = {"by_stage": by_stage, "span_cap": self.policy.span_cap if by_stage else None}
        self._rules = self.sampler.rules(self.policy.opening(model.spec.shifted), **self.policy.rules)
        self._decide = model.ops.decide_cycle if by_stage else model.ops.decide_block
        self.captures = captures
        self.graphs: dict[Forward, Callable[[], None]] = {}  # replays of captured steps
        self.graph_bytes = 0  # of device memory that they hold
        # graphs share a memory pool: one runs at a time, and none keeps data there for another
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        with torch.device("cpu"):  # not the caller's default device
            self.state = self._blank_state(key, response)
            self._allocate_buffers(key)
            self._allocate_rings(key, depth)
        # of each output not collected, by plan: its number in the host ring, and when it was launched
        self._outputs: dict[int, tuple[int, float]] = {}
        self._collected = 0.0  # when the last output was
        self._seconds: dict[Forward, float] = {}  # duration of the last step of each padded shape

    # ---------------------------------------------------------------------------------------------------- allocation

    def _blank_state(self, key: BatchKey, response: int) -> DecodeState:
        spec, device = self.model.spec, self.model.device
        state = DecodeState.blank(
            batch=self.slots,
            length=self.length,
            window=getattr(self.sampler, "window", 1),
            mask_id=spec.mask_id,
            eos_id=spec.eos_id,
            other_ends=spec.other_ends,
            device=device,
            trace=key.trace,
            entropy=self._draw.entropy,
        )
        for name, size in self.sampler.schedule_sizes(response).items():
            setattr(state, name, torch.zeros((self.slots, size), device=device))
        return state

    def _allocate_buffers(self, key: BatchKey) -> None:
        model, batch, length = self.model, self.slots, self.length
        device, make = model.device, _store_of(key)
        branches = (2 if self.sampler.cfg_scale else 1) if make else 0
        self.caches = [make(model.local, batch, length, device, model.dtype) for _ in range(branches)]
        self._lists = torch.empty((2, batch * length), dtype=torch.int32, device=device)
        self._count, self._unused = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2))
        n_tiles = -(-length * (model.local.n_heads // model.local.n_kv_heads) // 16)
        n_counters = max(batch * model.local.n_kv_heads * n_tiles, -(-2 * model.local.mlp // 128))
        self._counters = torch.zeros(n_counters, dtype=torch.int32, device=device)
        self._key_range = torch.empty((batch, 4), dtype=torch.int32, device=device)
        self._order = torch.arange(batch, device=device)
        self._vectors = None
        if key.embeds:
            here = torch.zeros((batch, length), dtype=torch.bool, device=device)
            vectors = torch.zeros((batch, length, model.spec.d_model), dtype=model.dtype, device=device)
            self._vectors = Vectors(here, vectors)
        self._ends = torch.tensor(model.spec.end_ids, device=device)
        self._end_of_think = None
        if self.sampler.end_think_logit_boost:
            ids = torch.tensor(self.sampler.end_think_token_ids, device=device)
            response = torch.ones((batch, 2), dtype=torch.int64, device=device)
            boost, power = self.sampler.end_think_logit_boost, self.sampler.end_think_boost_power
            self._end_of_think = EndOfThink(ids, response, boost, power)
        self.earlier = EarlierSteps(model, self._draw, self.sampler.block_length, batch, length)
        self._paused = torch.zeros(batch, dtype=torch.bool, device=device)
        self._selected = (tuple(range(batch)), frozenset())  # present values of those two
        model.ensure_rope_length(length)

    def _allocate_rings(self, key: BatchKey, depth: int) -> None:
        state, device, by_torch = self.state, self.model.device, self.model.backend == "torch"
        publish = None if by_torch and not self.captures else self.model.ops.publish
        sources = {"control": state.control}
        if key.frames:
            sources |= {"tokens": state.tokens, "commit_step": state.commit_step}
        if state.events is not None:
            sources |= {f"event_{name}": value for name, value in state.events.items()}
            sources["commit_step"] = state.commit_step
        self.ring = HostRing(sources, depth, publish, device)
        names = ("tokens", "commit_step", "control")
        finals = [{name: getattr(state, name)[slot] for name in names} for slot in range(self.slots)]
        self._finals = [HostRing(final, 1, publish, device) for final in finals]

    @staticmethod
    def bytes_needed(model: Transformer, key: BatchKey, slots: int, length: int) -> int:
        """Return the bytes of caches and canvases, without the activations of a step."""
        store, branches = _store_of(key), 2 if key.sampler.cfg_scale else 1
        cache = 0 if store is None else branches * store.values(model.local, length) * model.dtype.itemsize
        schedule = 4 * sum(key.sampler.schedule_sizes(length).values())  # float32
        vectors = key.embeds * length * model.spec.d_model * model.dtype.itemsize
        earlier = EarlierSteps.bytes_needed(model, key.sampler.draw(), key.sampler.block_length, length)
        return slots * (cache + CANVAS_BYTES * length + schedule + vectors + earlier)

    # ------------------------------------------------------------------------------------------------------ sequences

    @torch.inference_mode()
    def put(
        self,
        slot: int,
        canvas: list[int],
        start: int,
        sampler: Sampler,
        seed: int,
        step_cap: int,
        embeds: PromptEmbeds | None = None,
        response: tuple[int, int] | None = None,
    ) -> Progress:
        """Put a canvas into a slot whose sequence is done; return its progress. The next step can include it.

        Args:
            start: first position that may be decided.
            sampler: the sequence's own; it differs from the batch's in per-sequence parameters only.
            step_cap: a sequence that needs more steps ends with a fault.
            embeds: vectors at some places of the prompt, where the batch key allows them.
            response: its first position, and its length once the canvas has grown; None: all from ``start`` on.
        """
        length = len(canvas) - start
        with torch.device("cpu"):
            if self._vectors is not None:
                self._put_vectors(slot, embeds)
            if self._end_of_think is not None:
                send(self._end_of_think.response[slot], list(response or (start, length)))
            self.earlier.forget(slot)
            for name, values in sampler.schedule(length, seed).items():
                send(getattr(self.state, name)[slot, : len(values)], values)
            return self.state.put(
                slot,
                canvas,
                start,
                block_length=sampler.block_length,
                seed=seed,
                cap=step_cap,
                sampling=sampler.sampling_values(),
                block_steps=sampler.block_steps(length),
                open_blocks=sampler.open_blocks,
            )

    def _put_vectors(self, slot: int, embeds: PromptEmbeds | None) -> None:
        here, vectors = (each[slot] for each in self._vectors)
        places = [] if embeds is None else list(embeds.places)
        send(here, torch.zeros(self.length, dtype=torch.bool).index_fill_(0, torch.tensor(places).long(), True))
        if places:
            vectors.index_copy_(0, torch.tensor(places).to(vectors.device), embeds.vectors)

    @torch.inference_mode()
    def end(self, slot: int | None = None) -> None:
        """Mark the slot's sequence, or all of them, as done. Steps already launched still run."""
        (self.state.done if slot is None else self.state.done[slot : slot + 1]).fill_(1)

    @torch.inference_mode()
    def publish_final(self, slot: int) -> None:
        """Queue a copy of the slot's final state, behind the work already launched.

        There is room for one: it must be read before the slot is used again.
        """
        self._finals[slot].publish()
        self._finals[slot].count_launch()

    def has_final(self, slot: int) -> bool:
        """Return whether the final state of the slot's sequence has arrived."""
        return self._finals[slot].has(self._finals[slot].launched)

    def read_final(self, slot: int, limit: float) -> dict[str, numpy.ndarray]:
        """Return ``tokens``, ``commit_step`` and ``control`` of a slot; wait for them at most ``limit`` seconds."""
        return self._finals[slot].read(self._finals[slot].launched, limit)

    # ----------------------------------------------------------------------------------------------- launch, collect

    def launch(self, plan: StepPlan) -> None:
        """Queue a step on the device: replay its graph if there is one, else launch its operations."""
        self._select(plan)
        replay = self.graphs.get(plan.forwards[0]) if plan.padded else None
        if replay is not None:
            replay()
        elif plan.padded:
            self.run_padded(plan.forwards[0])
        else:
            self.run(plan.forwards, pausing=bool(plan.paused), slow=plan.slow)
        self._outputs[plan.number] = self.ring.count_launch(), time.monotonic()

    def collect(self, plan: StepPlan, limit: float) -> StepOutput:
        """Return the output of a launched plan; wait for it at most ``limit`` seconds. The only read of running steps.

        Raises:
            DeviceFault: the device has failed.
            LoopTimeout: it has not been published by then.
        """
        number, launched = self._outputs.pop(plan.number)
        began, shape = max(launched, self._collected), plan.forwards[0] if plan.padded else None
        # most of a step is slept through: polling would take a whole core from the host's other threads
        slept = min(_SLEPT * self._seconds.get(shape, 0.0), _LONGEST_SLEEP)
        published = self.ring.read(number, limit, began + slept)
        self._collected = time.monotonic()
        if shape is not None:  # exact shapes hardly come twice
            self._seconds[shape] = self._collected - began
        progress = {slot: Progress(*published["control"][slot].tolist()) for slot in plan.steps}
        return StepOutput(plan.number, progress, published, plan.completes_round)

    def drain(self, limit: float) -> None:
        """Wait until no step is in flight; outputs that were not collected are dropped."""
        self.ring.wait(max((number for number, _ in self._outputs.values()), default=0), limit)
        self._outputs.clear()

    def abandon(self) -> None:
        """Give this runner up after an error: keep its host memory, where the device may still write."""
        for ring in (self.ring, *self._finals):
            ring.forget_sources()
            _ABANDONED.append(ring)

    def warm_up(self, shape: Forward) -> None:
        """Run a step of a padded shape while all sequences are done: it changes nothing."""
        self.run_padded(shape)
        self.ring.count_launch()

    def run_padded(self, shape: Forward) -> None:
        """Queue the operations of a padded step, which a graph can capture."""
        # with one slot there is nobody to pause; with more, one graph serves plans that pause some and that pause none
        self.run([shape], pausing=self.slots > 1, slow=True)

    @torch.inference_mode()
    def _select(self, plan: StepPlan) -> None:
        """Write the plan's order of slots and its paused slots where steps, captured ones too, read them."""
        order = plan.order or self._selected[0]
        if self._selected != (order, plan.paused):  # consecutive plans mostly have the same, and need no copies
            self._selected = order, plan.paused
            send(self._order[: len(order)], list(order))
            send(self._paused, [slot in plan.paused for slot in range(self.slots)])

    # ------------------------------------------------------------------------------------------------ on the device

    @torch.inference_mode()
    def run(self, shapes: Sequence[Forward], *, pausing: bool, slow: bool) -> None:
        """Queue one step. ``pausing``: some slots may be paused. ``slow=False``: no sequence is in its slow stage."""
        ops, state = self.model.ops, self.state
        with launching(self.model.device.type):
            if pausing:  # paused sequences count as done for the length of this step
                done = state.done.clone()
                state.done.masked_fill_(self._paused, 1)
            if shapes[0].positions is Positions.LIST:
                self._fill_lists(shapes[0])
            else:
                ops.mark_candidates(state, **self._stages)
            if self.policy.look_ahead:
                state.choice_score.fill_(float("-inf"))  # for positions in no list
            raised = None if self._end_of_think is None else end_of_think(state, self._end_of_think)
            offset = 0
            for shape in shapes:
                whole = shape.canvases == self.slots
                self._forward(shape, None if whole else self._order[offset : offset + shape.canvases], raised)
                offset += shape.canvases
            self._decide_on(state, slow)
            if pausing:
                torch.where(self._paused, done, state.done, out=state.done)
            self.ring.publish()

    def _decide_on(self, state: DecodeState, slow: bool) -> None:
        """Commit positions, after the sampler's own narrowing of candidates. A trace has candidates and scores as they
        were before."""
        if self._narrowing is None:
            return self._decide(state, self._rules, slow=slow)
        candidates, scores = state.candidate.clone(), None if state.events is None else state.score.clone()
        self._narrowing.narrow(state, self.earlier)
        if self._rules.opening == "first":  # a block's first forward commits one position, which the machine knows
            torch.where((state.stage_step == 0)[:, None], candidates, state.candidate, out=state.candidate)
        self._decide(state, self._rules, slow=slow)
        if state.events is not None:
            state.events["candidate"].copy_(candidates)
            state.events["score"].copy_(scores)

    def _list(self, which: int, size: int) -> torch.Tensor:
        """Return a list of ``size`` positions per slot, ``[B, size]``, always at the same address."""
        return self._lists[which, : self.slots * size].view(self.slots, size)

    def _fill_lists(self, shape: Forward) -> None:
        ops, state, policy = self.model.ops, self.state, self.policy
        positions, target = self._list(0, shape.size), self._list(1, shape.size)
        how = {"look_ahead": policy.look_ahead, "shift": self._shift, "stale": policy.rotate}
        ops.list_positions(state, positions, target, self._count, **self._stages, **how)
        state.listed.copy_(self._count)

    def _forward(self, shape: Forward, batch: torch.Tensor | None, raised: Raised | None) -> None:
        """Forward the shape's positions of the slots ``batch`` (None: of all); write the tokens and scores of the
        candidates among them to the state."""
        state, ops = self.state, self.model.ops
        scope = self._scope(shape, batch)
        select, target = self._targets(shape, scope, batch)
        tokens = _of(state.tokens, batch)
        vectors = None if self._vectors is None else self._vectors.of(batch)
        # all rows of the scope are wanted where later steps compare with this one
        reads, before = None if self._draw.divergence else select, {}
        hidden = self.model.forward(tokens, scope, self.caches[0] if self.caches else None, reads, vectors)
        if self.sampler.cfg_scale:
            blank = tokens.masked_fill(_of(state.given, batch), state.mask_id)
            unconditional = self.model.forward(blank, scope, self.caches[1] if self.caches else None, reads)
            hidden = hidden + self.sampler.cfg_scale * (hidden - unconditional)
        if self._draw.divergence:
            runs = _of(state.done, batch) == 0
            hidden, before = self.earlier.replace_hidden(hidden, scope, select, batch, runs)
        which, keys = None, {}
        if shape.ragged:
            # canvases have different numbers of targets: only those in use go through the head
            which, keys["count"] = ops.compact((target >= 0).view(1, -1))
            which = keys["rows"] = which[0]
        if self._draw.noise or self._draw.nucleus or raised is not None:
            keys |= self._sampling_of(target, which, batch, raised)
        if self._draw.at_ends:
            keys["ends"] = self._ends
        if self._draw.credit is not None or self._draw.divergence:
            keys |= self.earlier.rows(state.candidate, target, batch, which) | before
        choice = self.model.choose(hidden.flatten(0, 1), self._draw, **keys)
        ops.scatter_choices(state, choice.token, choice.score, target, which=which, row=batch)
        if choice.entropy is not None:
            into = state.choice_entropy
            ops.scatter_choices(state, choice.token, choice.entropy, target, which=which, row=batch, scores=into)
        if self._draw.verify:
            self._verify(batch)

    def _verify(self, batch: torch.Tensor | None) -> None:
        """Note the probabilities of the tokens that the blocks of the slots ``batch`` have, each given all others."""
        state, tokens = self.state, _of(self.state.tokens, batch)
        position = _of(state.block_start, batch)[:, None] + state.position[: self.earlier.shadow]
        position = torch.where(position < _of(state.block_end, batch)[:, None], position, -1)
        masks = torch.full_like(position, state.mask_id)
        where = {"batch": batch, "counters": self._counters}
        hidden = self.model.forward_shadow(masks, position, _of(state.limit, batch), self.caches[0], **where)
        decided = tokens.gather(1, position.clamp(min=0))
        loss = self.model.cross_entropy(hidden.flatten(0, 1), decided.flatten())
        self.earlier.put_probability(position, batch, (-loss).exp())

    def _scope(self, shape: Forward, batch: torch.Tensor | None) -> Scope:
        """Return the scope to forward, with its lists and ranges written to fixed buffers."""
        state, policy, position_ranges = self.state, self.policy, self.model.ops.position_ranges
        given = {"batch": batch, "counters": self._counters, "features": shape.features}
        if shape.features is not None:
            given["prompt"] = _of(state.start, batch)
        elif self.caches:
            given["store"] = True
            # a whole-canvas step refreshes every cached position; ``list_positions`` notes the same of listed ones
            if shape.positions in (Positions.RANGE, Positions.PREFIX):
                here = (state.done == 0)[:, None]
                state.dirty.masked_fill_(here, False)
                torch.where(here, state.step[:, None], state.forwarded, out=state.forwarded)
        if shape.positions is Positions.RANGE:
            return Scope(shape.first, shape.first + shape.size, shape.keys, **given)
        rows = None if shape.positions is Positions.PREFIX else self._list(0, shape.size)
        if shape.positions is not Positions.LIST:
            how = {"to_span_end": policy.to_span_end, "block": policy.block}
            position_ranges(state, rows, self._count, self._key_range, **how)
        elif shape.ragged:
            # only key ranges are missing: ``list_positions`` has written the list and its count, which must not change
            position_ranges(state, None, self._unused, self._key_range, to_span_end=False, block=None)
        given |= {"rows": None if rows is None else _of(rows, batch), "count": _of(self._count, batch)}
        if shape.ragged:
            given["key_range"] = _of(self._key_range, batch)
        return Scope(0, shape.size, shape.keys, **given)

    def _targets(self, shape: Forward, scope: Scope, batch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices into the scope to select, int64 ``[b, T]``, and the positions they decide, int32, -1 idle."""
        compact = self.model.ops.compact
        if shape.positions is Positions.LIST:
            target = _of(self._list(1, shape.size), batch)
            slot, _ = compact(target >= 0, capacity=shape.targets)
            select = slot.clamp(min=0).long()
            return select, torch.where(slot < 0, -1, target.gather(1, select))
        target, _ = compact(_of(self.state.candidate, batch), capacity=shape.targets)
        first = scope.first + self._shift if scope.rows is None else scope.rows[:, :1] + self._shift
        return (target - first).clamp(min=0).long(), target

    def _sampling_of(
        self, target: torch.Tensor, which: torch.Tensor | None, batch: torch.Tensor | None, raised: Raised | None
    ) -> dict[str, torch.Tensor]:
        """Return sampling parameters per row of the head, ``[R]``: temperature and noise keys, ``top_p``, and the
        logit that is raised."""
        state, draw = self.state, self._draw
        names = ("temperature", "seed", "step") * draw.noise + ("top_p",) * draw.nucleus
        numbers = {name: _of(getattr(state, name), batch)[:, None].expand_as(target) for name in names}
        if draw.noise:
            numbers["position"] = target.clamp(min=0).long()
        if raised is not None:
            position, token, amount = (_of(each, batch)[:, None] for each in raised)
            numbers["raised"] = token.expand_as(target)
            numbers["raise_by"] = torch.where(target == position, amount, 0.0)
        at = slice(None) if which is None else which.clamp(min=0)
        return {name: value.flatten()[at].contiguous() for name, value in numbers.items()}


def _store_of(key: BatchKey) -> type | None:
    """Return the store that steps need: the cache policy's; to verify decided tokens, at least keys and values."""
    return KVCache if key.cache.store is None and key.sampler.draw().verify else key.cache.store


def _of(x: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of ``x`` at ``batch``, or all of ``x`` if that is None."""
    return x if batch is None else x[batch]
