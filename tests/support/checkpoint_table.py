"""The table of docs/checkpoints.md: what was checked for each checkpoint, and the tests that check it.

``python -m tests.support.checkpoint_table`` prints it.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    checkpoint: str
    family: str
    checked: str
    tests: tuple[str, ...]  # file under tests/, and function


NAMES, FAMILIES = "models/test_names.py", "models/test_families.py"
LOGITS = ("models/test_checkpoints.py::test_logits_equal_the_recorded_ones",)
INDEX = (f"{NAMES}::test_the_published_indices_hold_what_their_configurations_say",)
FORWARD = (f"{FAMILIES}::test_logits_equal_those_of_an_independent_forward",)
ROWS = (
    Row(
        "LLaDA-8B-Base, -Instruct",
        "LLaDA",
        "published `config.json` and index (all names of tensors); logits of small models, by the original code",
        (*LOGITS, *INDEX),
    ),
    Row(
        "Dream-v0-Base-7B, -Instruct-7B",
        "Dream",
        "the same; published tokenizer files (no `tokenizer.json`): every recorded id",
        (*LOGITS, *INDEX, "text/test_byte_level.py::test_the_published_files_give_the_recorded_ids"),
    ),
    Row(
        "iLLaDA-8B",
        "iLLaDA",
        "a small model with the publicly described keys, against an independent forward; its files were not seen",
        (*FORWARD, f"{FAMILIES}::test_what_the_families_say"),
    ),
    Row(
        "LLaDA-1.5, d3LLM-LLaDA, dParallel-LLaDA",
        "LLaDA",
        "as LLaDA-8B, whose configuration and names they keep; their own files were not seen",
        LOGITS,
    ),
    Row(
        "DiffuCoder-7B, Dream-Coder-7B, d3LLM-Dream, d3LLM-Coder, dParallel-Dream",
        "Dream",
        "as Dream-7B; their own files were not seen",
        LOGITS,
    ),
    Row(
        "Tiny-A2D: Qwen3-0.6B, Qwen2.5-Coder-0.5B (`mdlm`)",
        "Tiny-A2D",
        "small models of both, with dllm's configuration names, against an independent forward; every cache policy",
        (*FORWARD, f"{FAMILIES}::test_heads_are_normalised_under_every_cache_policy"),
    ),
    Row(
        "LLaDA-V and others with a vision tower",
        "as their language model",
        "the language model of small models with a tower, which is left to transformers; their own files were not seen",
        (
            f"{NAMES}::test_a_tower_beside_the_language_model_is_left_alone",
            "integrations/test_transformers.py::test_a_vision_tower_stays_and_its_projector_feeds_the_engine",
        ),
    ),
    Row(
        "LoRA adapters of PEFT",
        "any",
        "equal to a merge written out and to PEFT's own, to 1e-5",
        ("models/test_adapters.py::test_an_adapter_is_merged", "models/test_adapters.py::test_pefts_own_merge"),
    ),
    Row(
        "GGUF: F32, F16, BF16, Q4_0 to Q8_0, K-quants, IQ4",
        "LLaDA, Dream",
        "small models written by the package `gguf`, against a folder of the same numbers; one file by others",
        (
            "models/test_gguf.py::test_every_written_type_is_decoded",
            "models/test_gguf.py::test_types_that_can_only_be_read",
            "models/test_gguf.py::test_a_file_that_others_wrote",
        ),
    ),
    Row(
        "GPTQ, AWQ (GEMM), compressed-tensors (pack-quantized), all in 4 bits",
        "any",
        "small models packed by the tests: equal values; public files were not seen. `desc_act` is refused by name",
        ("models/test_packed.py::test_values_are_those_that_were_packed",),
    ),
    Row(
        "the same in other bits or layouts, bitsandbytes, fp8",
        "any",
        "refused by name, from `config.json` or from the tensors",
        (
            f"{NAMES}::test_quantised_tensors_are_refused_by_name",
            f"{NAMES}::test_codes_without_scales_are_refused",
            f"{FAMILIES}::test_what_changes_the_computation_is_refused_by_name",
            "models/test_packed.py::test_configurations_are_refused_by_key",
        ),
    ),
    Row(
        "SDAR, LLaDA2, Fast_dLLM, DreamReasoner, `block_size`; mixtures of experts",
        "none",
        "refused by name",
        (f"{FAMILIES}::test_what_changes_the_computation_is_refused_by_name",),
    ),
)


def table() -> str:
    lines = ["| checkpoint | family | what was checked |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.checkpoint} | {row.family} | {row.checked} |" for row in ROWS)])


if __name__ == "__main__":
    print(table())
