"""Decode and time a batch of prompts by each row of the main benchmark."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.baselines import BASELINES, Decoded, PlainModel, vanilla
from bench.baselines.autoregressive import LLAMA_3_8B, Decoder, Geometry, build
from bench.common.rows import AUTOREGRESSIVE, OURS, PLAIN, Row
from bench.common.tally import Done, Visit
from sfs_triton import Engine
from sfs_triton.models import ModelSpec, Transformer
from sfs_triton.runner import CudaGraphs

BASELINE_OF = {
    ("vanilla", "none"): "vanilla",
    ("threshold", "none"): "fast-dllm",
    ("threshold", "prefix"): "fast-dllm prefix",
    ("threshold", "dual"): "fast-dllm dual",
    ("slowfast", "none"): "slowfast",
    ("slowfast", "refresh"): "slowfast + dLLM-Cache",
}  # of a row's sampler and cache
BRIEF = 0.2  # seconds
Decode = Callable[[Sequence[list[int]]], list[Done]]
Build = Callable[[str | None, str | None], Engine]


class Bench:
    """A model, and all implementations that decode with it.

    Args:
        engine: has the weights, which all rows share.
        gen_length: response positions.
        sampled_steps: plain vanilla decoding takes only so many steps, spread through a generation; 0: all of them.
        build: makes an engine from its backend and execution; default: one with the weights of ``engine``.
    """

    def __init__(self, engine: Engine, gen_length: int, *, sampled_steps: int = 0, build: Build | None = None):
        self.engine, self.gen_length, self._sampled_steps = engine, gen_length, sampled_steps
        self._build = build or self._engine
        self._plain: PlainModel | None = None
        self._warm: set[Row] = set()
        self._kept: dict[Row, Engine] = {}  # on a CPU, whose memory shows no peaks

    def lacks(self, row: Row) -> str | None:
        """Return the reason why a row cannot decode the model."""
        if row.who == PLAIN and row.cache in ("prefix", "dual") and self.engine.spec.shifted:
            return "Fast-dLLM's caches are not written out for models whose logits are shifted"
        return None

    def extrapolates(self, row: Row) -> bool:
        """Return True if a visit takes only a part of the row's steps."""
        return row.who == AUTOREGRESSIVE or bool(self._sampled_steps) and row.who == PLAIN and row.a_token_a_step

    def visit(self, row: Row, prompts: Sequence[list[int]], like: Done | None = None) -> Visit:
        """Decode prompts, timed from the call to the last result on the host; before it comes a warm-up.

        A GPU's warm-up is of the same prompts, so that no graph is captured meanwhile. What takes less than ``BRIEF``
        seconds is repeated for so long, and the median counts, in which other work on the machine shows less.
        ``like`` is how another row has decoded the first prompt: an extrapolated row takes its tokens and, for its
        canvases, its response.
        """
        device = self.engine.model.device
        _reset_memory(device)
        if self.extrapolates(row):
            one = self._tokens if row.who == AUTOREGRESSIVE else self._vanilla
            return one(prompts[0], like)._replace(memory=_peak_memory(device))
        decode = self._ours(row) if row.who == OURS else self._by_baseline(row)
        if device.type == "cuda" or row not in self._warm:
            decode(prompts)
            self._warm.add(row)
        taken: list[float] = []
        while not taken or sum(taken) < BRIEF:
            began = time.perf_counter()
            done = decode(prompts)
            taken.append(time.perf_counter() - began)
        seconds = statistics.median(taken)
        steps = max(one.nfe for one in done) if row.who == OURS else sum(one.nfe for one in done)
        return Visit(done, seconds, seconds / steps, _peak_memory(device))

    def _engine(self, backend: str | None, execution: str | None) -> Engine:
        model = self.engine.model
        graphs = None if execution is None else execution == CudaGraphs.name
        return Engine(Transformer(model.spec, model.weights, backend, model.group), self.engine.text, graphs)

    def _ours(self, row: Row) -> Decode:
        """Build a separate engine, whose tensors and graphs no other row evicts."""
        engine = self._kept.get(row) or self._build(row.backend, row.execution)
        if engine.model.device.type == "cpu":
            self._kept[row] = engine
        options = {"gen_length": self.gen_length, "sampler": row.settings, "cache": row.cache}
        execution = engine.execution

        def decode(prompts: Sequence[list[int]]) -> list[Done]:
            found = engine.generate(list(prompts), **options)
            if engine.execution != execution:
                raise RuntimeError(
                    f"{row.name}: execution by {execution} failed and {engine.execution} went on, so this is no figure"
                )
            return [
                Done(len(g.tokens), g.nfe, g.full_forwards, g.positions_forwarded, g.text, tuple(g.response))
                for g in found
            ]

        return decode

    @property
    def plain(self) -> PlainModel:
        if self._plain is None:
            self._plain = PlainModel(self.engine.model)
        return self._plain

    def _by_baseline(self, row: Row) -> Decode:
        baseline = BASELINES[BASELINE_OF[row.sampler, row.cache]]

        def decode(prompts: Sequence[list[int]]) -> list[Done]:
            return [self._told(baseline.decode(self.plain, p, self.gen_length, row.settings)) for p in prompts]

        return decode

    def _told(self, decoded: Decoded) -> Done:
        """Count the tokens and decode the text as sfs_triton does."""
        eos, response = self.engine.spec.eos_id, decoded.response
        tokens = response[: response.index(eos) + 1] if eos in response else response
        text = self.engine.text and self.engine.text.decode(tokens)
        counts = decoded.nfe, decoded.full_forwards, decoded.positions_forwarded
        return Done(len(tokens), *counts, text, tuple(response))

    @torch.inference_mode()
    def _vanilla(self, prompt: list[int], like: Done | None) -> Visit:
        """Plain steps of one token on canvases spread through a generation, times the tokens of all of it."""
        n, model = self.gen_length, self.plain
        response = list(like.response) if like else (prompt * n)[:n]
        taken = []
        for i in range(1 + self._sampled_steps):  # the first one warms up
            decided = max(0, i - 1) * n // self._sampled_steps
            ids = prompt + response[:decided] + [model.spec.mask_id] * (n - decided)
            canvas = torch.tensor(ids, device=model.device)
            began = time.perf_counter()
            vanilla.step(model, canvas, len(prompt), len(ids), 1)
            _wait(model.device)
            taken.append(time.perf_counter() - began)
        pace = statistics.median(taken[1:])
        return Visit([Done(like.tokens if like else n, n, n, n * len(ids))], n * pace, pace)

    def _tokens(self, prompt: list[int], like: Done | None) -> Visit:
        """An autoregressive model's prompt, and as many tokens as others have decoded or, of those, some.

        It is made for the visit, since its weights are as many as the other one's.
        """
        model, wanted = self.engine.model, like.tokens if like else self.gen_length
        n = min(wanted, 1 + self._sampled_steps) if self._sampled_steps else wanted
        decoder = Decoder(build(_llama(model.spec), model.device, model.dtype), len(prompt) + n)
        decoder.generate(prompt, 2)
        done = decoder.generate(prompt, n)
        pace = statistics.median(done.token_seconds or [done.prefill_seconds])
        note = "CUDA graph" if done.captured else f"launched: {done.reason}"
        seconds = done.prefill_seconds + (wanted - 1) * pace
        return Visit([Done(wanted, wanted, 1, len(prompt) + wanted - 1)], seconds, pace, note=note)


def _llama(spec: ModelSpec) -> Geometry:
    """LLaMA-3-8B beside models of that size, and beside a small one another as small."""
    if spec.d_model == LLAMA_3_8B.hidden_size:
        return LLAMA_3_8B
    return Geometry(
        spec.n_layers, spec.d_model, spec.n_heads, spec.n_kv_heads, spec.mlp, spec.vocab_size, spec.max_length
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()  # engines of earlier visits
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes that torch has held at once since they were reset: weights, caches, graphs, what was freed late."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
