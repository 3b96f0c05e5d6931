"""One kernel as arrays for execute.cpp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from .encode import NO_OPERAND, NUMBERS, Encoder, Instruction, Operand, unpacked
from .parse import Function, Statement, Unsupported, parse
from .registers import allocate

ROW = numpy.dtype(
    [("op", "i4"), ("guard", "i4"), ("o", "i4", 16), ("imm", "i8"), ("a", "i4"), ("b", "i4"), ("c", "i4"), ("d", "i4")]
)


@dataclass
class Program:
    function: Function
    statements: list[Statement]  # one per instruction
    code: numpy.ndarray
    constants: numpy.ndarray
    extra: numpy.ndarray
    register_bytes: int
    least_shared: int
    least_global: int


def assemble(ptx: str) -> Program:
    """Raises Unsupported, with line and text, for an instruction that the executor does not know."""
    function = parse(ptx)
    encoder = Encoder(function)
    statements: list[Statement] = []
    starts: list[int] = []
    for statement in function.statements:
        starts.append(len(statements))
        statements += unpacked(statement)
    starts.append(len(statements))
    function.labels = {name: starts[index] for name, index in function.labels.items()}
    code: list[Instruction] = []
    for statement in statements:
        try:
            code.append(encoder.encode(statement))
        except Unsupported as error:
            message = (
                f"kernel {function.name}, PTX line {statement.line}: {statement.text!r} is not supported ({error})"
            )
            raise Unsupported(message) from error
    code.append(Instruction("exit"))
    places, register_bytes = allocate(code, function.registers)
    rows: list[tuple] = []
    extra: list[int] = []

    def place(operand: Operand | int) -> int:
        if isinstance(operand, int):
            return operand
        return operand.place if operand.register is None else places[operand.register]

    for each in code:
        operands = [NO_OPERAND] * 16
        for index, operand in each.operands.items():
            operands[index] = place(operand)
        imm = len(extra) if each.extra else each.imm
        extra += map(place, each.extra)
        rows.append((NUMBERS[each.op], each.guard, operands, imm, each.a, each.b, each.c, each.d))
    constants, extra = numpy.array(encoder.constants, numpy.uint64), numpy.array(extra, numpy.int32)
    end = Statement("(end)", None, "exit", [], 0, "", {})
    return Program(
        function,
        [*statements, end],
        numpy.array(rows, ROW),
        constants,
        extra,
        register_bytes,
        encoder.least_shared,
        encoder.least_global,
    )
