"""Findings: what an execution did that a correct kernel never does."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {  # in the order of machine.h
    "race, write and write": "two threads write a place, nothing orders them",
    "race, write and read": "one thread reads what another wrote, nothing orders them",
    "race, read and write": "one thread writes what another read, nothing orders them",
    "out of bounds": "outside every tensor of the launch",
    "gap": "between the rows of a strided view",
    "misaligned": "an address that is no multiple of the access's size",
    "unwritten": "read of memory of torch.empty that nobody has written",
    "shared out of bounds": "outside the shared memory that was asked for",
    "shared unwritten": "shared memory read before it was written",
    "in flight": "shared memory touched while cp.async or wgmma is using it",
    "no proxy fence": "wgmma reads what ordinary stores wrote with no fence.proxy.async between",
    "not published": "a store that a release at system scope does not cover",
    "divergent": "a barrier or warp instruction that not all of its threads reach",
    "idle lane": "a shuffle reads a lane that takes no part",
    "trap": "a trap, or a copy of a part",
    "endless": "more instructions than the limit",
    "depends on the schedule": "a result's bytes differ between schedules",
}
PAIRS = {*(kind for kind in KINDS if kind.startswith("race")), "no proxy fence", "not published"}


@dataclass(frozen=True)
class Thread:
    """A place in the code, and who was there."""

    kernel: str
    line: int  # of the PTX
    text: str
    source: str  # lines of the Triton source, innermost first
    cta: int
    thread: int

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        return f"PTX line {self.line} `{text}` ({self.source or 'no source'}), CTA {self.cta}, thread {self.thread}"


@dataclass(frozen=True)
class Finding:
    kind: str
    kernel: str
    access: str  # "read", "write", "atomic" or nothing
    place: str  # tensor and element
    thread: Thread | None
    other: Thread | None
    schedule: int
    count: int

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.kind} ({KINDS[self.kind]}), {self.count} times in schedule {self.schedule}"]
        lines += [f"  {self.access} {self.place}".rstrip()] if self.place else []
        lines += [f"  {thread}" for thread in (self.thread, self.other) if thread]
        return "\n".join(lines)
