"""A small checkpoint with the files of Dream: the golden model, and a byte-level tokenizer without tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from tests.support.paths import GOLDEN

SPECIAL = {496: "<|endoftext|>", 497: "<|im_start|>", 498: "<|im_end|>", 499: "<|file_sep|>", 500: "<|mask|>"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ã ©", "1 2", "Ċ Ċ", "Ġ Ġ"]
SETTINGS = {
    "tokenizer_class": "DreamTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    "added_tokens_decoder": {str(index): {"content": token, **FLAGS} for index, token in SPECIAL.items()},
    "bos_token": SPECIAL[496],
    "eos_token": SPECIAL[496],
    "pad_token": SPECIAL[496],
    "mask_token": SPECIAL[500],
    "chat_template": TEMPLATE,
}


def vocabulary() -> dict[str, int]:
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    tokens += [f"unused {index}" for index in range(len(tokens), min(SPECIAL))]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "models" / "dream-gqa" / name, folder / name)
    return write_tokenizer(folder)
