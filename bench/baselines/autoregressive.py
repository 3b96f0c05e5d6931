"""An autoregressive model at LLaMA-3-8B's sizes, greedy, at batch 1: transformers' LlamaForCausalLM and static cache.

Weights are random, so only the times are meaningful, not the tokens. On CUDA the decode step is replayed
from a CUDA graph, where one can be captured; :attr:`Generated.captured` says whether it was. Needs transformers 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama; the defaults are LLaMA-3-8B's. Fields are named as in transformers' LlamaConfig."""

    num_hidden_layers: int = 32
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    intermediate_size: int = 14336
    vocab_size: int = 128256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0

    def config(self) -> Any:
        """Transformers' own configuration; attention by SDPA."""
        sizes = asdict(self)
        theta = sizes.pop("rope_theta")
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        rope = {"rope_type": "default", "rope_theta": theta}
        return _transformers().LlamaConfig(**sizes, **ids, rope_parameters=rope, tie_word_embeddings=False)


LLAMA_3_8B = Geometry()
TOY = Geometry(2, 64, 4, 2, 128, 256, 512)


class Generated(NamedTuple):
    """Generated tokens (the first comes from prefill), and the seconds of prefill and of each later token."""

    tokens: list[int]
    prefill_seconds: float
    token_seconds: list[float]
    captured: bool  # whether tokens came from a CUDA graph
    reason: str  # why not


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the autoregressive baseline needs transformers: pip install 'transformers>=5'") from error
    return transformers


def build(geometry: Geometry, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A ``LlamaForCausalLM`` of random weights, made on ``device`` in ``dtype``: no copy on the host, none wider."""
    device = torch.device(device)
    transformers, devices = _transformers(), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(seed)
        config = geometry.config()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


class Decoder:
    """A model, its static cache of ``length`` positions, and one decode step, set up once.

    Args:
        capture: replay the step from a CUDA graph; only tried on CUDA.
    """

    def __init__(self, model: Any, length: int, capture: bool = True):
        self.model, self.device = model, model.device
        self.cache = _transformers().StaticCache(config=model.config, max_cache_len=length)
        self.length = length
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        self.position = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        self._places = torch.arange(length, device=self.device)
        self.step: Callable[[], None] = self._step
        self.captured, self.reason = False, "not asked for" if not capture else f"on {self.device.type}"
        if capture and self.device.type == "cuda":
            self._try_capture()

    def prefill(self, prompt: list[int]) -> None:
        """Start anew; ``token [1, 1]`` is then the most likely one after the prompt."""
        self.cache.reset()
        ids = torch.tensor([prompt], device=self.device)
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.fill_(len(prompt))

    def _step(self) -> None:
        """Feed ``token`` and put the next one in its place. Reads nothing back to the host."""
        seen = (self._places <= self.position)[None, None]
        out = self.model(
            self.token,
            attention_mask=seen,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def _tokens(self, n: int) -> list[int]:
        """Return the first tokens after a fixed prompt, by the current step function."""
        self.prefill([1, 2, 3])
        found = []
        for _ in range(n):
            self.step()
            found.append(int(self.token))
        return found

    @torch.no_grad()
    def _try_capture(self) -> None:
        """Capture the step, and take the graph if it decodes as the step does; else stay as it was, and say why."""
        try:
            eager = self._tokens(3)  # also loads what a capture must not
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
            self.step = graph.replay
            self.captured, self.reason = self._tokens(3) == eager, "its tokens differ"
        except Exception as error:  # a new release may do in a step what cannot be captured: slower, but a figure
            self.reason = f"{type(error).__name__}: {error}"
        if not self.captured:
            self.step = self._step

    def _seconds(self, act: Callable[[], None]) -> float:
        """Time ``act``, including the device's work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        act()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    @torch.no_grad()
    def generate(self, prompt: list[int], n: int) -> Generated:
        """``n`` greedy tokens. No end-of-text ends it early.

        Raises:
            ValueError: names the argument that does not fit.
        """
        if n < 1:
            raise ValueError(f"n={n!r} is not positive")
        if not prompt or len(prompt) + n - 1 > self.length:
            raise ValueError(f"prompt of {len(prompt)} and n={n!r} do not fit a cache of {self.length} positions")
        prefill = self._seconds(lambda: self.prefill(prompt))
        tokens, seconds = [int(self.token)], []
        for _ in range(n - 1):
            seconds.append(self._seconds(self.step))
            tokens.append(int(self.token))
        return Generated(tokens, prefill, seconds, self.captured, "" if self.captured else self.reason)
