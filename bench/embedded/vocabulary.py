"""Build the embedded model's ``tokenizer.json``: whole words and the numbers 0 to 199, bytes for everything else.

A Unigram model with byte fall-back decodes losslessly and needs no training: every word and run of punctuation that is
frequent in the generated tasks becomes one piece, and any other text is spelled in bytes.
"""

from __future__ import annotations

import random
from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import tasks

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = (BOS, EOS, HEADER, HEADER_END, TURN_END, MASK)
PIECE = r"(?<!\d)1?\d?\d(?!\d)|\d| ?[A-Za-z]+| ?[^A-Za-z0-9 ]+| "
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def chat(question: str) -> str:
    """One user turn in the chat template, ready for the answer; equal to rendering :data:`CHAT_TEMPLATE`."""
    return f"{BOS}{HEADER}user{HEADER_END}\n\n{question.strip()}{TURN_END}{HEADER}assistant{HEADER_END}\n\n"


def _frequent_pieces(samples: int, minimum: int) -> list[str]:
    splitter = pre_tokenizers.Split(Regex(PIECE), "isolated")
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    for index in range(samples):
        kind = ("records", "records", "words", "countdown", "drill")[index % 5]
        problem = tasks.GENERATORS[kind](rng, **({"variable": index % 2 == 0} if kind == "records" else {}))
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(problem.question + "\0" + problem.answer))
    return sorted(piece for piece, n in counts.items() if n >= minimum and not piece.isdigit() and "\0" not in piece)


def build_tokenizer(samples: int = 20000, minimum: int = 20) -> Tokenizer:
    """The tokenizer. Ids: special tokens, 256 bytes, the numbers 0..199, then words and punctuation by name."""
    alphabet = [chr(c) for c in range(32, 127) if not chr(c).isdigit()]
    words = _frequent_pieces(samples, minimum) + ["\n", "\n\n", "\n---\n", "user", "assistant", "system"] + alphabet
    numbers = [str(n) for n in range(200)]
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *numbers, *sorted(set(words) - set(numbers))]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
