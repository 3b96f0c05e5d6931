"""Continuous batching: assigns slots to sequences, and picks those that step next.

Rows wait in the order in which they came. Each needs a slot in a :class:`~sfs_triton.scheduling.lane.Lane` of its kind
that has room for it; lanes are opened as far as their number and their memory allow. A call of :meth:`Scheduler.step`
is a round of one lane, and lanes take turns.

No row starves. Of rows that the same lane has room for, the oldest gets the next slot. A row that needs a lane while
none can be opened picks the one with the fewest rows, which takes no others from then on, ends with those it has, and
makes room. What came later and needs no new lane goes on meanwhile.
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

SPARE = 1  # lanes kept for the next generation of their kind, with their caches
_SHORTEST = 256  # canvas of a lane that rows of any length may come to


class Room(NamedTuple):
    """The rows that a lane is made for: canvases of up to ``length`` positions, and bounds of what is in them."""

    length: int
    prompts: tuple[int, int]  # shortest and longest
    masks: int
    response: int

    def holds(self, row: Row) -> bool:
        shortest, longest = self.prompts
        fine = len(row.canvas) <= self.length and shortest <= row.start <= longest
        return fine and row.masks <= self.masks and row.response_length <= self.response


def room_for(rows: Sequence[Row]) -> Room:
    """Just what these rows need."""
    prompts = [row.start for row in rows]
    return Room(
        length=max(len(row.canvas) for row in rows),
        prompts=(min(prompts), max(prompts)),
        masks=max(row.masks for row in rows),
        response=max(row.response_length for row in rows),
    )


def room_around(row: Row, most: int) -> Room:
    """Return room for this row and others like it: canvases of the next power of two, at most ``most`` positions.
    Prompts are kept apart, by powers of two as well, only where a policy's steps depend on them."""
    length = min(max(_SHORTEST, 1 << (len(row.canvas) - 1).bit_length()), most)
    shortest = 1 << (row.start.bit_length() - 1) if row.kind.policy.by_prompt and row.start else 0
    return Room(length, (shortest, length), length, length)


def smallest_room(most: int) -> Room:
    """The least that :func:`room_around` makes a lane for."""
    length = min(_SHORTEST, most)
    return Room(length, (0, length), length, length)


class Lanes:
    """Makes lanes for a model, and keeps those that no one uses for the next of their kind. Safe between threads."""

    def __init__(self, model: Transformer, loops: LoopChoice):
        self._model, self._loops = model, loops
        self.spare: list[Lane] = []  # newest last
        self._lock = threading.Lock()

    def take(self, kind: Kind, slots: int, room: Room) -> Lane:
        """A lane that is ready for rows in ``room``.

        Raises:
            OutOfDeviceMemory: there is no room for its tensors.
        """
        length = self._loops.loop.canvas_length(room.length, self._model.spec.max_length)
        wanted = kind, slots, length, room.response
        with self._lock:
            lane = next((lane for lane in self.spare if lane.fits(*wanted)), None)
            if lane is not None:
                self.spare.remove(lane)
            else:
                self.spare.clear()  # which makes room for the new one, that takes their place in the end
        if lane is None:
            lane = Lane(self._model, *wanted, self._loops)
        lane.expect(room.prompts, [room.masks])
        return lane

    def give(self, lane: Lane) -> None:
        """Take a lane back, whatever it is at."""
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
    closing: bool = False  # takes no rows any more

    def takes(self, row: Row) -> bool:
        return not self.closing and self.lane.kind.serves(row.kind) and self.room.holds(row)


class Scheduler:
    """Decodes rows side by side, of which new ones may come and others go between any two steps. Not safe between
    threads: whoever steps it does everything else as well.

    Args:
        lanes: where lanes are from.
        room: what a lane is to have room for that is opened for a row.
        slots: rows that a lane has place for, if memory allows.
        most: lanes at a time.
        memory: bytes that the caches and canvases of all lanes may take; None: as many as there are.
        joined: called with a row that has just got a slot.
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
        self._open: deque[_Open] = deque()  # the next to step first
        self._waiting: deque[Row] = deque()
        self.fallen: list[Row] = []  # that were lost with the last failure; whoever catches it may submit them again

    @property
    def waiting(self) -> int:
        """Rows that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that have a slot."""
        return sum(len(each.lane.rows) for each in self._open)

    @property
    def lanes(self) -> int:
        return len(self._open)

    def submit(self, row: Row) -> None:
        """Queue a row."""
        self._waiting.append(row)

    def drop(self, row: Row) -> None:
        """End a row before its next step; see :meth:`Lane.drop <sfs_triton.scheduling.lane.Lane.drop>`."""
        if row in self._waiting:
            self._waiting.remove(row)
            row.dropped = row.over = True
        for each in self._open:
            if row in each.lane.rows:
                each.lane.drop(row)

    def step(self) -> list[Row]:
        """Give slots to rows that wait, and step every row of the next lane; the rows that took one.

        A row whose end is known is ``over``. Empty where the last rows have just ended.

        Rows of a lane that ran out of memory in a step begin again, fewer side by side; no step is told of twice.

        Raises:
            OutOfDeviceMemory: there is no memory for a row that has a lane to itself.
            Exception: whatever a lane fails with. In either case ``fallen`` has the rows that were lost.
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
            row.over = row.over or row.dropped  # as far as it was known
        self._waiting.extendleft(reversed([row for row in rows if not row.over]))
        return []

    def close(self) -> None:
        """Stop everything, and give the lanes back."""
        self._waiting.clear()
        while self._open:
            self._lanes.give(self._open.popleft().lane)

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        self._reap(lambda each: each.closing)
        stuck = False  # whether an older row waits for a lane, whose room none that came later may take
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
        """Give back lanes that are empty."""
        for each in [each for each in self._open if which(each) and not each.lane.rows]:
            self._open.remove(each)
            self._lanes.give(each.lane)

    def _make_lane(self, row: Row) -> _Open | None:
        """A lane for this row and those like it, with as many slots as there is memory for; None: not even one now."""
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
        """A lane with ``slots``, or with half, a quarter... of them, and how many it has."""
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
