"""Seeded problem generators and answer checkers for the embedded model.

Kinds, each a function of a ``random.Random`` that returns a :class:`Problem`:

* ``records``   a table given in one of four formats, to be rewritten in another one (exact match),
* ``ledger``    named movements in one format, to be rewritten in another one with the running balance in each line,
* ``fill``      a sudoku of 4 x 4 or 6 x 6 cells that naked singles solve, so that the order of decoding decides,
* ``words``     grade-school word problems with worked steps and a final ``#### answer``,
* ``countdown`` combine the first three numbers to reach the last, ``15,44,79,50`` -> ``44-15=29,79-29=50``,
* ``drill``     sheets of single equations, ``7*8`` -> ``7*8=56``; for training only,
* ``copy``      rows of words and numbers with other separators; for training only.

Training and test problems are disjoint by construction: a problem belongs to the held-out part exactly when a hash of
its canonical key falls in one of :data:`HELD_OUT` of 64 buckets, and :func:`sample` draws from one part or the other.
The third-party Countdown test set is kept out of training as well (:func:`third_party_countdown`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 2
SEPARATOR = "\n---\n"
COUNTDOWN_FILE = Path(__file__).with_name("countdown3.jsonl")


@dataclass(frozen=True)
class Problem:
    """Question with a reference answer. ``key`` identifies the problem whatever its wording."""

    kind: str
    question: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """Return True if this problem belongs to the test split."""
        if self.kind in ("drill", "copy"):
            return False
        return all(self._held_out(key) for key in self.key.split(SEPARATOR))

    def _held_out(self, key: str) -> bool:
        digest = hashlib.sha256(f"{self.kind}\0{key}".encode()).digest()
        return digest[0] % 64 < HELD_OUT or (self.kind == "countdown" and key in third_party_keys())


# ---------------------------------------------------------------------------------------------------------- records

WORD_COLUMNS = {
    "name": "Ann Bob Cara Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Ned Olga Paul Quinn Rosa Sam Tina Uma Vic Wes "
    "Yara Zoe Adam Beth Carl Dora Emil".split(),
    "city": "Paris London Rome Oslo Cairo Lima Tokyo Delhi Berlin Madrid Dublin Vienna Prague Athens Lisbon Zurich "
    "Boston Miami Dallas Seoul Quito Accra Havana Riga".split(),
    "color": "red blue green black white pink gold gray brown purple orange yellow silver teal".split(),
    "animal": "cat dog fox owl hen cow pig bee ant bat rat elk emu yak eel crab frog goat".split(),
    "item": "lamp desk chair book pen cup bowl fork vase rug sofa shelf clock mirror basket towel".split(),
    "fruit": "apple pear plum fig kiwi mango grape lemon lime melon cherry banana peach date".split(),
    "job": "cook nurse pilot baker farmer tailor singer writer driver clerk judge coach guard miner".split(),
    "team": "Lions Bears Hawks Wolves Sharks Eagles Tigers Rams Colts Bulls Jets Kings Stars Giants".split(),
    "status": "open closed paid late sent new done void".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}
NUMBER_COLUMNS = "age price qty score size room year rank weight level".split()
TABLES = "people items orders teams pets trips rooms games books plants".split()
FORMATS = ("CSV", "JSON", "lines", "SQL")

Rows = list[dict[str, "int | str"]]


def _render_csv(rows: Rows, table: str) -> str:
    lines = [",".join(rows[0])] + [",".join(str(v) for v in row.values()) for row in rows]
    return "\n".join(lines)


def _render_json(rows: Rows, table: str) -> str:
    return "[" + ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows) + "]"


def _render_lines(rows: Rows, table: str) -> str:
    return "\n\n".join("\n".join(f"{key}={value}" for key, value in row.items()) for row in rows)


def _render_sql(rows: Rows, table: str) -> str:
    def literal(value: int | str) -> str:
        return str(value) if isinstance(value, int) else f"'{value}'"

    head = f"INSERT INTO {table} ({','.join(rows[0])}) VALUES "
    return "\n".join(f"{head}({','.join(literal(v) for v in row.values())});" for row in rows)


RENDER = {"CSV": _render_csv, "JSON": _render_json, "lines": _render_lines, "SQL": _render_sql}


def _word_value(rng: random.Random, column: str, variable: bool) -> str:
    word = rng.choice(WORD_COLUMNS[column])
    if not variable or rng.random() < 0.5:
        return word
    other = rng.choice(WORD_COLUMNS[rng.choice(list(WORD_COLUMNS))])
    return f"{word}-{other}" if rng.random() < 0.5 else f"{word}-{rng.randrange(200)}-{other}"


def records(
    rng: random.Random,
    rows: tuple[int, int] = (3, 7),
    columns: tuple[int, int] = (2, 4),
    variable: bool = False,
    fields: str | None = None,
) -> Problem:
    """A table of ``rows`` records with an id and ``columns`` further fields, to be rewritten in another format.

    With ``variable`` false every field is a single word or number (one token); with it true, words grow to up to three
    hyphenated parts, so that positions cannot be counted and must be found. ``fields`` fixes number and kinds of the
    fields instead: ``"wn"`` is a word and a number, so that all records of a format are equally long.
    """
    if fields is None:
        names = rng.sample(list(WORD_COLUMNS) + NUMBER_COLUMNS, rng.randint(*columns))
    else:
        words_, numbers = (
            iter(rng.sample(list(WORD_COLUMNS), len(fields))),
            iter(rng.sample(NUMBER_COLUMNS, len(fields))),
        )
        names = [next(words_ if kind == "w" else numbers) for kind in fields]
    n_rows = rng.randint(*rows)
    first = 1 if rng.random() < 0.5 else rng.randrange(200 - n_rows)
    data: Rows = []
    for index in range(n_rows):
        row: dict[str, int | str] = {"id": first + index}
        for name in names:
            row[name] = _word_value(rng, name, variable) if name in WORD_COLUMNS else rng.randrange(200)
        data.append(row)
    table = rng.choice(TABLES)
    source, target = rng.sample(FORMATS, 2)
    goal = f"{target} into {table}" if target == "SQL" else target
    question = f"Rewrite as {goal}:\n{RENDER[source](data, table)}"
    return Problem("records", question, RENDER[target](data, table), question)


# ----------------------------------------------------------------------------------------------------------- ledger

LEDGER_NAMES = [*WORD_COLUMNS["item"], *WORD_COLUMNS["fruit"], *WORD_COLUMNS["animal"]]
LEDGER_FORMATS = ("CSV", "JSON", "lines")
BALANCE, CHECK = "level", "score"  # the column's name: a running balance, or its last digit alone


def _render_ledger(lines: list[tuple], target: str, columns: list[str]) -> str:
    """Lines of a name, a signed movement and, in an answer, the balance after it."""
    if target == "CSV":
        return "\n".join(",".join(map(str, line)) for line in [columns, *lines])
    if target == "lines":
        return "\n".join("=".join(map(str, line)) for line in lines)
    return "[" + ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "]"


def ledger(
    rng: random.Random, movements: tuple[int, int] = (6, 20), check: bool = False, formats: tuple = LEDGER_FORMATS
) -> Problem:
    """An opening balance and ``movements`` of 1 to 9, up or down, between balances of 0 and 99.

    The answer adds to each line the balance after it, and a closing line. With ``check`` true the column is a check
    digit instead: opening and movements are added up modulo 10.
    """
    count = rng.randint(*movements)
    balance = rng.randrange(10 if check else 100)
    given, solved = [("open", f"+{balance}")], [("open", f"+{balance}", balance)]
    for name in rng.sample(LEDGER_NAMES, count):
        move = rng.choice((-1, 1)) * rng.randint(1, 9)
        if check:
            balance = (balance + move) % 10
        else:
            move = move if 0 <= balance + move <= 99 else -move
            balance += move
        given.append((name, f"{move:+d}"))
        solved.append((name, f"{move:+d}", balance))
    solved.append(("closed", "+0", balance))
    source, target = rng.sample(formats, 2)
    column = CHECK if check else BALANCE
    question = f"Rewrite as {target} with {column}:\n{_render_ledger(given, source, ['item', 'qty'])}"
    return Problem("ledger", question, _render_ledger(solved, target, ["item", "qty", column]), question)


# ------------------------------------------------------------------------------------------------------------- fill


def _boxes(size: int) -> tuple[int, int]:
    return (2, 2) if size == 4 else (2, 3)


@functools.cache
def peers(size: int) -> tuple[frozenset[int], ...]:
    """Cells that share a row, a column or a box, for each cell of a grid of ``size``; boxes are 2 x 2 or 2 x 3."""
    high, wide = _boxes(size)
    units = [(("row", r), ("column", c), ("box", r // high, c // wide)) for r in range(size) for c in range(size)]
    return tuple(
        frozenset(j for j, other in enumerate(units) if j != i and set(mine) & set(other))
        for i, mine in enumerate(units)
    )


def _solved_grid(rng: random.Random, size: int) -> list[int]:
    """A random valid grid: cells are filled in order, and a dead end starts again."""
    around = peers(size)
    while True:
        grid = [0] * (size * size)
        for cell in range(size * size):
            free = [v for v in range(1, size + 1) if all(grid[p] != v for p in around[cell])]
            if not free:
                break
            grid[cell] = rng.choice(free)
        else:
            return grid


def render_grid(grid: list[int], size: int) -> str:
    """Rows of digits, 0 for an empty cell."""
    return "\n".join("".join(map(str, grid[r * size : (r + 1) * size])) for r in range(size))


def fill(rng: random.Random, size: int = 4, blanks: tuple[int, int] = (6, 10)) -> Problem:
    """A sudoku of ``size`` with ``blanks`` empty cells, as far as they can be had, and its only solution.

    A cell is emptied only where the cells still given leave one value for it. So filling cells in the reverse order is
    always possible, one naked single after the other, and the solution is unique.
    """
    solution = _solved_grid(rng, size)
    grid, left = list(solution), rng.randint(*blanks)
    for cell in rng.sample(range(size * size), size * size):
        if left and len({grid[p] for p in peers(size)[cell]} - {0}) == size - 1:
            grid[cell] = 0
            left -= 1
    question = f"Solve:\n{render_grid(grid, size)}"
    return Problem("fill", question, render_grid(solution, size), question)


# ------------------------------------------------------------------------------------------------------ word problems

THINGS = "apples pears books coins cards shells stamps marbles pens cups eggs beads stones toys keys balls".split()
PLACES = "at the market,in the park,at school,at home,in the garden,on the beach".split(",")
GAIN = ("buys", "finds", "gets", "wins", "picks")
LOSS = ("loses", "sells", "drops", "breaks", "eats")


def _event(rng: random.Random, who: str, thing: str, have: int) -> tuple[str, str, int]:
    """Return an event: its sentence in the question, its worked step, and the amount left after it."""
    kinds = ["gain"] + ["loss"] * (have > 1) + ["give"] * (have > 1) + ["double"] * (have < 60)
    kinds += ["half"] * (have % 2 == 0 and have > 2) + ["boxes"] * (have < 120)
    kind = rng.choice(kinds)
    if kind == "gain":
        n = rng.randint(1, min(40, 199 - have))
        return (
            f"{who} {rng.choice(GAIN)} {n} more {thing} {rng.choice(PLACES)}.",
            f"Then {who} has {have}+{n}={have + n} {thing}.",
            have + n,
        )
    if kind == "loss":
        n = rng.randint(1, min(40, have - 1))
        return f"Then {who} {rng.choice(LOSS)} {n} {thing}.", f"That leaves {have}-{n}={have - n} {thing}.", have - n
    if kind == "give":
        n = rng.randint(1, min(40, have - 1))
        friend = rng.choice([name for name in WORD_COLUMNS["name"] if name != who])
        return (
            f"{who} gives {n} {thing} to {friend}.",
            f"After giving {n} to {friend}, {who} has {have}-{n}={have - n} {thing}.",
            have - n,
        )
    if kind == "double":
        return (
            f"A friend brings as many {thing} as {who} has now.",
            f"The {thing} double to {have}*2={have * 2}.",
            have * 2,
        )
    if kind == "half":
        return f"{who} puts away half of the {thing}.", f"Half of the {thing} is {have}/2={have // 2}.", have // 2
    boxes = rng.randint(2, 6)
    each = rng.randint(2, 9)
    total = boxes * each
    return (
        f"{who} opens {boxes} boxes with {each} {thing} in each.",
        f"The boxes hold {boxes}*{each}={total} {thing}, so {who} has {have}+{total}={have + total}.",
        have + total,
    )


def words(rng: random.Random, steps: tuple[int, int] = (2, 4)) -> Problem:
    """A story of ``steps`` events about one person and one kind of thing; all numbers stay within 0..199."""
    who, thing = rng.choice(WORD_COLUMNS["name"]), rng.choice(THINGS)
    start = have = rng.randint(5, 60)
    story, worked = [f"{who} has {start} {thing}."], [f"{who} starts with {start} {thing}."]
    for _ in range(rng.randint(*steps)):
        sentence, step, have = _event(rng, who, thing, have)
        story.append(sentence)
        worked.append(step)
    question = " ".join(story) + f" How many {thing} does {who} have now?"
    return Problem("words", question, " ".join(worked) + f"\n#### {have}", question)


# --------------------------------------------------------------------------------------------------------- countdown


def _combine(rng: random.Random, a: int, b: int) -> tuple[str, int] | None:
    """A random equation over ``a`` and ``b`` with a positive whole result, larger operand first."""
    a, b = max(a, b), min(a, b)
    op = rng.choices("+-*/", weights=(4, 7, 1, 2))[0]
    if op == "/" and (b < 2 or a % b) or op == "-" and a == b or op == "*" and (b < 2 or a * b > 999):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    return f"{a}{op}{b}={value}", value


def countdown_key(numbers: list[int]) -> str:
    """Canonical name of a Countdown problem: order of the three operands does not matter."""
    return ",".join(map(str, sorted(numbers[:3]) + numbers[3:]))


def countdown(rng: random.Random, largest: int = 99) -> Problem:
    """Three operands up to ``largest`` and a target of 10 to 100 that some two equations reach."""
    while True:
        operands = [rng.randint(1, largest) for _ in range(3)]
        order = rng.sample(operands, 3)
        first = _combine(rng, order[0], order[1])
        second = first and _combine(rng, first[1], order[2])
        if second and 10 <= second[1] <= 100:
            numbers = [*operands, second[1]]
            question = ",".join(map(str, numbers))
            return Problem("countdown", question, f"{first[0]},{second[0]}", countdown_key(numbers))


@functools.cache
def third_party_countdown() -> tuple[Problem, ...]:
    """The 500 third-party Countdown problems beside this file: for testing, never for training."""
    records_ = [json.loads(line) for line in COUNTDOWN_FILE.read_text().splitlines()]
    return tuple(
        Problem("countdown", r["input"], r["output"], countdown_key([int(n) for n in r["input"].split(",")]))
        for r in records_
    )


@functools.cache
def third_party_keys() -> frozenset[str]:
    return frozenset(problem.key for problem in third_party_countdown())


# ------------------------------------------------------------------------------------------------------------- drills


def drill(rng: random.Random, items: tuple[int, int] = (4, 10), ledger: bool = False) -> Problem:
    """A sheet of single equations of the kinds that the other tasks need; with ``ledger``, of its sums alone."""
    asked, solved = [], []
    for _ in range(rng.randint(*items)):
        op = rng.choice("+-" if ledger else "+-+-*/")
        if ledger:
            a, b = rng.randrange(100), rng.randint(1, 9)
            op = op if 0 <= a + (b if op == "+" else -b) <= 99 else "-+"[op == "-"]
            value = a + b if op == "+" else a - b
        elif op in "+-":
            a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
            value = a + b if op == "+" else a - b
        else:
            b, value = rng.randint(2, 9), rng.randint(2, 19)
            a, value = (b * value, value) if op == "/" else (value, b * value)
        asked.append(f"{a}{op}{b}")
        solved.append(f"{a}{op}{b}={value}")
    question = "Solve:\n" + "\n".join(asked)
    return Problem("drill", question, "\n".join(solved), question)


def copy(rng: random.Random, rows: tuple[int, int] = (2, 8)) -> Problem:
    """Rows of one to three words or numbers, to be written with other separators: where looking up is learnt."""
    every = [word for words_ in WORD_COLUMNS.values() for word in words_]
    width = rng.randint(1, 3)
    lines = [
        tuple(rng.choice(every) if rng.random() < 0.6 else rng.randrange(200) for _ in range(width))
        for _ in range(rng.randint(*rows))
    ]

    def render(form: str) -> str:
        return _render_ledger(lines, form, []).lstrip("\n")

    source, target = rng.sample(LEDGER_FORMATS, 2)
    question = f"Rewrite as {target}:\n{render(source)}"
    return Problem("copy", question, render(target), question)


# ----------------------------------------------------------------------------------------------------------- checking


def _countdown_correct(question: str, answer: str) -> bool:
    *numbers, target = (int(n) for n in question.split(","))
    pool = list(numbers)
    value = None
    for equation in answer.strip().split(","):
        match = re.fullmatch(r"(\d{1,6})([-+*/])(\d{1,6})=(\d{1,6})", equation)
        if not match:
            return False
        a, op, b, value = int(match[1]), match[2], int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in pool:
                return False
            pool.remove(operand)
        exact = {"+": a + b, "-": a - b, "*": a * b}.get(op)
        if exact != value and not (op == "/" and b and a == b * value):
            return False
        pool.append(value)
    return pool == [target]


def correct(problem: Problem, answer: str) -> bool:
    """Return True if ``answer`` solves ``problem``: exact match, right final number, or a valid chain of equations."""
    if problem.kind == "countdown":
        return _countdown_correct(problem.question, answer)
    if problem.kind == "words":
        return answer.rpartition("####")[2].strip() == problem.answer.rpartition("####")[2].strip()
    return answer.strip() == problem.answer.strip()


GENERATORS = {
    "records": records,
    "ledger": ledger,
    "fill": fill,
    "words": words,
    "countdown": countdown,
    "drill": drill,
    "copy": copy,
}


def sample(kind: str, rng: random.Random, held_out: bool, **options) -> Problem:
    """Draw one problem of ``kind`` from the held-out part or from the training part."""
    if kind not in GENERATORS:
        raise ValueError(f"kind={kind!r} is not one of {sorted(GENERATORS)}")
    while True:
        problem = GENERATORS[kind](rng, **options)
        if problem.held_out == held_out:
            return problem


def several(problems: list[Problem]) -> Problem:
    """One question of several of a kind, all of one part, answered in their order."""
    joined = (SEPARATOR.join(getattr(p, name) for p in problems) for name in ("question", "answer", "key"))
    return Problem(problems[0].kind, *joined)
