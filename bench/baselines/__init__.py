"""Baselines: the published samplers in straightforward, batch-1, eager PyTorch, written here from their descriptions.

    model = PlainModel(sfs_triton.load(folder, "cuda", "bfloat16").model)
    done = BASELINES["slowfast"].decode(model, prompt, 256, SlowFast())

``tests/bench/test_baselines.py`` holds them to the recordings of the public implementations, token for token and
forward for forward. Where an original does more than its result needs, they do without, to be no slower than it:
``has`` and ``lacks`` name every optimisation that they have or lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import dllm_cache, fast_dllm, slowfast, vanilla
from .model import Decoded, PlainModel

__all__ = ["AUTOREGRESSIVE", "About", "BASELINES", "Baseline", "Decoded", "PlainModel"]


@dataclass(frozen=True, kw_only=True)
class About:
    """Description of a baseline: paper, mirrored code, and the optimisations it has or lacks."""

    name: str
    what: str
    has: tuple[str, ...]
    lacks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline(About):
    """Decoder of a masked canvas: ``decode(model, prompt, gen_length, sampler)``.

    ``decode`` raises a ValueError that names the sampler's option that is not implemented.
    """

    decode: Callable[..., Decoded]


_HAS = (
    "the weights' own dtype, bfloat16 or float32",
    "SDPA without a mask, grouped heads as they are",
    "one product for q, k and v and one for gate and up (the originals: five)",
    "RMSNorm as one operation of torch (the originals: about six)",
    "tokens as the argmax of the logits (no exponentials, no noise)",
    "inference mode",
)
_LACKS = (
    "heads only where a decision looks: logits, argmax and softmax are of every forwarded position",
    "a last layer only where a decision looks",
    "early stop at end-of-text",
    "CUDA graphs, torch.compile and fused kernels of its own",
    "batches",
)
_SLOWFAST_HAS = (
    "truncated forwards in the fast stage after its first step",
    "parallel filling over confidence thresholds",
    "a softmax in the logits' dtype",
    "at most four host reads in a slow step, two in a fast one and two more per cycle (the original: more)",
)
_VANILLA_HAS = (
    "a softmax in the logits' dtype (the original's first versions: float64)",
    "one host read per block (the original: at least one per step)",
)
_FEATURES_HAS = (
    "prompt and response features that are kept, and recomputed at intervals",
    "between them, only the response positions whose values moved most",
    "keys that are kept rotated (the original rotates all of them in every forward)",
)
_FAST_DLLM_HAS = (
    "parallel filling over a confidence threshold",
    "a threshold that is compared on the device, one host read per step (the original: one per candidate)",
)
_KEPT_KEYS = "keys that are kept rotated (the original rotates all of them in every forward)"
_DOUBLE = "a softmax in less than float64, which the original takes"
_REPEATED = "sparing a second forward to a block that its first has filled (the original's later versions do)"

_EVERY = (
    Baseline(
        name="vanilla",
        what="LLaDA's low-confidence remasking (arXiv 2502.09992; ML-GSAI/LLaDA, generate.py); takes FixedSteps",
        has=(*_HAS, *_VANILLA_HAS),
        lacks=("caches", "truncated forwards", "parallel filling", *_LACKS),
        decode=vanilla.decode,
    ),
    Baseline(
        name="vanilla + dLLM-Cache",
        what="LLaDA's sampler over dLLM-Cache's features (arXiv 2506.06295; the hooks in "
        "LiangrunFlora/Slow-Fast-Sampling); takes FixedSteps",
        has=(*_HAS, *_VANILLA_HAS, *_FEATURES_HAS),
        lacks=("truncated forwards", "parallel filling", *_LACKS),
        decode=dllm_cache.decode,
    ),
    Baseline(
        name="slowfast",
        what="SlowFast Sampling (arXiv 2506.10848; LiangrunFlora/Slow-Fast-Sampling), as the paper, its code for LLaDA "
        "or its code for Dream has it; takes SlowFast",
        has=(*_HAS, *_SLOWFAST_HAS),
        lacks=("caches", *_LACKS),
        decode=slowfast.decode,
    ),
    Baseline(
        name="slowfast + dLLM-Cache",
        what="SlowFast Sampling over dLLM-Cache's features (arXiv 2506.10848 and 2506.06295; "
        "LiangrunFlora/Slow-Fast-Sampling); takes SlowFast",
        has=(*_HAS, *_SLOWFAST_HAS, *_FEATURES_HAS),
        lacks=_LACKS,
        decode=dllm_cache.decode,
    ),
    Baseline(
        name="fast-dllm",
        what="Fast-dLLM's parallel decoding without a cache (arXiv 2505.22618; NVlabs/Fast-dLLM, llada/generate.py); "
        "takes Threshold or FixedSteps",
        has=(*_HAS, *_FAST_DLLM_HAS),
        lacks=("caches", "truncated forwards", _DOUBLE, *_LACKS),
        decode=fast_dllm.decode,
    ),
    Baseline(
        name="fast-dllm prefix",
        what="Fast-dLLM with its prefix cache, on LLaDA (arXiv 2505.22618; NVlabs/Fast-dLLM, llada/generate.py); "
        "takes Threshold or FixedSteps",
        has=(*_HAS, *_FAST_DLLM_HAS, "keys and values of what precedes the block, written in place", _KEPT_KEYS),
        lacks=("keys and values of what follows the block", _DOUBLE, _REPEATED, *_LACKS),
        decode=partial(fast_dllm.decode, cache="prefix"),
    ),
    Baseline(
        name="fast-dllm dual",
        what="Fast-dLLM with its dual cache, on LLaDA (arXiv 2505.22618; NVlabs/Fast-dLLM, llada/generate.py); "
        "takes Threshold or FixedSteps",
        has=(*_HAS, *_FAST_DLLM_HAS, "keys and values of all but the block, the block's replaced in place", _KEPT_KEYS),
        lacks=(_DOUBLE, _REPEATED, *_LACKS),
        decode=partial(fast_dllm.decode, cache="dual"),
    ),
)
BASELINES = {baseline.name: baseline for baseline in _EVERY}

AUTOREGRESSIVE = About(
    name="autoregressive",
    what="greedy decoding at LLaMA-3-8B's sizes by transformers' LlamaForCausalLM (bench/baselines/autoregressive.py)",
    has=(
        "the weights' own dtype, bfloat16 or float32",
        "SDPA",
        "a static cache of keys and values",
        "logits of the last position only",
        "on CUDA, a decode step replayed from a CUDA graph, where one can be captured (Generated.captured)",
        "no read by the host within a step",
    ),
    lacks=(
        "attention to the filled part of the cache only: it spans all of it, under a mask",
        "one product for q, k and v, and for gate and up",
        "torch.compile and fused kernels",
        "speculative decoding",
        "quantisation",
        "batches",
        "early stop at end-of-text",
    ),
)
