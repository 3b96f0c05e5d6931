"""Byte-level BPE tokenizers from their parts: vocabulary, merges and added tokens. No code of a checkpoint runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError, check_flag, check_integer
from ..files import lfs_hint, read_json

MOST_TOKENS = 2**20
MOST_BYTES = 64 * 2**20  # of a tokenizer's file
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Words of a text, which merges do not cross.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLADA = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = {  # by the names that GGUF files give them
    **{"qwen2": (QWEN2,), "gpt-2": (GPT2,), "smollm": (r"\p{N}", GPT2)},
    **dict.fromkeys(("llada", "llada-moe", "bailingmoe", "bailingmoe2"), (LLADA,)),
    "llama-bpe": (QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),),
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF's types of tokens


def read_qwen2(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of Qwen2 and Dream from ``vocab.json``, ``merges.txt`` and the tokens of ``config``.

    ``config`` is the parsed ``tokenizer_config.json``; without ``added_tokens_decoder`` in it, ``added_tokens.json``
    has the added tokens.

    Raises:
        CheckpointError: names the file and field at fault.
    """
    kind = config.get("tokenizer_class", "Qwen2Tokenizer")
    if kind not in ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and its tokenizer_class={kind!r} is not one that can be built from "
            "vocab.json and merges.txt: save it with transformers' save_pretrained of the fast tokenizer"
        )
    for name in ("vocab.json", "merges.txt"):
        check_size_of(folder / name)
    vocab = read_json(folder / "vocab.json")
    if not isinstance(vocab, Mapping):
        raise CheckpointError(f"{folder / 'vocab.json'} holds a {type(vocab).__name__}, not an object")
    return byte_level(
        vocab,
        _merges(folder / "merges.txt"),
        _added(folder, config),
        patterns=[QWEN2],
        vocab_from=str(folder / "vocab.json"),
        merges_from=str(folder / "merges.txt"),
        normalizer=normalizers.NFC(),
    )


def read_gguf(path: Path, get: Callable[..., Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata hold; ``get(key, type)`` reads one of them.

    Raises:
        CheckpointError: names the key at fault.
    """
    at = f"{path}: tokenizer.ggml."
    kind, words = get("tokenizer.ggml.model", str), get("tokenizer.ggml.pre", str)
    if kind != "gpt2":
        raise CheckpointError(f"{at}model={kind!r} is not supported, only 'gpt2'")
    if words not in WORDS:
        raise CheckpointError(f"{at}pre={words!r} is not supported, only {', '.join(WORDS)}")
    tokens, types, merges = (get(f"tokenizer.ggml.{key}", list, []) for key in ("tokens", "token_type", "merges"))
    for key, values, each in (("tokens", tokens, str), ("token_type", types, int), ("merges", merges, str)):
        if not all(isinstance(value, each) for value in values):
            raise CheckpointError(f"{at}{key} does not hold {each.__name__} values")
    if len(types) != len(tokens):
        raise CheckpointError(f"{at}token_type has {len(types)} values for {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    added = []
    for index, (token, sort) in enumerate(zip(tokens, types, strict=True)):
        if sort in (CONTROL, USER_DEFINED):
            added.append((index, AddedToken(token, normalized=False, special=sort == CONTROL)))
        elif sort != UNUSED and vocab.setdefault(token, index) != index:
            raise CheckpointError(f"{at}tokens: {token!r} has the ids {vocab[token]} and {index}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise CheckpointError(f"{at}merges: {wrong[:80]!r} is not two parts of a token")
    return byte_level(
        vocab,
        pairs,
        added,
        patterns=WORDS[words],
        vocab_from=f"{at}tokens",
        merges_from=f"{at}merges",
        normalizer=normalizers.NFC() if words == "qwen2" else None,
    )


def byte_level(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: Iterable[tuple[int, AddedToken]],
    *,
    patterns: Sequence[str],
    vocab_from: str,
    merges_from: str,
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Build a byte-level BPE tokenizer. ``patterns`` split a text into words, one after another; ``vocab_from`` and
    ``merges_from`` name the sources in errors."""
    ids: dict[int, str] = {}
    for token, index in vocab.items():
        check_integer(f"{vocab_from}: id of {token!r}", index, 0, MOST_TOKENS, CheckpointError)
        if ids.setdefault(index, token) != token:
            raise CheckpointError(f"{vocab_from}: {ids[index]!r} and {token!r} have the same id {index}")
    vocab, added = dict(vocab), sorted(added, key=lambda one: one[0])
    for index, token in added:  # in the vocabulary they get their own ids, whatever is missing between them
        known = vocab.get(token.content, index)
        if known != index or ids.setdefault(index, token.content) != token.content:
            raise CheckpointError(
                f"{vocab_from}: the added token {token.content!r} has id {index}, which does not go with "
                f"{ids.get(index)!r} there or its other id {known}"
            )
        vocab[token.content] = index
    if len(merges) > len(vocab):
        raise CheckpointError(f"{merges_from}: {len(merges):,} merges for a vocabulary of {len(vocab):,} tokens")
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{merges_from} does not go with {vocab_from}: {error}") from None
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([token for _, token in added])
    return tokenizer


def check_size_of(path: Path) -> None:
    """Refuse a tokenizer's file that is absent, a pointer, or of more than :data:`MOST_BYTES`, before it is read."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    if (hint := lfs_hint(path)) is not None:
        raise CheckpointError(f"{path} cannot be read: {hint}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, over {MOST_BYTES:,}: not a tokenizer's file")


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or number == 1 and line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{path}: line {number} is {line[:80]!r}, not two parts of a token")
        merges.append((pair[0], pair[1]))
    return merges


def _added(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Read the added tokens and their ids."""
    decoder, path = config.get("added_tokens_decoder"), folder / "tokenizer_config.json"
    if decoder is None and (folder / "added_tokens.json").is_file():
        path = folder / "added_tokens.json"
        listed = read_json(path)
        named = listed if isinstance(listed, Mapping) else {"": listed}
        decoder = {str(index): {"content": token, "special": True} for token, index in named.items()}
    if not isinstance(decoder or {}, Mapping):
        raise CheckpointError(f"{path}: added_tokens_decoder is a {type(decoder).__name__}, not an object")
    added = []
    for key, token in (decoder or {}).items():
        content = token.get("content") if isinstance(token, Mapping) else None
        if not key.isdecimal() or len(key) > 8 or not isinstance(content, str) or not content:
            raise CheckpointError(f"{path}: added token {key[:40]!r} is not an id with a text 'content'")
        flags = {flag: token[flag] for flag in FLAGS if flag in token}
        for flag, value in flags.items():
            check_flag(f"{path}: {flag} of {content!r}", value, CheckpointError)
        added.append((int(key), AddedToken(content, **{"normalized": False, **flags})))
    return added
