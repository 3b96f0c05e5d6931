"""Continuous batching: assigns slots to sequences, and picks those that step next.

Sequences wait in order of arrival. Each needs a slot in a persistent batch (:class:`~sfs_triton.scheduling.lane.Lane`)
of its batch key with capacity for it; batches are opened within limits of number and memory. A call of
:meth:`Scheduler.step` runs one round of one batch, in rotation.

No sequence starves. Of sequences that fit the same batch, the oldest gets the next slot. A sequence that needs a new
batch while none can be opened selects the batch with the fewest sequences; that one admits no others, finishes those it
holds and is closed. Later sequences that need no new batch continue meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import OutOfDeviceMemory
from ..models import Transformer
from ..runner import LoopChoice
from .lane import Lane, is_lack_of_memory
from .request import Kind
from .sequence import Row

logger = logging.getLogger("sfs_triton")

SPARE = 1  # idle batches kept, with their caches, for the next generation of the same batch key
_SHORTEST = 256  # least canvas length of a batch that admits sequences of any length


class Room(NamedTuple):
    """Batch capacity: canvases of up to ``length`` positions, and bounds of prompt lengths and masks in them."""

    length: int
    prompts: tuple[int, int]  # shortest and longest
    masks: int
    response: int

    def holds(self, row: Row) -> bool:
        shortest, longest = self.prompts
        fine = len(row.canvas) <= self.length and shortest <= row.start <= longest
        return fine and row.masks <= self.masks and row.response_length <= self.response


def room_for(rows: Sequence[Row]) -> Room:
    """Return the exact capacity for these sequences."""
    prompts = [row.start for row in rows]
    return Room(
        length=max(len(row.canvas) for row in rows),
        prompts=(min(prompts), max(prompts)),
        masks=max(row.masks for row in rows),
        response=max(row.response_length for row in rows),
    )


def room_around(row: Row, most: int) -> Room:
    """Return capacity for this sequence and similar ones: the next power of two, at most ``most`` positions.
    Prompts are kept apart, by powers of two as well, only where a policy's steps depend on them."""
    length = min(max(_SHORTEST, 1 << (len(row.canvas) - 1).bit_length()), most)
    shortest = 1 << (row.start.bit_length() - 1) if row.kind.policy.by_prompt and row.start else 0
    return Room(length, (shortest, length), length, length)


def smallest_room(most: int) -> Room:
    """Return the smallest capacity that :func:`room_around` gives."""
    length = min(_SHORTEST, most)
    return Room(length, (0, length), length, length)


class Lanes:
    """Pool of persistent batches of a model; keeps idle ones for the next use of their batch key. Thread-safe."""

    def __init__(self, model: Transformer, loops: LoopChoice):
        self._model, self._loops = model, loops
        self.spare: list[Lane] = []  # newest last
        self._lock = threading.Lock()

    def take(self, kind: Kind, slots: int, room: Room) -> Lane:
        """Return a persistent batch prepared for sequences within ``room``.

        Raises:
            OutOfDeviceMemory: its tensors do not fit.
        """
        length = self._loops.loop.canvas_length(room.length, self._model.spec.max_length)
        wanted = kind, slots, length, room.response
        with self._lock:
            lane = next((lane for lane in self.spare if lane.fits(*wanted)), None)
            if lane is not None:
                self.spare.remove(lane)
            else:
                self.spare.clear()  # frees memory for the new batch, which replaces them
        if lane is None:
            lane = Lane(self._model, *wanted, self._loops)
        lane.expect(room.prompts, [room.masks])
        return lane

    def give(self, lane: Lane) -> None:
        """Return a batch to the pool, in any state."""
        lane.close()
        if lane.sound:
            with self._lock:
                self.spare = [*self.spare, lane][-SPARE:]

    def bytes_needed(self, kind: Kind, slots: int, room: Room) -> int:
        return Lane.bytes_needed(self._model, kind, slots, room.length)


@dataclass(eq=False)
class _Open:
    lane: Lane
    room: Room
    bytes: int
    closing: bool = False  # admits no more sequences

    def takes(self, row: Row) -> bool:
        return not self.closing and self.lane.kind.serves(row.kind) and self.room.holds(row)


class Scheduler:
    """Decode sequences in persistent batches; sequences may be submitted and dropped between any two steps. Not
    thread-safe: all calls must come from the thread that steps it.

    Args:
        lanes: pool of persistent batches.
        room: function from a sequence to the capacity of the batch that is opened for it.
        slots: slots per batch, if memory allows.
        most: most batches open at a time.
        memory: bytes for the caches and canvases of all batches; None: all that is free.
        joined: called with each sequence that gets a slot.
    """

    def __init__(
        self,
        lanes: Lanes,
        room: Callable[[Row], Room],
        *,
        slots: int,
        most: int = 1,
        memory: int | None = None,
        joined: Callable[[Row], None] | None = None,
    ):
        self._lanes, self._room, self.slots, self._most, self._memory = lanes, room, slots, most, memory
        self._joined = joined or (lambda row: None)
        self._open: deque[_Open] = deque()  # in order of their next step
        self._waiting: deque[Row] = deque()
        self.fallen: list[Row] = []  # failed: evicted by the last exception; the caller may resubmit them

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return sum(len(each.lane.rows) for each in self._open)

    @property
    def lanes(self) -> int:
        return len(self._open)

    def submit(self, row: Row) -> None:
        """Queue a sequence."""
        self._waiting.append(row)

    def drop(self, row: Row) -> None:
        """End a sequence before its next step; see :meth:`Lane.drop <sfs_triton.scheduling.lane.Lane.drop>`."""
        if row in self._waiting:
            self._waiting.remove(row)
            row.dropped = row.over = True
        for each in self._open:
            if row in each.lane.rows:
                each.lane.drop(row)

    def step(self) -> list[Row]:
        """Admit waiting sequences and run one round of the next batch; return the sequences that took a step.

        A finished sequence is ``over``. The list is empty if the last sequences have just ended.

        Sequences of a batch that ran out of memory restart, in a batch with fewer slots; no step is reported twice.

        Raises:
            OutOfDeviceMemory: a sequence does not fit in a batch of one slot.
            Exception: any failure of a batch. In either case ``fallen`` holds the evicted sequences.
        """
        self._admit()
        for _ in range(len(self._open)):
            each = self._open[0]
            self._open.rotate(-1)
            if each.lane.rows:
                return self._advance(each)
        return []

    def _advance(self, each: _Open) -> list[Row]:
        lane, rows = each.lane, each.lane.rows
        try:
            return lane.advance()
        except BaseException as error:
            self._open.remove(each)
            full = is_lack_of_memory(error)
            if not full or lane.slots == 1 or lane.model.group.size > 1:
                self.fallen = [row for row in rows if not row.over]
                if full:
                    where = f"a canvas of {lane.length} positions with cache={lane.kind.policy.name!r}"
                    raise OutOfDeviceMemory(f"no memory for a step of {where}: {_first_line(error)}") from error
                raise
            lost = _first_line(error)
        self.slots = max(1, len(rows) // 2)
        logger.warning("lanes have at most %d slots from now on: no memory for a step: %s", self.slots, lost)
        for row in rows:
            row.over = row.over or row.dropped  # a dropped one counts as finished, from its last read state
        self._waiting.extendleft(reversed([row for row in rows if not row.over]))
        return []

    def close(self) -> None:
        """Stop all sequences and return the batches to the pool."""
        self._waiting.clear()
        while self._open:
            self._lanes.give(self._open.popleft().lane)

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        self._reap(lambda each: each.closing)
        stuck = False  # True: an older sequence waits for a new batch, and no later one may take that capacity
        for row in list(self._waiting):
            homes = [each for each in self._open if each.takes(row)]
            home = next((each for each in homes if each.lane.free), None)
            if not homes and not stuck:
                home = self._make_lane(row)
                stuck = home is None
            if home is not None:
                self._waiting.remove(row)
                home.lane.join(row)
                self._joined(row)
        if stuck and not any(each.closing for each in self._open):
            min(self._open, key=lambda each: len(each.lane.rows)).closing = True

    def _reap(self, which: Callable[[_Open], bool]) -> None:
        """Return empty batches to the pool."""
        for each in [each for each in self._open if which(each) and not each.lane.rows]:
            self._open.remove(each)
            self._lanes.give(each.lane)

    def _make_lane(self, row: Row) -> _Open | None:
        """Open a batch for this and similar sequences, with as many slots as memory allows; None if not even one."""
        room, slots = self._room(row), self.slots
        if len(self._open) >= self._most or not self._affords(row.kind, slots, room):
            self._reap(lambda each: True)
        if len(self._open) >= self._most:
            return None
        try:
            lane, slots = self._take(row.kind, slots, room)
        except OutOfDeviceMemory:
            if self._open:
                return None
            self._give_up(row)
            raise
        except BaseException:
            self._give_up(row)
            raise
        opened = _Open(lane, room, self._lanes.bytes_needed(row.kind, slots, room))
        self._open.appendleft(opened)
        return opened

    def _give_up(self, row: Row) -> None:
        self._waiting.remove(row)
        self.fallen = [row]

    def _take(self, kind: Kind, slots: int, room: Room) -> tuple[Lane, int]:
        """Take a batch with ``slots`` slots, or half, a quarter...; return it with its number of slots."""
        while True:
            try:
                if not self._affords(kind, slots, room):
                    needed = self._lanes.bytes_needed(kind, slots, room) / 2**20
                    taken = sum(each.bytes for each in self._open) / 2**20
                    raise OutOfDeviceMemory(
                        f"{slots} canvases of {room.length} positions with cache={kind.policy.name!r} need "
                        f"{needed:.1f} MiB; caches may take {self._memory / 2**20:.1f} MiB, and others have {taken:.1f}"
                    )
                return self._lanes.take(kind, slots, room), slots
            except OutOfDeviceMemory as error:
                if slots == 1:
                    raise
                slots //= 2
                logger.info("a lane gets %d slots: %s", slots, error)

    def _affords(self, kind: Kind, slots: int, room: Room) -> bool:
        taken = sum(each.bytes for each in self._open)
        return self._memory is None or taken + self._lanes.bytes_needed(kind, slots, room) <= self._memory


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
