"""Different ways to the same tokens, on random models: the oracle, a batch, an execution, a stream, a repetition."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from sfs_triton import Engine, FixedSteps, Frame, Generation, NoCache, RefreshCache, Threshold
from sfs_triton.models import ModelSpec
from sfs_triton.scheduling.scheduler import Scheduler, bounds_around, bounds_of
from sfs_triton.scheduling.sequence import Sequence, fault_of
from tests.fuzz.cases import (
    BETWEEN,
    EXECUTIONS,
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


def test_the_engine_equals_the_oracle(fuzz):
    """Tokens, number of steps, and every step's stage, span, horizon and fill.

    Where a model predicts the mask, the references leave the position undecided, some of them for ever, and the engine
    takes it for decided. Under guidance even models that hardly ever predict it can do so.
    """

    def check(case: Case) -> None:
        engine = case.model.engine()
        for index, seed in enumerate(case.seeds):
            committed: set[int] = set()

            def note(frame: Frame, committed: set[int] = committed) -> None:
                committed |= {frame.tokens[0][place] for place in frame.committed[0]}

            (done,) = case.run(engine, [index], trace=True, on_step=note)
            assume(case.model.spec.mask_id not in committed)
            wanted = reference(engine, *case.canvas(index), case.sampler, seed)
            assert not isinstance(done, str), done
            wrong = compare(done, wanted)
            assert wrong is None, f"sequence {index}, margin {wanted.margin:.1e}: {wrong}"

    fuzz(check, ended(cases(most=2, policies=st.just(NoCache()), settled=True)), examples=30, share=0.2)


def test_a_sequence_in_a_batch_equals_the_one_alone(fuzz):
    def check(case: Case) -> None:
        engine = case.model.engine()
        together = case.run(engine, trace=True)
        alone = [case.run(engine, [index], trace=True)[0] for index in range(len(case.prompts))]
        assert_outcomes(together, alone)
        order = list(reversed(range(len(case.prompts))))
        assert_outcomes(case.run(engine, order, trace=True), [alone[index] for index in order])

    fuzz(check, ended(cases(most=4)), examples=20, share=0.1)


OTHER_SAMPLING = {
    **{name: SHARES for name in ("tau_min", "tau_high", "tau_slow", "tau")},
    "factor": st.sampled_from([0.2, 0.8, 3.0]),
    "temperature": st.sampled_from([0.1, 0.6, 2.0]),
    "top_p": BETWEEN,
}


@st.composite
def arrivals(draw: st.DrawFn) -> dict:
    """Arrival steps of sequences, those dropped early, and the number of slots."""
    times = st.lists(st.integers(0, 5), min_size=5, max_size=5)
    return {
        "slots": draw(st.integers(1, 3)),
        "most": draw(st.integers(1, 2)),
        "pauses": draw(times),
        "leaves": draw(st.dictionaries(st.integers(0, 4), st.integers(0, 8), max_size=2)),
        "others": draw(st.sampled_from(["same", "sampling", "sampling", "batch key"])),
        "sampling": draw(st.fixed_dictionaries(OTHER_SAMPLING)),
        "around": draw(st.booleans()),
        "execution": draw(st.sampled_from(sorted(EXECUTIONS))),
    }


def _with_others(case: Case, when: dict) -> Case:
    """Return the same sequences with other parameters, which need a batch of their own or can share one."""
    if when["others"] == "batch key":
        return replace(case, sampler=Threshold(tau=0.3, block_length=None), policy=NoCache())
    if when["others"] == "same":
        return case
    sampler, sampling = case.sampler, when["sampling"]
    changes = {name: value for name, value in sampling.items() if name.startswith("tau") and hasattr(sampler, name)}
    if getattr(sampler, "factor", None) is not None:  # in place of tau
        changes = {"factor": sampling["factor"]}
    if sampler.temperature:
        changes["temperature"] = sampling["temperature"]
    if sampler.has_nucleus:
        changes["top_p"] = sampling["top_p"]
    changed = sampler.replace(**changes)
    assert changed.blanked() == sampler.blanked()
    return replace(case, sampler=changed)


def _come_and_go(scheduler: Scheduler, sequences: list[Sequence], when: dict) -> set[int]:
    """Submit the sequences, drop some, and step to the end; return the numbers of those dropped before their end."""
    taken, submitted, dropped = 0, 0, set()

    def step() -> None:
        nonlocal taken
        for index, at in when["leaves"].items():
            if at == taken and index < submitted:
                if sequences[index].running:
                    dropped.add(index)
                scheduler.drop(sequences[index])
        scheduler.step()
        taken += 1
        assert taken < 20_000, "it does not end"

    for sequence, pause in zip(sequences, when["pauses"], strict=False):
        scheduler.submit(sequence)
        submitted += 1
        for _ in range(pause):
            step()
    while scheduler.waiting + scheduler.running:
        step()
    return dropped


def test_sequences_that_come_and_go_equal_those_alone(fuzz):
    """Use fewer slots than sequences, beside sequences with other parameters, some of which are dropped."""

    def check(drawn: tuple[Case, dict]) -> None:
        case, when = drawn
        base, spec = case.model.engine(), case.model.spec
        own = [case, _with_others(case, when)]
        sequences = [own[index % 2].sequences()[index] for index in range(len(case.prompts))]
        engine = engine_with(base, EXECUTIONS[when["execution"]]())
        bounds = bounds_of(sequences)
        scheduler = Scheduler(
            engine.batches,
            (lambda sequence: bounds_around(sequence, spec.max_length))
            if when["around"]
            else (lambda sequence: bounds),
            slots=when["slots"],
            most=when["most"],
        )
        dropped = _come_and_go(scheduler, sequences, when)
        for index, sequence in enumerate(sequences):
            assert sequence.finished
            if index not in dropped:
                found = outcomes(lambda sequence=sequence: _result(sequence, spec), 1)
                assert_outcomes(found, own[index % 2].run(base, [index], trace=True))

    fuzz(check, st.tuples(ended(cases(most=5)), arrivals()), examples=20, share=0.1)


def _result(sequence: Sequence, spec: ModelSpec) -> list[Generation]:
    if fault := fault_of([sequence], {}):
        raise fault
    return [sequence.result(spec, None)]


def test_executions_agree(fuzz):
    def check(drawn: tuple[Case, str]) -> None:
        case, name = drawn
        engine = case.model.engine()
        wanted = case.run(engine_with(engine, "exact"), trace=True)
        assert_outcomes(case.run(engine_with(engine, EXECUTIONS[name]()), trace=True), wanted)

    others = sorted(EXECUTIONS.keys() - {"exact"})
    fuzz(check, st.tuples(ended(cases()), st.sampled_from(others)), examples=30, share=0.2)


def _streamed(engine: Engine, case: Case) -> list[Generation | str]:
    options = {"gen_length": case.lengths, "sampler": case.sampler, "cache": case.policy, "seed": case.seeds}

    def call() -> list[Generation]:
        stream, canvases = engine.stream(case.prompts, **options), None
        for frame in stream:
            canvases = frame.tokens
        done = stream.result()
        assert canvases == [each.canvas for each in done], "the last frame is not the result"
        return done

    return outcomes(call, len(case.prompts))


def test_repetitions_in_a_stream_and_in_the_background(fuzz):
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


def test_invariants_of_every_generation(fuzz):
    """Check the invariants that hold for any sampler and cache."""

    def check(case: Case) -> None:
        spec = case.model.spec
        for index, done in enumerate(case.run(case.model.engine(), trace=True)):
            if isinstance(done, str):
                continue
            canvas, start = case.canvas(index)
            given = [p for p, token in enumerate(canvas) if token != spec.mask_id]
            assert all(done.canvas[p] == canvas[p] and done.commit_step[p] == -1 for p in given)
            assert len(done.canvas) == len(canvas) <= ROOM and done.prompt_length == start
            assert all(0 <= token < spec.vocab_size for token in done.canvas)
            assert done.nfe == len(done.trace) == len(done.forward_lengths)
            committed = [p for step in done.trace for p in step.committed]
            assert len(committed) == len(set(committed)), "a position was decided twice"
            undecided = [p for p, step in enumerate(done.commit_step) if step < 0 and canvas[p] == spec.mask_id]
            cut_off = [p for p in undecided if done.canvas[p] == spec.eos_id]
            assert len(undecided) - len(cut_off) == done.masks_left
            bounded = getattr(case.sampler, "max_cycles", None) or isinstance(case.sampler, FixedSteps)
            assert done.masks_left == 0 or bounded, "masks are left by a sampler that leaves none"
            assert all(c is None or -25 < c <= 1 for step in done.trace for c in step.confidence)

    fuzz(check, ended(cases()), examples=20, share=0.04)
