"""Step planner: chooses the slots and the shapes of every step, from what the host knows. No tensors."""

from __future__ import annotations

from collections.abc import Sequence

from ..decoding.caching import BatchBounds, CachePolicy
from ..decoding.samplers import Sampler
from ..decoding.step_plan import Forward, Positions, StepOutput, StepPlan
from ..kernels.control import FAST, Progress

_Parts = tuple[dict[int, int], tuple[Forward, ...], tuple[int, ...]]  # steps, forwards, order


class StepPlanner:
    """Plan the steps of a persistent batch.

    Steps come in rounds: in each, every running sequence takes one step. Sequences of one round may need several
    plans, because a plan has one shape for all of its sequences, or because their exact shapes do not go together.

    Args:
        bounds: bounds of the sequences, with ``length`` the batch's canvas length.
        exact: plan exact shapes, which need the output of the previous step. Otherwise shapes are padded.
        target_multiple: round the targets of exact shapes up to multiples of this, where the forward has as many
            positions. Fewer different shapes suit a GPU: its libraries choose a kernel and memory per shape.
    """

    def __init__(
        self,
        sampler: Sampler,
        policy: CachePolicy,
        slots: int,
        bounds: BatchBounds,
        exact: bool,
        target_multiple: int = 1,
    ):
        self._target_multiple = target_multiple
        self.sampler, self.policy, self.slots, self.bounds, self.exact = sampler, policy, slots, bounds, exact
        self.progress: list[Progress | None] = [None] * slots  # as last read; None: no sequence
        self._first = [0] * slots  # number of the first plan that can hold the slot's sequence
        self._number = 0  # of the last plan
        self._due: list[dict[int, int]] = []  # rest of the round: {slot: step} of each plan to come

    def join(self, slot: int, progress: Progress) -> None:
        """Add a sequence; the next round includes it."""
        self.progress[slot], self._first[slot] = progress, self._number + 1

    def leave(self, slot: int) -> None:
        """Remove a sequence; outputs of plans that hold it are ignored from now on."""
        self.progress[slot] = None

    def next(self, assuming: Sequence[StepPlan] = ()) -> StepPlan | None:
        """Return the next plan, or None: nothing runs, or the outputs of ``assuming`` must be read first.

        ``assuming``: plans whose outputs have not been read. Sequences in them are assumed to go on.
        """
        running = self._running(assuming)
        due, left = list(self._due), {}
        while due and not left:  # sequences may have ended, or slots been reused, since the round was planned
            left = {slot: step for slot, step in due.pop(0).items() if running.get(slot) == step}
        if not left:
            due = self._round(running)
            if not due:
                return None
            left = due.pop(0)
        if assuming and not self._can_run_ahead(left):
            return None
        steps, forwards, order = self._exact(left) if self.exact else self._padded(left, running)
        rest = {slot: step for slot, step in left.items() if slot not in steps}
        self._due = [rest, *due] if rest else due
        self._number += 1
        return StepPlan(
            number=self._number,
            steps=steps,
            forwards=forwards,
            order=order,
            paused=frozenset(running) - frozenset(steps),
            padded=not self.exact,
            slow=not self.exact or any(self.progress[slot].stage != FAST for slot in steps),
            completes_round=not self._due,
        )

    def update(self, output: StepOutput) -> dict[int, Progress]:
        """Take over the progress of a plan's sequences.

        Returns the progress before the step of each sequence that took it: empty if all had ended before.
        """
        before = {}
        for slot, progress in output.progress.items():
            known = self.progress[slot]
            if known is not None and not known.done and self._first[slot] <= output.number:
                before[slot], self.progress[slot] = known, progress
        return before

    def shapes(self) -> list[Forward]:
        """Return the forward of every padded plan: each shape for one, two, four... canvases, and for all of them."""
        sizes = [*(1 << power for power in range((self.slots - 1).bit_length())), self.slots]
        shapes = self.policy.shapes(self.bounds, self.sampler)
        return [shape._replace(canvases=size) for size in sizes for shape in shapes]

    def _running(self, assuming: Sequence[StepPlan]) -> dict[int, int]:
        """Return the running sequences' slots with the number of the step that each takes next."""
        return {
            slot: at.step + sum(slot in plan.steps and plan.number >= self._first[slot] for plan in assuming)
            for slot, at in enumerate(self.progress)
            if at is not None and not at.done
        }

    def _round(self, running: dict[int, int]) -> list[dict[int, int]]:
        """Divide the running sequences into plans: those that go together, or those of the same padded shape."""
        if self.exact:
            groups = self.policy.together({slot: self.progress[slot] for slot in running})
        else:
            by_shape: dict[Forward, list[int]] = {}
            for slot, step in running.items():
                by_shape.setdefault(self._shape(slot, step), []).append(slot)
            groups = list(by_shape.values())
        return [{slot: running[slot] for slot in group} for group in groups if group]

    def _shape(self, slot: int, step: int) -> Forward:
        return self.policy.padded(self.bounds, self.sampler, step, self.progress[slot].stage_step == 0)

    def _can_run_ahead(self, group: dict[int, int]) -> bool:
        """Return whether a step can be queued behind one whose output is unknown.

        Its shape must follow from the step number. It must also be short: if the sequences have ended, the step is
        superfluous, and takes its time all the same.
        """
        return self.policy.static_schedule and all(self.policy.lists(step) for step in group.values())

    def _exact(self, group: dict[int, int]) -> _Parts:
        """Return steps, forwards and order of a plan of exact shapes for this group."""
        parts = self.policy.exact({slot: self.progress[slot] for slot in group}, self.sampler)
        forwards = tuple(self._rounded(shape) for shape, _ in parts)
        whole = [shape.canvases for shape in forwards] == [self.slots]
        return group, forwards, () if whole else tuple(slot for _, slots in parts for slot in slots)

    def _rounded(self, shape: Forward) -> Forward:
        rounded = -(-shape.targets // self._target_multiple) * self._target_multiple
        return shape._replace(targets=max(shape.targets, min(rounded, shape.size)))

    def _padded(self, group: dict[int, int], running: dict[int, int]) -> _Parts:
        """Return steps, forward and order of a padded plan for this group, or for as much of it as one plan can hold.

        Graphs are captured for powers of two and for all slots. So a group is padded up to a captured size with slots
        that the step does not change; where too few of these are left, the plan takes a part of the group.
        """
        slot, step = next(iter(group.items()))
        shape = self._shape(slot, step)
        # a paused sequence has an empty list, so a step over lists leaves its cache alone; a step over whole canvases
        # writes the cache of every canvas it forwards, so that no running sequence can be padding there
        taken = running if shape.positions is Positions.PREFIX else group
        spare = [slot for slot in range(self.slots) if slot not in taken]
        size = min(1 << (len(group) - 1).bit_length(), self.slots)
        if size > len(group) + len(spare):
            size = 1 << (len(group).bit_length() - 1)
        members = list(group)[:size]
        order = () if size == self.slots else tuple((members + spare)[:size])
        return {slot: group[slot] for slot in members}, (shape._replace(canvases=size),), order
