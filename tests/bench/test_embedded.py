"""The embedded model's tasks, tokenizer, training and checkpoint."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch

import sfs_triton
from bench.embedded import export, problems, tasks, train, vocabulary
from bench.embedded.model import CONSTANT_CHANNEL, CONSTANT_VALUE, LLaDA
from sfs_triton.checkpoint import EMBEDDED
from tests.support.margins import assert_logits_close

KINDS = ("records", "ledger", "fill", "words", "countdown", "drill", "copy")


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.build_tokenizer()


# ------------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("kind", KINDS)
def test_reference_answers_are_correct_and_spoilt_ones_are_not(kind):
    rng = random.Random(3)
    for _ in range(100):
        problem = tasks.GENERATORS[kind](rng)
        assert tasks.correct(problem, problem.answer)
        assert tasks.correct(problem, problem.answer + "\n")
        assert not tasks.correct(problem, problem.answer + "1")
        assert not tasks.correct(problem, "")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("44-15=29,79-29=50", True),
        ("79-44=35,35+15=50", True),
        ("44-15=28,79-28=51", False),
        ("44-15=29", False),
        ("50-0=50", False),
        ("44-15=29,79-29=50,50-0=50", False),
        ("79-29=50", False),
        ("44-15=29,80-30=50", False),
        ("15*44=660,660/79=50", False),
        ("", False),
        ("44-15=29;79-29=50", False),
    ],
)
def test_countdown_answers_are_checked_by_the_rules(answer, right):
    problem = tasks.Problem("countdown", "15,44,79,50", "44-15=29,79-29=50", "15,44,79,50")
    assert tasks.correct(problem, answer) is right


def test_third_party_answers_pass_and_are_all_held_out():
    assert len(tasks.third_party_countdown()) == 500
    for problem in tasks.third_party_countdown():
        assert tasks.correct(problem, problem.answer) and problem.held_out


def _numbers(line: str) -> list[int]:
    return [int(n) for n in re.findall(r"[-+]?\d+", line)]


@pytest.mark.parametrize("check", [False, True])
def test_ledgers_add_up(check):
    """Each line's balance is the one before plus the movement, by arithmetic on the texts alone."""
    rng, formats = random.Random(5), set()
    for _ in range(200):
        problem = tasks.ledger(rng, check=check)
        asked, _, given = problem.question.partition(":\n")
        formats.add(asked)
        lines = [_numbers(line) for line in problem.answer.splitlines() if re.search(r"\d", line)]
        balance = 0
        for move, after in lines:
            balance = (balance + move) % 10 if check else balance + move
            assert after == balance and 0 <= after <= 99
        movements = [n for line in given.splitlines() for n in _numbers(line)]
        assert [move for move, _ in lines] == [*movements, 0]
        assert 7 <= len(movements) <= 21 and all(1 <= abs(move) <= 9 for move in movements[1:])
        names, answered = (re.findall(r"[a-z]+(?=\W+[-+])", text) for text in (given, problem.answer))
        assert answered == [*names, "closed"] and names[0] == "open" and len(set(names)) == len(names)
    assert len(formats) == 3


def test_json_ledgers_parse():
    rng = random.Random(6)
    for _ in range(50):
        problem = tasks.ledger(rng, formats=("JSON", "CSV"))
        text = problem.answer if "as JSON" in problem.question else problem.question.partition(":\n")[2]
        assert all(isinstance(line[0], str) for line in json.loads(text))


def _units(size: int) -> list[list[int]]:
    wide = size // 2
    rows = [[r * size + c for c in range(size)] for r in range(size)]
    boxes = [
        [(t + r) * size + left + c for r in range(2) for c in range(wide)]
        for t in range(0, size, 2)
        for left in range(0, size, wide)
    ]
    return rows + [list(column) for column in zip(*rows, strict=True)] + boxes


def _solutions(grid: list[int], units: list[list[int]], size: int) -> list[list[int]]:
    """All solutions, by trying every value in the first empty cell."""
    if 0 not in grid:
        return [grid]
    cell = grid.index(0)
    taken = {grid[other] for unit in units if cell in unit for other in unit}
    filled = [[*grid[:cell], value, *grid[cell + 1 :]] for value in range(1, size + 1) if value not in taken]
    return [solution for each in filled for solution in _solutions(each, units, size)]


@pytest.mark.parametrize(("size", "blanks"), [(4, (6, 10)), (6, (8, 20))])
def test_sudokus_have_one_solution_and_it_is_the_answer(size, blanks):
    rng, units = random.Random(7), _units(size)
    empty = []
    for _ in range(60):
        problem = tasks.fill(rng, size, blanks)
        given, answer = ([int(d) for d in text if d.isdigit()] for text in (problem.question, problem.answer))
        assert all(sorted(answer[cell] for cell in unit) == list(range(1, size + 1)) for unit in units)
        assert _solutions(given, units, size) == [answer]
        empty.append(given.count(0))
    assert max(empty) <= blanks[1] and sum(empty) / len(empty) >= blanks[0]


def test_several_questions_are_one_problem_of_the_same_part():
    rng = random.Random(8)
    parts = [tasks.sample("fill", rng, held_out=True) for _ in range(2)]
    problem = tasks.several(parts)
    assert problem.held_out and tasks.correct(problem, tasks.SEPARATOR.join(p.answer for p in parts))
    assert not tasks.correct(problem, parts[0].answer)
    assert not tasks.several([parts[0], tasks.sample("fill", rng, held_out=False)]).held_out


def test_training_never_draws_a_test_problem():
    """Nothing that training samples is held out, and nothing that evaluation samples is not."""
    rng = random.Random(0)
    for kind in ("records", "ledger", "fill", "words", "countdown"):
        trained = {tasks.sample(kind, rng, held_out=False).key for _ in range(1500)}
        tested = {tasks.sample(kind, rng, held_out=True).key for _ in range(60)}
        assert not trained & tested
    easy = {tasks.sample("countdown", rng, held_out=False, largest=9).key for _ in range(3000)}
    assert not easy & tasks.third_party_keys()


def test_training_batches_hold_no_test_problem(tokenizer):
    batches = train.Batches(tokenizer, train.RECIPES["cpu"], seed=0)
    for step in (0, 3, 2000, 9000):
        ids, prompt, _ = batches[step]
        assert (ids[:, -1] == tokenizer.token_to_id(vocabulary.EOS)).all()
        for row, length in zip(ids.tolist(), prompt.tolist(), strict=True):
            text = tokenizer.decode(row[:length], skip_special_tokens=False)
            turns = [turn.partition("<|end_header_id|>\n\n")[2] for turn in text.split("<|eot_id|>")]
            asked = {q for turn in turns[::2] for q in turn.split(tasks.SEPARATOR)}
            assert asked and not any(tasks.Problem(kind, q, "", q).held_out for q in asked for kind in _kinds(q))


def test_sources_hold_the_tokens_that_are_copied(tokenizer):
    """Every source holds the token itself, but for the empty cells of a grid."""
    batches = train.Batches(tokenizer, train.RECIPES["cpu"], seed=0)
    rng, zero = random.Random(9), tokenizer.token_to_id("0")
    for kind in ("copy", "records", "ledger", "fill"):
        values = sourced = 0
        for _ in range(20):
            problem = tasks.GENERATORS[kind](rng)
            prompt, response = (tokenizer.encode(t).ids for t in (vocabulary.chat(problem.question), problem.answer))
            sources = batches._sources(kind, prompt, response)
            found = [(prompt[at], token) for at, token in zip(sources, response, strict=True) if at >= 0]
            assert all(given == token or (kind, given) == ("fill", zero) for given, token in found)
            values += sum(batches.value[token] for token in response)
            sourced += len(found)
        assert sourced > (0.6 if kind == "ledger" else 0.98) * values  # a balance has none


def _kinds(question: str) -> list[str]:
    """Kind of a question of the second edition, by its first line; drills and copies have no held-out part."""
    first, _, rest = question.partition("\n")
    if first.startswith("Rewrite"):
        return ["ledger"] if " with " in first else ["records"] if re.search(r"\bid\b", rest) else ["copy"]
    return ["drill" if re.search("[-+]", rest) else "fill"]


def _codec(tokenizer):
    return sfs_triton.engine.TextCodec(tokenizer, vocabulary.CHAT_TEMPLATE, {})


def test_batches_repeat(tokenizer):
    """A batch is a function of seed and step alone, whatever was drawn before it: a resumed run goes on as it was."""
    one, other = (train.Batches(tokenizer, train.RECIPES["cpu"], seed=1) for _ in range(2))
    other[3]
    first, again = one[19999], other[19999]
    assert all(torch.equal(mine, its) for mine, its in zip(first, again, strict=True))
    assert not torch.equal(one[19998][0], first[0])


def test_held_out_problems_fit_and_differ(embedded):
    for kind in problems.DIFFICULTY:
        chosen = problems.held_out(kind, 30, embedded.text, gen_length=128)
        assert len({p.key for p in chosen}) == 30 and all(p.held_out for p in chosen)
        sizes = [len(embedded.text.encode(p.answer)) for p in chosen]
        assert problems.SHORTEST_ANSWER[kind] <= min(sizes) and max(sizes) < 128
    with pytest.raises(ValueError, match="gen_length=8"):
        problems.held_out("records", 1, embedded.text, gen_length=8)


def test_problems_of_the_second_edition_fit_and_differ(embedded):
    for name, (kind, _, gen_length) in problems.SECOND_EDITION.items():
        chosen = problems.second_edition(name, 30, embedded.text)
        assert len({p.key for p in chosen}) == 30 and all(p.kind == kind and p.held_out for p in chosen)
        for problem in chosen:
            answer, prompt = (len(embedded.text.encode(t)) for t in (problem.answer, vocabulary.chat(problem.question)))
            assert answer < gen_length and prompt + gen_length <= problems.LENGTH
    with pytest.raises(ValueError, match="name='words'"):
        problems.second_edition("words", 1, embedded.text)


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Ann has 12 apples.",
        '{"id":7,"name":"Zoe"}',
        "0,007 250 6720",
        " two  spaces\t\n",
        "wörld \N{GRINNING FACE}",
        "",
    ],
)
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_numbers_up_to_199_are_one_token(tokenizer):
    assert all(len(tokenizer.encode(str(n)).ids) == 1 for n in range(200))


def test_template_and_function_agree(embedded):
    question = "  15,44,79,50 "
    assert embedded.text.render([{"role": "user", "content": question}]) == vocabulary.chat(question)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def tiny(monkeypatch, tokenizer) -> train.Recipe:
    """A run of a few seconds: one layer, short batches, the real loop."""
    monkeypatch.setattr(train, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(train.Run, "evaluate", lambda self: {})
    phase = train.Phase(100, {"fill-4": 0.5, "sums": 0.5}, longest=96)
    return train.Recipe((phase,), steps=6, rate=1e-3, tokens=384, layers=3, max_length=256)


def test_an_interrupted_run_resumes_to_the_same_weights(tiny, tmp_path):
    whole = train.Run(_folder(tmp_path / "whole"), tiny)
    whole.train()
    first = train.Run(_folder(tmp_path / "parts"), tiny)
    original = first.train_step

    def interrupted(*batch):
        if first.step == 5:
            raise KeyboardInterrupt
        return original(*batch)

    first.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train(save_every=2)
    second = train.Run(tmp_path / "parts", tiny)
    second.resume()
    assert second.step == 4
    second.train()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, atol=0, rtol=0)


def _folder(path):
    path.mkdir()
    return path


@pytest.mark.slow
def test_training_learns_and_keeps_the_constant_channel(tiny, tmp_path):
    run = train.Run(tmp_path, replace(tiny, steps=60, rate=1e-2, warm_up=5))
    batches = train.Batches(run.tokenizer, run.recipe, 0)
    losses = [run.train_step(*batches[step % 3])[0].item() for step in range(60)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    _assert_constant_channel(run.model.state_dict())


def _assert_constant_channel(tensors):
    assert (tensors["model.transformer.wte.weight"][:, CONSTANT_CHANNEL] == CONSTANT_VALUE).all()
    for name, tensor in tensors.items():
        if ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight")):
            assert (tensor[CONSTANT_CHANNEL] == 0).all()
    assert tensors["model.transformer.ln_f.weight"][CONSTANT_CHANNEL] > 0


def test_masking_spares_the_prompt_and_masks_each_row():
    ids, prompt = torch.arange(400 * 40).view(400, 40) % 50, torch.full((400,), 15)
    numbers, words = torch.arange(50) < 10, torch.arange(50) >= 40
    noised, masked = train.mask_response(ids, prompt, -1, numbers, words, torch.Generator().manual_seed(0))
    assert not masked[:, :15].any() and masked.any(1).all()
    assert torch.equal(noised == -1, masked) and torch.equal(noised[~masked], ids[~masked])
    inside = torch.arange(40) >= 15
    shares = [masked[inside & kind[ids]].float().mean() for kind in (numbers, words, ~(numbers | words))]
    assert shares[0] > 1.1 * shares[1] > 1.2 * shares[2]


def test_a_run_starts_from_a_checkpoint_with_added_layers_as_the_identity(tiny, tmp_path):
    small, large = train.Run(tmp_path, tiny), train.Run(tmp_path, replace(tiny, layers=4))
    torch.nn.init.normal_(small.model.model["transformer"]["ff_out"].weight)
    export.export(small, tmp_path / "out")
    small.start(tmp_path / "out")
    large.start(tmp_path / "out")
    ids = torch.randint(0, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_logits_close(large.model(ids), small.model(ids))


def test_exact_counts_right_answers_by_one_token_per_step_and_by_one_step(tokenizer):
    """The model here copies each answer; a broken one is right, and surer, at the first masked position alone."""
    chosen = [tasks.sample("fill", random.Random(seed), held_out=True) for seed in range(3)]
    eos = tokenizer.token_to_id(vocabulary.EOS)

    class Copies:
        cos = torch.zeros(1)
        broken = False

        def __call__(self, ids, masked):
            rows = []
            for row, part in zip(ids.tolist(), masked.tolist(), strict=True):
                start = max(i for i, token in enumerate(row) if token == turn) + 4
                wanted = next(a for question, a in answers if row[: len(question)] == question)
                first = part.index(True)
                for at in (i for i, hidden in enumerate(part) if hidden):
                    target = wanted[at - start] if at - start < len(wanted) else eos
                    sure = at == first or not self.broken
                    logits = torch.zeros(900)
                    logits[target if sure else 7] = 9.0 if sure else 5.0
                    rows.append(logits)
            return torch.stack(rows)

    prompts = [tokenizer.encode(vocabulary.chat(p.question), add_special_tokens=False).ids for p in chosen]
    answers = [(prompt, tokenizer.encode(p.answer).ids) for prompt, p in zip(prompts, chosen, strict=True)]
    turn = tokenizer.token_to_id(vocabulary.HEADER)
    model = Copies()
    assert train.exact(model, tokenizer, chosen, one_step=False) == 1
    assert train.exact(model, tokenizer, chosen, one_step=True) == 1
    model.broken = True
    assert train.exact(model, tokenizer, chosen, one_step=False) == 1
    assert train.exact(model, tokenizer, chosen, one_step=True) == 0


def test_exported_checkpoint_has_the_trained_models_logits(tiny, tmp_path):
    run = train.Run(tmp_path, tiny)
    torch.nn.init.normal_(run.model.model["transformer"]["ff_out"].weight)
    export.export(run, tmp_path / "out")
    engine = sfs_triton.load(tmp_path / "out", "cpu", "float32")
    rounded = LLaDA(run.config)
    rounded.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in run.model.state_dict().items()})
    ids = torch.randint(0, 800, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_logits_close(engine.model.logits(ids), rounded(ids))


# ------------------------------------------------------------------------------------------------- the shipped model


def test_shipped_checkpoint_has_the_promised_shape(embedded):
    spec = embedded.spec
    assert (spec.family, spec.d_model, spec.head_dim) == ("llada", 256, 32)
    assert (spec.rope_theta, spec.norm_eps, spec.qkv_bias, spec.tied_head) == (500000.0, 1e-5, False, False)
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) < 16 * 2**20
    from safetensors.torch import load_file

    _assert_constant_channel(load_file(EMBEDDED / "model.safetensors"))


def test_shipped_tokenizer_is_the_builders(tokenizer):
    assert json.loads((EMBEDDED / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


def test_shipped_model_answers(embedded):
    """Most held-out records come out exactly right, in far fewer steps than tokens."""
    chosen = problems.held_out("records", 8, embedded.text, seed=1)
    done = embedded.generate([p.question for p in chosen], gen_length=128)
    right = sum(tasks.correct(p, d.text) for p, d in zip(chosen, done, strict=True))
    assert right >= 6
    assert sum(d.nfe for d in done) < sum(len(d.tokens) for d in done) / 3
