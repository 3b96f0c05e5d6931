"""Statements of PTX as the instructions that execute.cpp knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .parse import BITS, Function, Statement, Unsupported, split_arguments

DEFINITIONS = (Path(__file__).parent / "operations.def").read_text()
HALVES = ("f16", "f16x2", "bf16", "bf16x2")
CONVERSIONS = "u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64 f16x2 bf16x2 e4m3x2 tf32".split()
COMPARISONS = "eq ne lt le gt ge equ neu ltu leu gtu geu nan num".split()
COMPARED = "u32 s32 u64 s64 u16 s16 f32 f64 f16 bf16".split()
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ATOMICS = "add min_s min_u max_s max_u and or xor exch cas add_f".split()
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIAL += ["%laneid", "%warpid", "%clock64", "%smid"]
PRODUCTS = "f16 bf16 tf32 s8 u8 e4m3 e5m2".split()
NO_EFFECT = ("createpolicy", "prefetch", "griddepcontrol", "nanosleep", "discard", "applypriority")
SILENT = {"rn", "approx", "full", "ftz"}  # modifiers of arithmetic that are not part of an operation's name
FALSE, TRUE = 0, 1  # predicates


@dataclass(frozen=True)
class Operand:
    register: int | None  # None: the constant at ``place``
    place: int = 0
    read: bool = False
    written: bool = False


@dataclass
class Instruction:
    op: str
    operands: dict[int, Operand | int] = field(default_factory=dict)  # int: a predicate
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    imm: int = 0
    extra: list[Operand] = field(default_factory=list)
    guard: int = -1


ARITY = {"U": 1, "B": 2, "T": 3, **{f"{kind}{n}": n for kind in "FH" for n in (1, 2, 3)}}


def _operations() -> tuple[list[str], dict[str, list[int]]]:
    """The names in operations.def, in order, and the bits of the operands of those on registers."""
    names, bits = [], {}
    for kind, rest in re.findall(r"^([UBTXFH]\d?)(\(.*)$", DEFINITIONS, re.MULTILINE):
        if kind == "X":
            names += re.findall(r"X?\((\w+)\)", rest)
            continue
        name, *types = rest[1:].split(", ")[: 2 + ARITY[kind]]
        for suffix in [f"_{half}" for half in HALVES] if kind[0] == "H" else [""]:
            names.append(name + suffix)
            operands = types[1:] if kind in "UBT" else ["float"] * ARITY[kind]
            bits[name + suffix] = [64 if each in ("u64", "s64", "double") else 32 for each in operands]
    return names, bits


def number(text: str) -> int | None:
    """Return the bits of a literal; None if ``text`` is none."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) else None


class Encoder:
    """Instructions of one function. ``constants`` are words of 64 bits, 32 lanes of each value."""

    def __init__(self, function: Function):
        self._function = function
        self.constants: list[int] = []
        self._places: dict[tuple[int, int], int] = {}
        self.least_shared = self.least_global = 16  # bytes of the smallest access

    def encode(self, statement: Statement) -> Instruction:
        """Raise Unsupported for what the executor does not know."""
        self._scope, self._arguments = statement.scope, statement.arguments
        words = statement.name.split(".")
        handler: Callable[[list[str]], Instruction] = getattr(self, f"_{words[0]}", self._arithmetic)
        try:
            instruction = handler(words)
            if statement.guard:
                guard = self._predicate(statement.guard.lstrip("!"))
                instruction.guard = 2 * guard + statement.guard.startswith("!")
        except (LookupError, ValueError, TypeError, StopIteration) as error:
            raise Unsupported(f"{type(error).__name__} {error}") from error
        return instruction

    # -- operands

    def _constant(self, value: int, bits: int) -> Operand:
        value &= (1 << bits) - 1
        wide = bits == 64
        if (value, wide) not in self._places:
            self._places[value, wide] = 8 * len(self.constants)
            self.constants += [value] * 32 if wide else [value | value << 32] * 16
        return Operand(None, ~self._places[value, wide])

    def _source(self, text: str, bits: int = 32) -> Operand:
        if register := self._scope.get(text):
            if register.slot_bits != max(bits, 32) or register.bits == 1:
                raise Unsupported(f"{text} has {register.bits} bits, not {bits}")
            return Operand(register.number, read=True)
        value = self._function.symbols.get(text, number(text))
        if text in self._function.parameters:
            value = self._function.parameters[text][0]  # its address
        if value is None:
            raise Unsupported(f"operand {text}")
        return self._constant(value, bits)

    def _target(self, text: str) -> Operand | int:
        if text == "_":
            return NO_OPERAND
        register = self._scope[text]
        if register.bits == 1:
            raise Unsupported(f"target {text}")
        return Operand(register.number, written=True)

    def _predicate(self, text: str) -> int:
        if register := self._scope.get(text):
            if register.bits != 1:
                raise Unsupported(f"predicate {text}")
            return register.number
        return TRUE if number(text) else FALSE

    def _bits_of(self, text: str) -> int:
        return self._scope[text].bits if text in self._scope else 0

    def _address(self, text: str, bits: int = 32) -> tuple[Operand, int]:
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        return self._source(base, bits), number(offset or "0")

    @staticmethod
    def _vector(text: str) -> list[str]:
        return split_arguments(text[1:-1]) if text.startswith("{") else [text]

    # -- arithmetic

    def _arithmetic(self, words: list[str]) -> Instruction:
        """An operation of operations.def, by the name that PTX gives it."""
        head, *modifiers, kind = words
        if head in NO_EFFECT:
            return Instruction("nop")
        if kind == "pred":
            return Instruction(f"{head}_pred", dict(enumerate(map(self._predicate, self._arguments))))
        stem = "_".join([head, *(word for word in modifiers if word not in SILENT)])
        names = [f"{stem}_{kind}", f"{stem}_b{BITS[kind]}", f"{stem}_u{BITS[kind]}"]
        name = next((name for name in names if name in OPERANDS), None)
        if name is None:
            raise Unsupported("instruction")
        bits = [16 if each == 32 and BITS[kind] == 16 else each for each in OPERANDS[name]]
        if len(self._arguments) != 1 + len(bits):
            raise Unsupported(f"{len(self._arguments)} operands")
        return self._simple(name, self._arguments, bits, a=int("ftz" in modifiers))

    def _simple(self, name: str, arguments: list[str], bits: list[int], **more: int) -> Instruction:
        sources = [self._source(text, each) for text, each in zip(arguments[1:], bits, strict=True)]
        return Instruction(name, {0: self._target(arguments[0]), **dict(enumerate(sources, 1))}, **more)

    def _lop3(self, words: list[str]) -> Instruction:
        *arguments, table = self._arguments
        return self._simple("lop3", arguments, [32] * 3, imm=number(table))

    def _mov(self, words: list[str]) -> Instruction:
        target, source = self._arguments
        if words[1] == "pred":
            return Instruction("mov_pred", {0: self._predicate(target), 1: self._predicate(source)})
        bits = BITS[words[1]]
        if source in SPECIAL:
            return Instruction("special", {0: self._target(target)}, a=SPECIAL.index(source), b=int(bits == 64))
        if source.startswith("{"):
            low, high = self._vector(source)
            return self._simple(f"pack_b{bits}", [target, low, high], [bits // 2] * 2)
        if target.startswith("{"):
            raise Unsupported("several targets")  # encode_all makes two statements of it
        return self._simple(f"mov_b{max(bits, 32)}", self._arguments, [bits])

    def _selp(self, words: list[str]) -> Instruction:
        bits = BITS[words[1]]
        *arguments, predicate = self._arguments
        instruction = self._simple(f"selp_b{max(bits, 32)}", arguments, [bits] * 2, a=int(predicate.startswith("!")))
        instruction.operands[3] = self._predicate(predicate.lstrip("!"))
        return instruction

    def _setp(self, words: list[str]) -> Instruction:
        comparison, *rest, kind = words[1:]
        kind = kind if kind in COMPARED else f"u{BITS[kind]}"
        logic = next((word for word in rest if word in ("and", "or", "xor")), None)
        sources = (self._source(text, BITS[kind]) for text in self._arguments[1:3])
        operands = {0: self._predicate(self._arguments[0]), **dict(enumerate(sources, 1))}
        negated = 0
        if logic:
            negated = int(self._arguments[3].startswith("!"))
            operands[3] = self._predicate(self._arguments[3].lstrip("!"))
        return Instruction(
            "setp",
            operands,
            a=COMPARISONS.index(UNSIGNED.get(comparison, comparison)),
            b=COMPARED.index(kind),
            c=["and", "or", "xor"].index(logic) + 1 if logic else 0,
            d=int("ftz" in rest),
            imm=negated,
        )

    def _cvt(self, words: list[str]) -> Instruction:
        *modifiers, to, from_ = words[1:]
        whole = {"rn": 0, "rna": 0, "rni": 1, "rzi": 2, "rmi": 3, "rpi": 4}
        exact = (
            to[0] in "us" or from_[0] in "us" or BITS[to] >= BITS[from_]
        )  # what has no rounding, whatever is asked for
        known = {*whole, "ftz", "sat", "satfinite", *(["rz", "rm", "rp"] if exact and to[0] not in "fb" else [])}
        if (
            set(modifiers) - known
            or ("sat" in modifiers and to[0] in "us")
            or ("satfinite" in modifiers and to != "tf32")
        ):
            raise Unsupported("conversion")
        target, *sources = self._arguments
        wide = BITS[from_] == 64 or self._bits_of(sources[0]) == 64
        flags = int("ftz" in modifiers) | 2 * ("sat" in modifiers)
        flags |= 4 * (self._bits_of(target) == 64) | 8 * wide | 16 * (self._bits_of(target) == 16)
        rounding = max((whole.get(word, 0) for word in modifiers), default=0)
        if to[0] in "us" and from_[0] not in "us" and not rounding:
            raise Unsupported("rounding")
        bits = [64 if wide else 32] * len(sources)
        a, b = CONVERSIONS.index(to), CONVERSIONS.index(from_)
        return self._simple("cvt", self._arguments, bits, a=a, b=b, c=rounding, d=flags)

    # -- memory

    def _ld(self, words: list[str]) -> Instruction:
        return self._access(words, *self._arguments, stores=False)

    def _st(self, words: list[str]) -> Instruction:
        address, data = self._arguments
        return self._access(words, data, address, stores=True)

    def _access(self, words: list[str], data: str, address: str, *, stores: bool) -> Instruction:
        words = [word.split("::")[0] for word in words]
        size, texts = BITS[words[-1]] // 8, self._vector(data)
        if len(texts) != next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1):
            raise Unsupported("vector")
        widths = {self._bits_of(text) for text in texts}
        wide = 64 in widths or (stores and size == 8)
        values = [self._source(text, 64 if wide else 8 * size) if stores else self._target(text) for text in texts]
        instruction = Instruction("store" if stores else "load", dict(enumerate(values)), a=size, b=len(texts))
        instruction.c = int(words[-1][0] == "s" and not stores) | 2 * wide | 4 * (16 in widths)
        if "param" in words and not stores:
            instruction.op = "parameter"
            base = re.match(r"\[\s*([%\w$]+)", address)[1]
            instruction.d = int(self._bits_of(base) == 64)
            instruction.operands[8], instruction.imm = self._address(address, 64 if instruction.d else 32)
            return instruction
        return self._placed(instruction, words, address)

    def _placed(self, instruction: Instruction, words: list[str], address: str) -> Instruction:
        """Add the address, the state space, and the order among threads."""
        shared = "shared" in words
        if not shared and "global" not in words:
            raise Unsupported("state space")
        base = re.match(r"\[\s*([%\w$]+)", address)[1]
        wide = not shared or self._bits_of(base) == 64
        instruction.operands[8], instruction.imm = self._address(address, 64 if wide else 32)
        strong = {"volatile", "relaxed", "acquire", "release", "acq_rel"} & set(words)
        scope = 0 if "cta" in words else 2 if {"sys", "volatile"} & set(words) else 1
        ordered = bool({"acquire", "release"} & set(words))
        instruction.d = int(bool(strong)) | 2 * ordered | 4 * shared | 8 * (shared and wide) | scope << 4
        name = "least_shared" if shared else "least_global"
        setattr(self, name, min(getattr(self, name), instruction.a))
        return instruction

    def _atom(self, words: list[str]) -> Instruction:
        words, kind = [word.split("::")[0] for word in words], words[-1]
        name = next(word for word in words[1:] if word in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
        if kind in ("f32", "f64") and name == "add":
            name = "add_f"
        elif name in ("min", "max"):
            name += "_s" if kind[0] == "s" else "_u"
        if BITS[kind] not in (32, 64) or (kind[0] == "f" and name not in ("add_f", "exch")) or kind.endswith("x2"):
            raise Unsupported("atomic")
        target, address, *values = self._arguments if words[0] == "atom" else ["_", *self._arguments]
        sources = (self._source(self._vector(text)[0], BITS[kind]) for text in values)
        operands = {0: self._target(target), **dict(enumerate(sources, 1))}
        order = int(bool({"acquire", "acq_rel"} & set(words))) | 2 * bool({"release", "acq_rel"} & set(words))
        instruction = Instruction("atomic", operands, a=BITS[kind] // 8, b=ATOMICS.index(name), c=order)
        return self._placed(instruction, words, address)

    _red = _atom

    def _cp(self, words: list[str]) -> Instruction:
        if words[1:] == ["async", "commit_group"]:
            return Instruction("copy_commit")
        if words[1:] == ["async", "wait_group"]:
            return Instruction("copy_wait", imm=number(self._arguments[0]))
        if words[1:] == ["async", "wait_all"]:
            return Instruction("copy_wait")
        if words[2] not in ("ca", "cg"):
            raise Unsupported("copy")
        size, given = number(self._arguments[2]), self._arguments[3:4]
        target, target_offset = self._address(self._arguments[0])
        source, source_offset = self._address(self._arguments[1], 64)
        self.least_shared, self.least_global = min(self.least_shared, size), min(self.least_global, size)
        operands = {0: target, 1: source, **({2: self._source(given[0])} if given else {})}
        return Instruction("copy_async", operands, a=size, b=len(given), imm=target_offset, d=source_offset)

    # -- control, and what lanes do together

    def _bra(self, words: list[str]) -> Instruction:
        return Instruction("bra", a=self._function.labels[self._arguments[0]])

    def _ret(self, words: list[str]) -> Instruction:
        return Instruction("exit")

    _exit = _ret

    def _trap(self, words: list[str]) -> Instruction:
        return Instruction("trap")

    def _bar(self, words: list[str]) -> Instruction:
        if words[1] == "warp":
            return Instruction("bar_warp", {5: self._source(self._arguments[0])})
        if "sync" not in words or len(self._arguments) != 1:
            raise Unsupported("barrier")
        return Instruction("bar", a=number(self._arguments[0]))

    _barrier = _bar

    def _fence(self, words: list[str]) -> Instruction:
        if "proxy" in words:
            return Instruction("proxy_fence" if "async" in ".".join(words).replace("::", ".").split(".") else "nop")
        return Instruction("nop" if "cta" in words else "fence")

    _membar = _fence

    def _shfl(self, words: list[str]) -> Instruction:
        targets, *sources, mask = self._arguments
        target, _, inside = targets.partition("|")
        instruction = self._simple(
            "shfl", [target, *sources], [32] * 3, a=["up", "down", "bfly", "idx"].index(words[2])
        )
        if inside:
            instruction.operands[4] = self._predicate(inside)
        instruction.operands[5] = self._source(mask)
        return instruction

    def _vote(self, words: list[str]) -> Instruction:
        target, predicate, mask = self._arguments
        mode = ["ballot", "any", "all", "uni"].index(words[2])
        operands = {0: self._predicate(target) if mode else self._target(target)}
        operands |= {1: self._predicate(predicate.lstrip("!")), 5: self._source(mask)}
        return Instruction("vote", operands, a=mode, b=int(predicate.startswith("!")))

    def _redux(self, words: list[str]) -> Instruction:
        name = words[2] + (f"_{words[3][0]}" if words[2] in ("min", "max") else "")
        target, value, mask = self._arguments
        operands = {0: self._target(target), 1: self._source(value), 5: self._source(mask)}
        return Instruction("redux", operands, a=ATOMICS.index(name))

    def _ldmatrix(self, words: list[str]) -> Instruction:
        stores = words[0] == "stmatrix"
        address, data = self._arguments if stores else reversed(self._arguments)
        if words[-1] != "b16" or "m8n8" not in words:
            raise Unsupported("matrix")
        operands = {n: self._source(t) if stores else self._target(t) for n, t in enumerate(self._vector(data))}
        count = len(operands)
        operands[8], offset = self._address(address)
        return Instruction(words[0], operands, a=count, b=int("trans" in words) | 2 * stores, imm=offset)

    _stmatrix = _ldmatrix

    def _mma(self, words: list[str]) -> Instruction:
        k = int(re.fullmatch(r"m16n8k(\d+)", words[3])[1])
        sums, left, right, added = words[-4:]
        if "row" not in words or left != right or sums != added:
            raise Unsupported("product")
        d, *rest = map(self._vector, self._arguments)
        operands = [*map(self._target, d), *(self._source(text) for vector in rest for text in vector)]
        return Instruction(
            "mma", dict(enumerate(operands)), a=PRODUCTS.index(left), b=k, c=["f32", "f16", "s32"].index(sums)
        )

    def _wgmma(self, words: list[str]) -> Instruction:
        if words[1] == "wait_group":
            return Instruction("wgmma_wait", imm=number(self._arguments[0]))
        if words[1] in ("fence", "commit_group"):
            return Instruction(f"wgmma_{words[1].removesuffix('_group')}")
        n = int(re.fullmatch(r"m64n(\d+)k\d+", words[4])[1])
        sums, left, right = words[-3:]
        d, a, b, adds, *flags = self._arguments
        if sums != "f32" or left != right or len(self._vector(d)) != n // 2:
            raise Unsupported("product")
        in_shared = not a.startswith("{")
        extra = [Operand(self._scope[text].number, read=True, written=True) for text in self._vector(d)]
        extra += [self._source(a, 64)] if in_shared else [self._source(text) for text in self._vector(a)]
        extra.append(self._source(b, 64))
        sign_a, sign_b, *transposed = map(number, flags)
        transposed = transposed if in_shared else [0, *transposed]
        mode = int(in_shared) | sum(2 << place for place, value in enumerate(transposed) if value)
        signs = int(sign_a == -1) | 2 * (sign_b == -1)
        return Instruction("wgmma", {0: self._predicate(adds)}, PRODUCTS.index(left), n, mode, signs, extra=extra)


def unpacked(statement: Statement) -> list[Statement]:
    """Two statements for one that takes a value apart; else the statement."""
    if not (statement.name.startswith("mov.b") and statement.arguments[0].startswith("{")):
        return [statement]
    targets, source = split_arguments(statement.arguments[0][1:-1]), statement.arguments[1]
    kind = statement.name.removeprefix("mov.")
    parts = [("low", targets[0]), ("high", targets[-1])] if len(targets) == 2 else []
    if not parts or source in targets:
        return [statement]  # and unsupported
    return [
        Statement(
            statement.text,
            statement.guard,
            f"{part}.{kind}",
            [target, source],
            statement.line,
            statement.source,
            statement.scope,
        )
        for part, target in parts
        if target != "_"
    ]


NO_OPERAND = -(2**31)
NAMES, OPERANDS = _operations()
NUMBERS = {name: number for number, name in enumerate(NAMES)}
