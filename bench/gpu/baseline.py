"""Baseline to beat: plain cuBLAS and SDPA under plain CUDA graphs, without any code of this package.

A step forwards C rows of LLaDA-8B's sizes against 2,124 cached keys, with random weights in bfloat16; a full step all
of them. Beside the whole, its products and its attention alone, and the ceilings that the design assumes: how fast a
copy is, and how fast a product of matrices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.timing import measure_ceilings
from sfs_triton.models import ModelSpec, Weights
from sfs_triton.models.weights import LayerWeights
from sfs_triton.ops.torch.rope_cache import rope_tables

from . import clock, parts, trace
from .environment import smi
from .model import random_weights, sizes

ROWS = (1, 32, 64, 128, 184, 256)
HEAD_ROWS = 64  # at most so many rows get logits
PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Plain:
    """A minimal torch transformer: positions of a canvas against cached keys and values, then logits of some."""

    def __init__(self, spec: ModelSpec, weights: Weights, length: int):
        self.spec, self.weights, self.length = spec, weights.plain("the baseline"), length
        self.device, dtype = weights.embedding.device, weights.embedding.dtype
        generator = torch.Generator(self.device).manual_seed(2)
        shape = (spec.n_layers, 2, 1, spec.n_kv_heads, length, spec.head_dim)
        self.cache = torch.empty(shape, device=self.device, dtype=dtype).normal_(generator=generator)
        tables = rope_tables(length, spec.head_dim, spec.rope_theta, self.device)
        self.cos, self.sin = (table.to(dtype) for table in tables)
        self.tokens = torch.randint(0, spec.vocab_size, (length,), device=self.device, generator=generator)

    def step(self, rows: int, head_rows: int, every_logit: bool = False) -> torch.Tensor:
        """Tokens of the first ``head_rows`` rows, or with ``every_logit`` the softmax of all."""
        place = torch.arange(rows, device=self.device)
        x = F.embedding(self.tokens[:rows], self.weights.embedding)
        for layer, cache in zip(self.weights.layers, self.cache, strict=True):
            x = self._attend(x, layer, cache, place)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        logits = F.linear(self._norm(x if every_logit else x[:head_rows], self.weights.norm), self.weights.head)
        return logits.softmax(-1).max(-1).values if every_logit else logits.argmax(-1)

    def _attend(self, x: torch.Tensor, layer: LayerWeights, cache: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        heads = F.linear(self._norm(x, layer.attn_norm), layer.qkv).view(len(x), -1, spec.head_dim)
        q, k, v = heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
        q, k = self._turned(q), self._turned(k)
        for kept, fresh in zip(cache, (k, v), strict=True):
            kept.index_copy_(2, place, fresh.transpose(0, 1)[None])
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1)[None], cache[0], cache[1])
        return x + F.linear(mixed[0].transpose(0, 1).flatten(1), layer.out)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        cos, sin = self.cos[: len(x), None], self.sin[: len(x), None]
        return x * cos + torch.cat((-high, low), -1) * sin

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, gain.shape, gain, self.spec.norm_eps)


class Bench:
    """The model is made once, when the first part needs it."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, parts.device()
        self.spec, self.setting, self.dtype = sizes(toy)
        self.length = self.setting.prompt + self.setting.response

    @functools.cached_property
    def model(self) -> Plain:
        return Plain(self.spec, random_weights(self.spec, self.device, self.dtype), self.length)

    def ceilings(self) -> dict[str, Any]:
        if self.toy:
            raise parts.Skip("a toy has no ceilings")
        bandwidth, rate = measure_ceilings(self.device)
        torch.cuda.empty_cache()
        return {"copy_gb_per_s": bandwidth / 1e9, "matmul_tflops": rate / 1e12, **smi()}

    @torch.inference_mode()
    def step(self, rows: int) -> dict[str, Any]:
        head_rows = min(rows, HEAD_ROWS)
        work = functools.partial(self.model.step, rows, head_rows)
        samples = clock.seconds(clock.graph_of(work, self.device), self.device)
        return {"rows": rows, "keys": self.length, "head_rows": head_rows, **clock.spread(samples)}

    @torch.inference_mode()
    def vanilla(self) -> dict[str, Any]:
        """Time the official script's step: the softmax of all logits. Also launched one by one."""
        work = functools.partial(self.model.step, self.length, self.length, True)
        replayed = clock.spread(clock.seconds(clock.graph_of(work, self.device), self.device))
        launched = clock.spread(clock.seconds(work, self.device, samples=5), "launched_ms")
        return {"rows": self.length, **replayed, **launched}

    @torch.inference_mode()
    def profile(self, rows: int) -> dict[str, Any]:
        """List the kernels that torch launches for a step, with their times."""
        work = functools.partial(self.model.step, rows, min(rows, HEAD_ROWS))
        work()
        return {"rows": rows, **trace.summary(trace.profiled(work))}

    @torch.inference_mode()
    def products(self, rows: int) -> dict[str, Any]:
        """Time each product of a step alone, of all layers one after another, so that weights come from memory."""
        values: dict[str, Any] = {"rows": rows}
        for name in PRODUCTS:
            weights = [getattr(layer, name) for layer in self.model.weights.layers] if name != "head" else []
            weights = weights or [self.model.weights.head]
            n = min(rows, HEAD_ROWS) if name == "head" else rows
            x = torch.randn((n, weights[0].shape[1]), device=self.device).to(self.dtype)
            work = functools.partial(_every, x, weights)
            taken = clock.spread(clock.seconds(clock.graph_of(work, self.device), self.device, budget=0.3))["ms"]
            moved = sum(w.nbytes + x.nbytes + n * w.shape[0] * w.itemsize for w in weights)
            flops = sum(2 * n * w.numel() for w in weights)
            values[name] = {
                "us_each": 1e3 * taken / len(weights),
                "gb_per_s": moved / taken / 1e6,
                "tflops": flops / taken / 1e9,
            }
        return values

    @torch.inference_mode()
    def attention(self, rows: int) -> dict[str, Any]:
        """SDPA of all layers, by each of torch's backends, with and without a mask of keys."""
        spec = self.spec
        q = torch.randn((1, rows, spec.n_heads, spec.head_dim), device=self.device).to(self.dtype).transpose(1, 2)
        mask = (torch.arange(self.length, device=self.device) < self.length - 8)[None, None, None]
        values: dict[str, Any] = {"rows": rows}
        for name, backend in BACKENDS.items():
            for masked, given in (("", None), (" masked", mask)):
                work = functools.partial(_attend_all, q, self.model.cache, given, backend)
                try:
                    taken = clock.seconds(clock.graph_of(work, self.device), self.device, budget=0.3)
                except RuntimeError as error:  # a backend that does not take this
                    values[name + masked] = str(error).splitlines()[0][:200]
                    if not parts.gpu_is_well():
                        raise parts.Incomplete(values, error) from None
                else:
                    values[name + masked] = {"us_each": 1e3 * clock.spread(taken)["ms"] / spec.n_layers}
        return values


def _every(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def _attend_all(q: torch.Tensor, caches: torch.Tensor, mask: torch.Tensor | None, backend: SDPBackend | None) -> None:
    for k, v in caches:
        if backend is None:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def every_part() -> dict[str, Callable[[], dict[str, Any]]]:
    bench = Bench(parts.is_toy())
    rows = [n for n in ROWS if n <= bench.length]
    found: dict[str, parts.Part] = {"ceilings": bench.ceilings}
    found |= {f"{n} rows": functools.partial(bench.step, n) for n in (128, *rows) if n <= bench.length}
    found["full"] = functools.partial(bench.step, bench.length)
    found["vanilla"] = bench.vanilla
    found |= {f"products, {n} rows": functools.partial(bench.products, n) for n in (*rows, bench.length)}
    found["profile"] = functools.partial(bench.profile, min(128, bench.length))
    # last: a backend that fails in a capture may take the process with it
    found |= {
        f"attention, {n} rows": functools.partial(bench.attention, n) for n in (min(128, bench.length), bench.length)
    }
    found["clocks"] = smi
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
