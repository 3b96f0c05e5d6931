"""Places of registers: those that are not alive together share one, so that a warp's registers stay in the cache."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from .encode import Instruction
from .parse import Register


def allocate(code: Sequence[Instruction], registers: Sequence[Register]) -> tuple[dict[int, int], int]:
    """Return the offset of each register, 32 lanes of it, and the bytes that all take."""
    ranges = _live_ranges(code)
    free: dict[int, list[int]] = {32: [], 64: []}
    places: dict[int, int] = {}
    alive: list[tuple[int, int]] = []
    size = 0
    for register in sorted(ranges, key=lambda register: ranges[register][0]):
        first, last = ranges[register]
        while alive and alive[0][0] < first:
            ended = heapq.heappop(alive)[1]
            free[registers[ended].slot_bits].append(places[ended])
        bits = registers[register].slot_bits
        if free[bits]:
            places[register] = free[bits].pop()
        else:
            places[register] = size
            size += bits * 4  # 32 lanes
        heapq.heappush(alive, (last, register))
    return places, size


def _live_ranges(code: Sequence[Instruction]) -> dict[int, tuple[int, int]]:
    ranges: dict[int, tuple[int, int]] = {}
    starts_anew: set[int] = set()  # first seen as the target of an instruction that all lanes execute
    for index, instruction in enumerate(code):
        for register, read in sorted(_registers_of(instruction), key=lambda used: not used[1]):
            if register not in ranges and not read and instruction.guard < 0:
                starts_anew.add(register)
            ranges[register] = ranges.get(register, (index, index))[0], index
    loops = [(each.a, index) for index, each in enumerate(code) if each.op == "bra" and each.a <= index]
    changed = True
    while changed:  # what is alive anywhere in a loop is so in all of it, unless each turn starts it anew
        changed = False
        for top, bottom in loops:
            for register, (first, last) in ranges.items():
                inside = first >= top and last <= bottom
                if last < top or first > bottom or (inside and register in starts_anew):
                    continue
                wide = min(first, top), max(last, bottom)
                if wide != (first, last):
                    ranges[register], changed = wide, True
    return ranges


def _registers_of(instruction: Instruction) -> Iterator[tuple[int, bool]]:
    """Registers, and for each use True where it is read."""
    for operand in [*instruction.operands.values(), *instruction.extra]:
        if isinstance(operand, int) or operand.register is None:
            continue
        if operand.read:
            yield operand.register, True
        if operand.written:
            yield operand.register, False
