"""Continuous batching: assigns slots to sequences, and picks those that step next.

Sequences wait in order of arrival. Each needs a slot in a persistent batch of its batch key with capacity for it;
batches are opened within limits of number and memory. A call of :meth:`Scheduler.step` runs one round of one batch, in
rotation.

No sequence starves. Of sequences that fit the same batch, the oldest gets the next slot. A sequence that needs a new
batch while none can be opened selects the batch with the fewest sequences; that one admits no others, finishes those it
holds and is closed. Later sequences that need no new batch continue meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..decoding.caching import BatchBounds
from ..decoding.params import BatchKey
from ..errors import OutOfDeviceMemory, SfsError, first_line
from ..models import ModelSpec, Transformer
from ..runner import ExecutionChoice, ModelRunner
from ..runner.faults import is_lack_of_memory
from .persistent_batch import PersistentBatch
from .sequence import Sequence, Status

logger = logging.getLogger("sfs_triton")

_SHORTEST = 256  # least canvas length of a batch that admits sequences of any length


def bounds_of(sequences: Iterable[Sequence]) -> BatchBounds:
    """Return the exact bounds of these sequences."""
    sequences = list(sequences)
    prompts = [sequence.start for sequence in sequences]
    return BatchBounds(
        length=max(len(sequence.canvas) for sequence in sequences),
        shortest_prompt=min(prompts),
        longest_prompt=max(prompts),
        masks=max(sequence.masks for sequence in sequences),
        response=max(sequence.response_length for sequence in sequences),
    )


def bounds_around(sequence: Sequence, most: int) -> BatchBounds:
    """Return bounds for this sequence and similar ones: the next power of two, at most ``most`` positions.

    Where a policy's steps depend on the shortest prompt, that is bounded too, by a power of two."""
    apart = sequence.params.cache.by_prompt and sequence.start
    shortest = 1 << (sequence.start.bit_length() - 1) if apart else 0
    return least_bounds(most, len(sequence.canvas))._replace(shortest_prompt=shortest)


def least_bounds(most: int, length: int = 1) -> BatchBounds:
    """Return the smallest bounds that :func:`bounds_around` gives to a canvas of this length."""
    length = min(max(_SHORTEST, 1 << (length - 1).bit_length()), most)
    return BatchBounds(length, 0, length, length, length)


class BatchPool:
    """Pool of persistent batches of a model. Thread-safe.

    Idle batches are kept for the next use of their batch key, the longest unused of them until the bytes of all
    reach a limit: allocation takes time, and captures take more.

    Args:
        spare_bytes: the limit; None: an eighth of a GPU's memory, or 256 MiB. The newest is kept whatever it takes,
            unless another must be opened.
    """

    def __init__(self, choice: ExecutionChoice, spare_bytes: int | None = None):
        self._choice = choice
        self.spare: list[PersistentBatch] = []  # longest unused first
        # not held while anything is freed, which may run any code
        self._lock = threading.Lock()
        self._spare_bytes = _usual_spare(choice.model) if spare_bytes is None else spare_bytes

    def take(self, key: BatchKey, slots: int, bounds: BatchBounds) -> PersistentBatch:
        """Return a persistent batch prepared for sequences within ``bounds``.

        Raises:
            OutOfDeviceMemory: its tensors do not fit.
            DeviceFault: the device has failed.
        """
        model, execution = self._choice.now()
        length = execution.canvas_length(bounds.length, model.spec.max_length)
        padded = bounds._replace(length=length)
        with self._lock:
            batch = next((batch for batch in self.spare if batch.matches(key, slots, padded)), None)
            if batch is not None:
                self.spare.remove(batch)
        if batch is None:
            batch = self._open(model, key, slots, padded)
        batch.prepare(bounds)
        return batch

    def _open(self, model: Transformer, key: BatchKey, slots: int, bounds: BatchBounds) -> PersistentBatch:
        self._trim(max(0, self._spare_bytes - self.bytes_needed(key, slots, bounds)))
        try:
            return PersistentBatch(model, key, slots, bounds, self._choice)
        except OutOfDeviceMemory:
            if not self.clear():
                raise
        return PersistentBatch(model, key, slots, bounds, self._choice)

    def give(self, batch: PersistentBatch) -> None:
        """Return a batch to the pool, in any state."""
        batch.close()
        if batch.healthy:
            with self._lock:
                self.spare.append(batch)
            self._trim(self._spare_bytes, keep=1)

    def clear(self) -> bool:
        """Free all idle batches; return whether there were any."""
        return self._trim(-1)

    def _trim(self, most: int, keep: int = 0) -> bool:
        """Free idle batches that no one can use any more, and the longest unused ones while all take over ``most``
        bytes, except ``keep`` of them; return whether there were any."""
        with self._lock:
            before, left = self.spare, [batch for batch in self.spare if batch.is_current]
            while len(left) > keep and sum(batch.bytes for batch in left) > most:
                del left[0]  # still held by ``before``
            self.spare = left
        return len(left) < len(before)

    def bytes_needed(self, key: BatchKey, slots: int, bounds: BatchBounds) -> int:
        return ModelRunner.bytes_needed(self._choice.model, key, slots, bounds.length)


def _usual_spare(model: Transformer) -> int:
    if model.group.size > 1:
        return 0  # ranks allocate together, so all must keep the same
    device = model.device
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 256 << 20


@dataclass
class _Fewer:
    """Fewer slots for batches of a key and a length, since a step of them found no memory; doubled after a while."""

    slots: int
    failures: int
    batches: int  # to open before the double is tried

    def next(self) -> int:
        """Return the slots of the next batch."""
        if self.batches == 0:
            self.slots, self.batches = 2 * self.slots, 2**self.failures
        self.batches -= 1
        return self.slots


class Scheduler:
    """Decode sequences in persistent batches; sequences may be submitted and dropped between any two steps. Not
    thread-safe: all calls must come from the thread that steps it.

    Args:
        batches: pool of persistent batches.
        bounds: function from a sequence to the bounds of the batch that is opened for it.
        slots: slots per batch, if memory allows.
        most: most batches open at a time.
        memory: bytes for the caches and canvases of all batches; None: all that is free.
        joined: called with each sequence that gets a slot.
    """

    def __init__(
        self,
        batches: BatchPool,
        bounds: Callable[[Sequence], BatchBounds],
        *,
        slots: int,
        most: int = 1,
        memory: int | None = None,
        joined: Callable[[Sequence], None] | None = None,
    ):
        self._pool, self._bounds, self.slots, self._most, self._memory = batches, bounds, slots, most, memory
        self._joined = joined or (lambda sequence: None)
        self._open: deque[PersistentBatch] = deque()  # in order of their next step
        self._closing: set[PersistentBatch] = set()  # admit no more sequences
        self._waiting: deque[Sequence] = deque()
        self._fewer: dict[tuple[BatchKey, int], _Fewer] = {}  # by batch key and canvas length
        self.failed: list[Sequence] = []  # evicted by the last exception; the caller may resubmit them

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return sum(len(batch.sequences) for batch in self._open)

    @property
    def batches(self) -> int:
        """Open batches."""
        return len(self._open)

    def capture(self, key: BatchKey, bounds: BatchBounds) -> None:
        """Capture all graphs for sequences of a batch key within bounds, in an idle batch that they will get.

        Raises:
            OutOfDeviceMemory: there is no memory for them.
        """
        batch = self._take(key, self.slots, bounds)
        try:
            batch.capture_all()
        finally:
            self._pool.give(batch)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.status = Status.WAITING
        self._waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """End a sequence before its next step; the others are not affected. One that has ended stays as it is.

        A step that is already queued still runs: what it commits is in the result, but is not reported.
        """
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            sequence.status = Status.FINISHED
        elif sequence.status is Status.RUNNING:
            (batch,) = (batch for batch in self._open if sequence in batch.sequences)
            batch.drop(sequence)
            sequence.status = Status.DROPPED
        elif sequence.status is Status.GROWING:
            sequence.status = Status.ENDING

    def step(self) -> list[Sequence]:
        """Admit waiting sequences and run one round of the next batch; return the sequences that took a step.

        The list is empty if the last sequences have just ended. Sequences of a batch that ran out of memory restart, in
        a batch with fewer slots; no step is reported twice.

        Raises:
            OutOfDeviceMemory: a sequence does not fit in a batch of one slot.
            Exception: any failure of a batch. In either case ``failed`` holds the evicted sequences.
        """
        self.failed = []
        self._admit()
        for _ in range(len(self._open)):
            batch = self._open[0]
            self._open.rotate(-1)
            if batch.sequences:
                return self._advance(batch)
        return []

    def _advance(self, batch: PersistentBatch) -> list[Sequence]:
        held = batch.sequences
        steps = [sequence.steps for sequence in held]
        try:
            stepped, released = batch.advance()
        except BaseException as error:
            self._open.remove(batch)
            self._closing.discard(batch)
            restarts = is_lack_of_memory(error) and batch.model.group.size == 1
            freed = restarts and self._pool.clear()
            if not restarts or batch.slots == 1 and not freed:
                self._fail(batch, held, error)
            if not freed:
                self._take_fewer(batch, len(held) // 2, error)
            self._restart(held)
            # some may have taken their step before another plan of the round failed; it is not reported again
            return [sequence for sequence, before in zip(held, steps, strict=True) if sequence.steps > before]
        for sequence in stepped:
            if sequence.progress.done and sequence.status is Status.RUNNING:
                sequence.status = Status.GROWING if sequence.may_grow(batch.model.spec) else Status.ENDING
        self._release(released, batch.model.spec)
        return stepped

    def _release(self, released: list[Sequence], spec: ModelSpec) -> None:
        """Finish sequences whose final state has been read; queue those that grow again, before all others."""
        for sequence in reversed(released):
            if sequence.status is Status.GROWING and sequence.may_grow(spec):
                self._waiting.appendleft(sequence)
            else:
                sequence.status = Status.FINISHED

    def _fail(self, batch: PersistentBatch, held: list[Sequence], error: BaseException) -> None:
        """Evict the sequences of a failed batch, and raise its error."""
        self._evict([sequence for sequence in held if not sequence.finished])
        if is_lack_of_memory(error) and not isinstance(error, SfsError):
            canvas = f"a canvas of {batch.length} positions with cache={batch.key.cache.name!r}"
            raise OutOfDeviceMemory(f"no memory for a step of {canvas}: {first_line(error)}") from error
        raise error

    def _evict(self, sequences: list[Sequence]) -> None:
        self.failed = sequences
        for sequence in sequences:
            sequence.status = Status.FAILED

    def _take_fewer(self, batch: PersistentBatch, slots: int, error: BaseException) -> None:
        """Have fewer slots for a while in batches of this key and length, a step of which found no memory."""
        key = batch.key, batch.bounds.length
        failures = self._fewer[key].failures + 1 if key in self._fewer else 1
        self._fewer[key] = fewer = _Fewer(max(1, slots), failures, 2**failures)
        kind = f"{batch.length} positions with cache={batch.key.cache.name!r}"
        reason = f"no memory for a step: {first_line(error)}"
        logger.warning("batches of %s have at most %d slots for now: %s", kind, fewer.slots, reason)

    def _restart(self, held: list[Sequence]) -> None:
        """Queue the sequences of a batch that ran out of memory again, before all others."""
        for sequence in reversed(held):
            if sequence.status is Status.DROPPED:
                sequence.status = Status.FINISHED  # with the state that was last read
            elif not sequence.finished:
                sequence.status = Status.WAITING
                self._waiting.appendleft(sequence)

    def close(self) -> None:
        """Stop all sequences and return all batches to the pool, even if one of them raises."""
        self._closing.clear()
        self._stop(self._waiting)
        self._waiting.clear()
        with ExitStack() as batches:
            while self._open:
                batch = self._open.popleft()
                self._stop(batch.sequences)
                batches.callback(self._pool.give, batch)

    def _stop(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if not sequence.finished:
                sequence.status = Status.DROPPED

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        self._reap(lambda batch: batch in self._closing)
        for sequence in self._waiting:
            if sequence.status is Status.GROWING:  # not before: the last step's canvas may be shown in between
                sequence.extend()
                sequence.status = Status.WAITING
        stuck = False  # True: an older sequence waits for a new batch, and no later one may take that capacity
        for sequence in list(self._waiting):
            homes = [batch for batch in self._open if self._takes(batch, sequence)]
            home = next((batch for batch in homes if batch.free), None)
            if not homes and not stuck:
                home = self._open_batch(sequence)
                stuck = home is None
            if home is not None:
                self._waiting.remove(sequence)
                self._join(home, sequence)
        if stuck and not self._closing:
            self._closing.add(min(self._open, key=lambda batch: len(batch.sequences)))

    def _join(self, batch: PersistentBatch, sequence: Sequence) -> None:
        try:
            has_steps = batch.join(sequence)
        except BaseException:
            self._evict([sequence])
            raise
        sequence.status = Status.RUNNING if has_steps else Status.ENDING
        self._joined(sequence)

    def _takes(self, batch: PersistentBatch, sequence: Sequence) -> bool:
        """Return whether a batch has capacity for a sequence, now or when a slot is free."""
        bounds = batch.bounds
        fits = len(sequence.canvas) <= bounds.length and sequence.masks <= bounds.masks
        fits &= bounds.shortest_prompt <= sequence.start <= bounds.longest_prompt
        fits &= sequence.response_length <= bounds.response
        return batch not in self._closing and batch.key.serves(sequence.batch_key) and fits

    def _reap(self, which: Callable[[PersistentBatch], bool]) -> None:
        """Return empty batches to the pool."""
        for batch in [batch for batch in self._open if which(batch) and not batch.sequences]:
            self._open.remove(batch)
            self._closing.discard(batch)
            self._pool.give(batch)

    def _open_batch(self, sequence: Sequence) -> PersistentBatch | None:
        """Open a batch for this and similar sequences, with as many slots as memory allows; None if not even one."""
        key, bounds = sequence.batch_key, self._bounds(sequence)
        if len(self._open) >= self._most or not self._affords(key, self.slots, bounds):
            self._reap(lambda batch: True)
        if len(self._open) >= self._most:
            return None
        fewer = self._fewer.get((key, bounds.length))
        slots = self.slots if fewer is None else min(self.slots, fewer.next())
        try:
            batch = self._take(key, slots, bounds)
        except BaseException as error:
            if isinstance(error, OutOfDeviceMemory) and self._open:
                return None
            self._waiting.remove(sequence)
            self._evict([sequence])
            raise
        self._open.appendleft(batch)
        return batch

    def _take(self, key: BatchKey, slots: int, bounds: BatchBounds) -> PersistentBatch:
        """Take a batch with ``slots`` slots, or half, a quarter... of them."""
        while True:
            try:
                if not self._affords(key, slots, bounds):
                    needed, taken = self._pool.bytes_needed(key, slots, bounds) / 2**20, self._taken() / 2**20
                    raise OutOfDeviceMemory(
                        f"{slots} canvases of {bounds.length} positions with cache={key.cache.name!r} need "
                        f"{needed:.1f} MiB; caches may take {self._memory / 2**20:.1f} MiB, and others have {taken:.1f}"
                    )
                return self._pool.take(key, slots, bounds)
            except OutOfDeviceMemory as error:
                if slots == 1:
                    raise
                slots //= 2
                logger.info("a batch gets %d slots: %s", slots, error)

    def _affords(self, key: BatchKey, slots: int, bounds: BatchBounds) -> bool:
        return self._memory is None or self._taken() + self._pool.bytes_needed(key, slots, bounds) <= self._memory

    def _taken(self) -> int:
        """Return the bytes of the open batches."""
        return sum(self._pool.bytes_needed(batch.key, batch.slots, batch.bounds) for batch in self._open)
