"""Arguments of the published evaluation scripts, and what to use for them here.

The scripts are those of LLaDA, Dream, Fast-dLLM, dLLM-Cache and SlowFast Sampling.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...decoding.params import check_options
from ...errors import ArgumentError

_LENGTH = "here it is max_gen_toks"
_STEPS = "here it is an option of sampler=fixed"
_LIKELIHOOD = "leave it out: how likelihoods are estimated is likelihood=monte-carlo or likelihood=confidence"
_CODE = "leave it out: no code of a checkpoint is run"
_COSTS = "leave it out: costs are always printed, and --output_path keeps them and the answers"
_GUIDANCE = "leave it out: guidance is cfg_scale, and its two branches share their cache"
REFERENCE = {
    # models
    "model_path": "here it is pretrained",
    "mask_id": "here it is mask_token_id",
    "lora_path": "here it is adapter",
    "adapter_path": "here it is adapter",
    "peft": "here it is adapter",
    "trust_remote_code": _CODE,
    "parallelize": "here it is tensor_parallel, a number of ranks",
    # lengths and prompts
    "gen_length": _LENGTH,
    "max_new_tokens": _LENGTH,
    "max_prompt_len": "here it is max_length, with truncation=True",
    "escape_until": "leave it out: stop strings are taken as they are",
    # samplers
    "steps": _STEPS,
    "diffusion_steps": "here it is steps, an option of sampler=fixed",
    "remasking": "leave it out: low_confidence is sampler=fixed",
    "alg": "here it is metric, an option of sampler=fixed (maskgit_plus, topk_margin, entropy, origin); "
    "confidence_threshold is sampler=threshold",
    "alg_temp": "leave it out: positions are drawn only by sampler=fixed,metric=origin",
    "threshold": "here it is tau, an option of sampler=threshold",
    "factor": "leave it out: the threshold of sampler=threshold is tau, a fixed number",
    "block_size": "here it is block_length",
    "cfg": "here it is cfg_scale",
    "early_stop": "here it is eos_stop",
    "cycle_len_confidence_threshold": "here it is tau_min, an option of sampler=slowfast",
    "high_confidence_threshold": "here it is tau_high, an option of sampler=slowfast",
    "k_exploration_steps": "here it is k_max, an option of sampler=slowfast",
    "cycle_length_stability_window": "here it is window, an option of sampler=slowfast",
    "cycle_length_stability_std_dev_threshold": "here it is spread_limit, an option of sampler=slowfast",
    "max_sub_cycles_per_block": "here it is max_cycles, an option of sampler=slowfast",
    # caches
    "use_cache": "here it is cache=prefix, or cache=dual for both sides of the block",
    "dual_cache": "here it is cache=dual",
    "is_feature_cache": "here it is cache=refresh",
    "prompt_interval_steps": "here it is prompt_interval, an option of cache=refresh",
    "gen_interval_steps": "here it is response_interval, an option of cache=refresh",
    "transfer_ratio": "here it is ratio, an option of cache=refresh",
    "is_cfg_cache": _GUIDANCE,
    "cfg_interval_steps": _GUIDANCE,
    # likelihoods and reports
    "is_check_greedy": "here it is check_greedy",
    "classifier_free_guidance": "here it is cfg_scale, 0 without guidance",
    "nll_type": _LIKELIHOOD,
    "log_type": _LIKELIHOOD,
    "sampling_eps": _LIKELIHOOD,
    "show_speed": _COSTS,
    "save_dir": _COSTS,
}


def check_known(owner: str, options: Iterable[str], allowed: set[str]) -> None:
    """Raise ArgumentError for an option that ``owner`` does not have; one of another script's says what to use here."""
    for name in options:
        if name not in allowed and name in REFERENCE:
            raise ArgumentError(f"{owner} has no option {name!r}: {REFERENCE[name]}")
    check_options(owner, options, allowed)
