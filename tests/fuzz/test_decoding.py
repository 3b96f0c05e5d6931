"""Different ways to the same tokens, on random models: the oracle, a batch, another loop, a stream, once more."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from sfs_triton import Engine, FixedSteps, Frame, Generation, NoCache, RefreshCache, Threshold
from sfs_triton.models import ModelSpec
from sfs_triton.scheduling.request import Request
from sfs_triton.scheduling.scheduler import Scheduler, room_around, room_for
from sfs_triton.scheduling.sequence import Row, fault_of
from tests.fuzz.cases import (
    BETWEEN,
    LOOPS,
    POLICIES,
    ROOM,
    SHARES,
    Case,
    assert_outcomes,
    cases,
    ended,
    outcomes,
)
from tests.support.combinations import engine_with
from tests.support.oracle import compare, reference


def test_the_engine_is_the_oracle(fuzz):
    """Tokens, number of steps, and every step's stage, span, horizon and fill.

    Where a model says that a position is a mask, the references leave it undecided, some of them for ever, and the
    engine takes it for decided. Guidance can drive even those models to that which hardly ever would.
    """

    def check(case: Case) -> None:
        engine = case.model.engine()
        for row in range(len(case.prompts)):
            said: set[int] = set()

            def note(frame: Frame, said: set[int] = said) -> None:
                said |= {frame.tokens[0][place] for place in frame.committed[0]}

            (done,) = case.run(engine, [row], trace=True, on_step=note)
            assume(case.model.spec.mask_id not in said)
            wanted = reference(engine, *case.canvas(row), case.sampler, case.seeds[row])
            assert not isinstance(done, str), done
            wrong = compare(done, wanted)
            assert wrong is None, f"row {row}, margin {wanted.margin:.1e}: {wrong}"

    fuzz(check, ended(cases(rows=2, policies=st.just(NoCache()), settled=True)), examples=50, share=0.2)


def test_a_row_in_a_batch_is_the_row_alone(fuzz):
    def check(case: Case) -> None:
        engine = case.model.engine()
        together = case.run(engine, trace=True)
        alone = [case.run(engine, [row], trace=True)[0] for row in range(len(case.prompts))]
        assert_outcomes(together, alone)
        order = list(reversed(range(len(case.prompts))))
        assert_outcomes(case.run(engine, order, trace=True), [alone[row] for row in order])

    fuzz(check, ended(cases(rows=4)), examples=30, share=0.1)


OTHER_SAMPLING = {
    **{name: SHARES for name in ("tau_min", "tau_high", "tau_slow", "tau")},
    "temperature": st.sampled_from([0.1, 0.6, 2.0]),
    "top_p": BETWEEN,
}


@st.composite
def comings(draw: st.DrawFn) -> dict:
    """Arrival steps of sequences, those dropped early, and the number of slots."""
    times = st.lists(st.integers(0, 5), min_size=5, max_size=5)
    return {
        "slots": draw(st.integers(1, 3)),
        "most": draw(st.integers(1, 2)),
        "pauses": draw(times),
        "leaves": draw(st.dictionaries(st.integers(0, 4), st.integers(0, 8), max_size=2)),
        "others": draw(st.sampled_from(["same", "sampling", "sampling", "kind"])),
        "sampling": draw(st.fixed_dictionaries(OTHER_SAMPLING)),
        "around": draw(st.booleans()),
        "loop": draw(st.sampled_from(["tight", *sorted(LOOPS)])),
    }


def _other_rows(case: Case, when: dict) -> Case:
    """Return the same sequences with other parameters, which need a batch of their own or can share one."""
    if when["others"] == "kind":
        return replace(case, sampler=Threshold(tau=0.3, block_length=None), policy=NoCache())
    if when["others"] == "same":
        return case
    sampler, sampling = case.sampler, when["sampling"]
    changes = {name: value for name, value in sampling.items() if name.startswith("tau") and hasattr(sampler, name)}
    if sampler.temperature:
        changes["temperature"] = sampling["temperature"]
    if sampler.has_nucleus:
        changes["top_p"] = sampling["top_p"]
    changed = sampler.replace(**changes)
    assert changed.form() == sampler.form()
    return replace(case, sampler=changed)


def _rows(case: Case) -> list[Row]:
    canvases, starts = zip(*map(case.canvas, range(len(case.prompts))), strict=True)
    request = Request(list(canvases), list(starts), case.sampler, case.policy, case.seeds, trace=True)
    return Row.of(request, case.model.spec.mask_id)


def _come_and_go(scheduler: Scheduler, rows: list[Row], when: dict) -> None:
    """Submit the sequences, drop some, and step to the end."""
    taken, leaving = 0, {rows[index]: at for index, at in when["leaves"].items() if index < len(rows)}

    def step() -> None:
        nonlocal taken
        for row in [row for row, at in leaving.items() if at == taken]:
            scheduler.drop(row)
        scheduler.step()
        taken += 1
        assert taken < 20_000, "it does not end"

    for row, pause in zip(rows, when["pauses"], strict=False):
        scheduler.submit(row)
        for _ in range(pause):
            step()
    while scheduler.waiting + scheduler.running:
        step()


def test_rows_that_come_and_go_are_the_rows_alone(fuzz):
    """Use fewer slots than sequences, beside sequences with other parameters, some of which are dropped."""

    def check(drawn: tuple[Case, dict]) -> None:
        case, when = drawn
        base, spec = case.model.engine(), case.model.spec
        own = [case, _other_rows(case, when)]
        rows = [_rows(own[index % 2])[index] for index in range(len(case.prompts))]
        engine = engine_with(base, when["loop"] if when["loop"] == "tight" else LOOPS[when["loop"]]())
        room = room_for(rows)
        scheduler = Scheduler(
            engine.lanes,
            (lambda row: room_around(row, spec.max_length)) if when["around"] else (lambda row: room),
            slots=when["slots"],
            most=when["most"],
        )
        _come_and_go(scheduler, rows, when)
        for index, row in enumerate(rows):
            assert row.over
            if not row.dropped:
                found = outcomes(lambda row=row: _result(row, spec), 1)
                assert_outcomes(found, own[index % 2].run(base, [index], trace=True))

    fuzz(check, st.tuples(ended(cases(rows=5)), comings()), examples=30, share=0.1)


def _result(row: Row, spec: ModelSpec) -> list[Generation]:
    if fault := fault_of([row], {}):
        raise fault
    return [row.result(spec, None)]


def test_loops_agree(fuzz):
    def check(drawn: tuple[Case, str]) -> None:
        case, name = drawn
        engine = case.model.engine()
        wanted = case.run(engine_with(engine, "tight"), trace=True)
        assert_outcomes(case.run(engine_with(engine, LOOPS[name]()), trace=True), wanted)

    fuzz(check, st.tuples(ended(cases()), st.sampled_from(sorted(LOOPS))), examples=50, share=0.2)


def _streamed(engine: Engine, case: Case) -> list[Generation | str]:
    options = {"gen_length": case.lengths, "sampler": case.sampler, "cache": case.policy, "seed": case.seeds}

    def call() -> list[Generation]:
        stream, canvases = engine.stream(case.prompts, **options), None
        for frame in stream:
            canvases = frame.tokens
        done = stream.result()
        assert canvases == [row.canvas for row in done], "the last frame is not the result"
        return done

    return outcomes(call, len(case.prompts))


def test_once_more_in_a_stream_and_in_the_background(fuzz):
    """Reuse one engine: leftovers of a generation change nothing, with any policy."""
    any_ratio = st.builds(RefreshCache, st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))

    def check(case: Case) -> None:
        assume(case.lengths is not None)
        engine = case.model.engine()
        wanted = case.run(engine)
        assert_outcomes(case.run(engine), wanted)
        assert_outcomes(_streamed(engine, case), wanted)
        other = replace(case, prompts=[[p[0]] for p in case.prompts], seeds=[1] * len(case.prompts))
        other.run(engine)
        options = {"gen_length": case.lengths, "sampler": case.sampler, "cache": case.policy, "seed": case.seeds}
        pending = engine.generate_async(case.prompts, **options)
        assert_outcomes(outcomes(pending.result, len(case.prompts)), wanted)

    fuzz(check, cases(policies=POLICIES | any_ratio), examples=20, share=0.08)


def test_every_answer_is_whole(fuzz):
    """Check the invariants of any generation, whatever computed it."""

    def check(case: Case) -> None:
        spec = case.model.spec
        for index, row in enumerate(case.run(case.model.engine(), trace=True)):
            if isinstance(row, str):
                continue
            canvas, start = case.canvas(index)
            given = [p for p, token in enumerate(canvas) if token != spec.mask_id]
            assert all(row.canvas[p] == canvas[p] and row.commit_step[p] == -1 for p in given)
            assert len(row.canvas) == len(canvas) <= ROOM and row.prompt_length == start
            assert all(0 <= token < spec.vocab_size for token in row.canvas)
            assert row.nfe == len(row.trace) == len(row.forward_lengths)
            committed = [p for step in row.trace for p in step.committed]
            assert len(committed) == len(set(committed)), "a position was decided twice"
            undecided = [p for p, step in enumerate(row.commit_step) if step < 0 and canvas[p] == spec.mask_id]
            cut_off = [p for p in undecided if row.canvas[p] == spec.eos_id]
            assert len(undecided) - len(cut_off) == row.masks_left
            bounded = getattr(case.sampler, "max_cycles", None) or isinstance(case.sampler, FixedSteps)
            assert row.masks_left == 0 or bounded, "masks are left by a sampler that leaves none"
            assert all(c is None or -25 < c <= 1 for step in row.trace for c in step.confidence)

    fuzz(check, ended(cases()), examples=40, share=0.04)
