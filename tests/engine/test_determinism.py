"""The same seed gives the same tokens: in another process, with other threads, by any execution and front end.

Sequences that join and leave a batch are in tests/scheduling/test_scheduler.py, orders of a batch in
tests/scheduling/test_batches.py, and all samplers and caches by all executions in tests/runner/test_execution.py.
docs/reliability.md says where it ends.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sfs_triton import FixedSteps, SlowFast
from tests.support.combinations import EXECUTIONS, engine_with
from tests.support.paths import ROOT
from tests.support.repeats import PROMPTS, TABLE, WAYS, all_ways, results


@pytest.fixture(scope="module")
def wanted(embedded) -> dict[str, list[list[int]]]:
    return all_ways(embedded)


def test_seeds_matter(embedded, wanted):
    """Otherwise the other tests here could not fail."""
    for name, (sampler, cache) in WAYS.items():
        others = results(embedded.generate(PROMPTS, sampler=sampler, cache=cache, gen_length=32, seed=77))
        assert others != wanted[name], name


def test_once_more(embedded, wanted):
    """After everything else that this engine has done, wherever torch's own generator is, which is left there."""
    torch.manual_seed(12)
    before = torch.get_rng_state()
    assert all_ways(embedded) == wanted
    assert torch.equal(torch.get_rng_state(), before)


ELSEWHERE = """
import json, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
import sfs_triton
from tests.support.repeats import all_ways
print(json.dumps(all_ways(sfs_triton.load("embedded", "cpu", sys.argv[1]), sys.argv[3:])))
"""


def elsewhere(dtype: str, threads: int, hash_seed: int, names=tuple(WAYS)) -> dict[str, list[list[int]]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", ELSEWHERE, dtype, str(threads), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "threads", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_another_process_with_other_threads(wanted, threads):
    assert elsewhere("float32", threads, hash_seed=threads) == wanted


@pytest.mark.slow
def test_another_dtype_repeats_itself():
    """bfloat16 need not equal float32, but repeats its own result."""
    names = ("noise", "noise-region")
    assert elsewhere("bfloat16", 1, 1, names) == elsewhere("bfloat16", 2, 2, names)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_executions_on_a_trained_model(embedded, wanted, execution):
    """Decode one prompt at a time, with the shapes of each execution."""
    engine = engine_with(embedded, execution)
    for name in ("noise", "noise-region", "random-positions"):
        sampler, cache = WAYS[name]
        done = [
            engine.generate(prompt, gen_length=32, sampler=sampler, cache=cache, seed=seed)
            for prompt, seed in zip(PROMPTS[:2], (3, 4), strict=True)
        ]
        assert [result.canvas for result in done] == wanted[name][0:6:3], name
        assert [result.commit_step for result in done] == wanted[name][1:6:3], name


# ----------------------------------------------------------------------------------------------------------- front ends


def test_calls_of_the_engine(embedded, wanted):
    for name, (sampler, cache) in WAYS.items():
        options = {"gen_length": 32, "sampler": sampler, "cache": cache, "seed": [3, 4, 5]}
        with embedded.stream(PROMPTS, **options) as stream:
            assert results(stream.result()) == wanted[name], name
        assert results(embedded.generate_async(PROMPTS, **options).result(timeout=60)) == wanted[name], name
        whole = results(embedded.generate(PROMPTS, on_step=lambda frame: None, trace=True, **options))
        assert whole == wanted[name], name


def test_the_command_line(embedded):
    pytest.importorskip("typer")
    sampler = SlowFast.preset("fast", temperature=0.8)
    alone = embedded.generate(TABLE, gen_length=64, sampler=sampler, cache="region", seed=11)
    command = [sys.executable, "-m", "sfs_triton.cli", "generate", TABLE, "--json", "--seed", "11"]
    command += ["--preset", "fast", "--temperature", "0.8", "--cache", "region", "--gen-length", "64"]
    command += ["--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    printed = json.loads(done.stdout)
    assert (printed["tokens"], printed["nfe"], printed["text"]) == (alone.tokens, alone.nfe, alone.text)


def test_a_server_under_requests_at_random_times(embedded):
    """Each of a set of requests, sent twice: in two orders, at two rhythms, with others beside them."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    pytest.importorskip("typer")
    from tests.support.server import chat, serving

    kinds = {
        "slowfast": (SlowFast(temperature=0.9), "none"),
        "vanilla": (FixedSteps(temperature=0.9), "none"),
        "region": (SlowFast(temperature=0.9), "region"),
    }
    asks, alone = [], []
    for number in range(9):
        name = list(kinds)[number % 3]
        prompt, length = PROMPTS[number % 2 * (number % 3)], (16, 24, 32, 48)[number % 4]
        sampler, cache = kinds[name]
        done = embedded.generate(prompt, gen_length=length, sampler=sampler, cache=cache, seed=number)
        more = {"sampler": "slowfast" if name == "region" else name, "cache": cache, "stream": number % 5 == 0}
        more |= {"stream_options": {"include_usage": True}} if more["stream"] else {}
        asks.append(chat(prompt, max_tokens=length, temperature=0.9, seed=number, **more))
        alone.append((done.text, done.nfe))
    for seed in (1, 2):
        rng = random.Random(seed)
        order = rng.sample(range(len(asks)), len(asks))
        with serving(embedded, max_batch=3, max_batches=2) as server, ThreadPoolExecutor(len(asks)) as pool:
            sent = {}
            for number in order:
                sent[number] = pool.submit(server.post, asks[number])
                time.sleep(rng.uniform(0, 0.08))
            for number, future in sent.items():
                assert answer_of(future.result(), asks[number]["stream"]) == alone[number], f"request {number}"
            assert max(server.gate.rows) > 1, "no two sequences were ever together"


def answer_of(response, stream: bool) -> tuple[str, int]:
    """Text and number of steps."""
    if not stream:
        body = response.json()
        return body["choices"][0]["message"]["content"], body["usage"]["nfe"]
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    usage = next(chunk["usage"] for chunk in chunks if chunk.get("usage"))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    return text, usage["nfe"]
