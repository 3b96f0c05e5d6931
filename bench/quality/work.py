"""Prompts of a benchmark as token ids, with the correct answer where known."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from bench.embedded import problems, tasks
from sfs_triton import Engine
from sfs_triton.text.codec import TextCodec

MISSES = 16  # examples that turned out too long, after which a prompt is taken to be full


@dataclass(frozen=True)
class Question:
    """A prompt, and its problem where the answer can be checked."""

    prompt: list[int]
    problem: tasks.Problem | None = None

    def right(self, text: str | None) -> bool | None:
        """Return True if ``text`` answers it; None if the answer is unknown."""
        return None if self.problem is None else tasks.correct(self.problem, text or "")


@dataclass(frozen=True)
class Work:
    """The questions of a run."""

    name: str
    questions: list[Question]

    def unanswered(self) -> Work:
        """Return the same prompts without answers, for a model with random weights."""
        return Work(self.name, [Question(question.prompt) for question in self.questions])


def read_work(
    engine: Engine, source: str, *, limit: int, seed: int, gen_length: int, prompt_length: int | None = None
) -> Work:
    """Read ``limit`` questions for a model.

    Args:
        source: a kind of held-out problem, or a JSONL file of ``{"prompt": ..., "answer": optional}``.
        prompt_length: before each problem come solved ones of its kind, as many as so many tokens have room for.

    Raises:
        ValueError: names the fault, and for a file its line.
    """
    text = engine.codec("a set of problems")
    if source not in problems.DIFFICULTY:
        if prompt_length is not None:
            raise ValueError(f"--prompt-length {prompt_length} packs problems, and --prompts {source!r} is a file")
        return _from_file(Path(source), text, limit)
    length = min(engine.spec.max_length, 2 * gen_length)
    chosen = problems.held_out(source, limit, text, seed=seed, gen_length=gen_length, max_length=length)
    if prompt_length is None:
        return Work(source, [Question(_asked(text, p.question), p) for p in chosen])
    if prompt_length + gen_length > engine.spec.max_length:
        raise ValueError(
            f"--prompt-length {prompt_length} and --gen-length {gen_length} are more than the model's "
            f"{engine.spec.max_length} positions"
        )
    rng = random.Random(f"examples-{seed}")
    return Work(f"{source}, few-shot", [Question(few_shot(text, p, prompt_length, rng), p) for p in chosen])


def few_shot(text: TextCodec, problem: tasks.Problem, length: int, rng: random.Random) -> list[int]:
    """Build at most ``length`` token ids: solved training problems as earlier chat turns, then the problem.

    Raises:
        ValueError: the problem alone is longer.
    """
    turns: list[dict[str, str]] = []
    ids, misses = _asked(text, problem.question), 0
    if len(ids) > length:
        raise ValueError(f"--prompt-length {length}: a problem alone has {len(ids)} tokens")
    while misses < MISSES:
        example = tasks.sample(problem.kind, rng, held_out=False, **problems.DIFFICULTY[problem.kind])
        both = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
        longer = _asked(text, problem.question, turns + both)
        if len(longer) > length:
            misses += 1
        else:
            ids, turns = longer, turns + both
    return ids


def _asked(text: TextCodec, question: str, before: list[dict[str, str]] | None = None) -> list[int]:
    """Ids of a conversation that ends with the question; of a checkpoint without a template, of its plain text."""
    turns = [*(before or ()), {"role": "user", "content": question}]
    if text.template is None:
        return text.encode("\n\n".join(turn["content"] for turn in turns))
    return text.encode(text.render(turns))


def _from_file(path: Path, text: TextCodec, limit: int) -> Work:
    if not path.is_file():
        raise ValueError(f"--prompts {str(path)!r} is neither one of {tuple(problems.DIFFICULTY)} nor a file")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], 1):
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], entry.get("answer")
            if not isinstance(prompt, str) or not prompt or not isinstance(answer, (str, type(None))):
                raise TypeError("'prompt' and 'answer' are text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not an object with a 'prompt': {error}") from None
        problem = None if answer is None else tasks.Problem("exact", prompt, answer, prompt)
        questions.append(Question(_asked(text, prompt), problem))
    if not questions:
        raise ValueError(f"{path} holds no prompt")
    return Work(path.stem, questions)
