"""transformers: registered classes, engines on a loaded model's weights, and ``generate(custom_generate=...)``."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextIteratorStreamer,
)

import sfs_triton  # noqa: E402
from sfs_triton import ArgumentError, CheckpointError, FixedSteps, SlowFast, Threshold  # noqa: E402
from sfs_triton.integrations import transformers as integration  # noqa: E402
from sfs_triton.integrations.transformers import engines as engines_of  # noqa: E402
from sfs_triton.models import read_spec  # noqa: E402
from tests.support.margins import assert_logits_close  # noqa: E402
from tests.support.paths import GOLDEN, MODELS, ROOT  # noqa: E402

EMBEDDED = Path(sfs_triton.__file__).parent / "embedded"
RECORDS = "id,name,age\n1,Ann,31\n2,Bob,45"
ILLADA = {
    "model_type": "illada",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "mask_token_id": 5,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "hidden_act": "silu",
    "attention_bias": True,
}

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def _load(name, auto=AutoModelForMaskedLM, **options):
    return auto.from_pretrained(GOLDEN / "models" / name, **options).eval()


def _illada():
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(**ILLADA)).eval()


@pytest.fixture(scope="module")
def models():
    """Accelerated models that no test changes."""
    loaded = {name: _load(name) for name in MODELS}
    for model in loaded.values():
        sfs_triton.accelerate(model)
    return loaded


@pytest.fixture(scope="module")
def records():
    """The embedded model and its tokenizer, as transformers loads them."""
    model = AutoModelForMaskedLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED)


# ----------------------------------------------------------------------------------------------- registered classes


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_recorded_ones(engines, models, name):
    recorded = load_file(GOLDEN / "logits" / f"{name}.safetensors")
    for index in {key.split(".")[0] for key in recorded}:
        ids = recorded[f"{index}.input_ids"]
        with torch.no_grad():
            logits = models[name](ids).logits
        assert_logits_close(logits, recorded[f"{index}.logits"])
        assert_logits_close(logits, engines[name].model.logits(ids))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "accelerated"])
def test_what_is_saved_is_what_was_loaded(tmp_path, name, shared):
    model, given = _load(name), GOLDEN / "models" / name
    if shared:
        sfs_triton.accelerate(model)
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "model.safetensors") for folder in (given, tmp_path))
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert tensor.numpy().tobytes() == new[key].numpy().tobytes(), key
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, given))
    assert read_spec(written) == read_spec(read)
    ours = {"dtype", "torch_dtype", "transformers_version", "use_cache"}  # written anew, or left to generation_config
    assert {k: v for k, v in written.items() if k not in ours} == {k: v for k, v in read.items() if k not in ours}
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.architectures == read["architectures"]


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("name", ["llada-mha", "dream-gqa"])
def test_an_auto_map_is_never_followed_and_nobody_is_asked(monkeypatch, name, trust, auto):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("transformers asked about remote code"))
    model = _load(name, auto, trust_remote_code=trust)
    assert type(model).__module__ == "sfs_triton.integrations.transformers.models"
    assert "auto_map" in json.loads((GOLDEN / "models" / name / "config.json").read_text())


def test_a_configuration_answers_to_the_usual_names():
    config = AutoConfig.from_pretrained(GOLDEN / "models" / "llada-gqa")
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (128, 2, 2)
    config.num_hidden_layers = 1
    assert config.n_layers == 1 and "num_hidden_layers" not in config.to_dict()
    with pytest.raises(AttributeError, match="nothing"):
        _ = config.nothing
    assert AutoModelForMaskedLM.from_config(config).get_input_embeddings().weight.shape == (512, 128)


def test_what_is_not_computed_is_refused_when_a_model_is_made(checkpoint, edit_config):
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    config = AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(sfs_triton.UnsupportedConfigError, match=r"only sfs_triton\.load takes weights in 4 bits"):
        AutoModelForMaskedLM.from_config(config)
    edit_config(checkpoint, quantization_config=None, rope_scaling={"type": "linear", "factor": 2})
    with pytest.raises(sfs_triton.UnsupportedConfigError, match="rope_scaling"):
        AutoModelForMaskedLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("model_type", ["illada", "llada"])
def test_a_tied_head(tmp_path, model_type):
    model = _illada()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embedding and model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    engine, loaded = sfs_triton.accelerate(again), sfs_triton.load(tmp_path, "cpu", "float32")
    assert engine.model.weights.head is engine.model.weights.embedding
    assert engine.generate([7, 8, 9], gen_length=16).canvas == loaded.generate([7, 8, 9], gen_length=16).canvas
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_llada_with_a_tied_head(tmp_path):
    config = AutoConfig.from_pretrained(GOLDEN / "models" / "llada-mha")
    config.weight_tying = True
    model = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    assert sfs_triton.load(tmp_path, "cpu").spec.tied_head


@pytest.mark.parametrize("name", ["llada-gqa", "dream-gqa"])
def test_loss_and_gradients(name):
    model, ids = _load(name).train(), torch.arange(24).view(2, 12)
    labels = torch.where(ids % 3 == 0, ids, -100)
    out = model(ids, labels=labels)
    places = (labels >= 0).nonzero().tolist()
    if model.spec.shifted:
        places = [(index, at) for index, at in places if at]
    logits = [out.logits[index, at - model.spec.shifted] for index, at in places]
    wanted = nn.functional.cross_entropy(torch.stack(logits), torch.stack([labels[index, at] for index, at in places]))
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    assert all(grad.abs().max() > 0 for key, grad in plain.items() if not key.endswith("k_proj.bias"))
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=labels).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], msg=lambda text, key=key: f"{key}: {text}")


def test_padding_is_looked_at_by_none(models):
    ids, model = torch.arange(3, 15)[None], models["llada-gqa"]
    padded = torch.cat((torch.full((1, 4), 496), ids), 1)
    mask = torch.cat((torch.zeros(1, 4), torch.ones(1, 12)), 1).long()
    with torch.no_grad():
        plain, masked = model(ids).logits, model(padded, attention_mask=mask).logits[:, 4:]
        wide = model(padded, attention_mask=mask.bool()[:, None, None, :]).logits[:, 4:]
        (as_tuple,) = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
    assert_logits_close(masked, plain)
    assert_logits_close(wide, masked)
    assert_logits_close(as_tuple, plain)
    with pytest.raises(ArgumentError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 128))


def test_more_tokens(tmp_path):
    model = _load("llada-mha")
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert sfs_triton.load(tmp_path, "cpu").spec.vocab_size == 520
    assert sfs_triton.accelerate(model).spec.vocab_size == 520


# ------------------------------------------------------------------------------------------------------- accelerate


def _memory(tensors):
    """Ranges of addresses that the tensors' storages take, those that touch joined."""
    storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    joined = []
    for begin, size in sorted(storages):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], begin + size)
        else:
            joined.append([begin, begin + size])
    return joined


def _bytes(tensors):
    return sum(end - begin for begin, end in _memory(tensors))


def _engine_tensors(engine):
    weights = engine.model.weights
    layers = [getattr(layer, name) for layer in weights.layers for name in layer.__slots__]
    return [t for t in (weights.embedding, weights.norm, weights.head, *layers) if t is not None]


@pytest.mark.parametrize("name", [*MODELS, "illada"])
def test_no_weight_exists_twice(name):
    model = _illada() if name == "illada" else _load(name)
    before = _bytes(model.parameters())
    identities, values = list(map(id, model.parameters())), [p.clone() for p in model.parameters()]
    engine = sfs_triton.accelerate(model)
    mine = _memory(_engine_tensors(engine))
    assert mine == _memory(model.parameters()) and _bytes(model.parameters()) == before
    assert list(map(id, model.parameters())) == identities and all(p.requires_grad for p in model.parameters())
    for parameter, value in zip(model.parameters(), values, strict=True):
        torch.testing.assert_close(parameter.data, value.data, atol=0, rtol=0)
    again = sfs_triton.accelerate(model)
    assert _memory(_engine_tensors(again)) == mine


@pytest.mark.parametrize("name", ["llada-gqa", "dream-gqa"])
def test_each_parameter_is_read_by_the_engine_and_written_by_it(name):
    model, ids = _load(name), torch.arange(9)[None]
    engine = sfs_triton.accelerate(model)
    for key, parameter in model.named_parameters():
        if key.endswith("k_proj.bias"):  # adds the same to a query's every score
            continue
        kept = parameter.detach().clone()
        before = engine.model.logits(ids).clone()
        with torch.no_grad():
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
            logits = model(ids).logits
        assert not torch.equal(engine.model.logits(ids), before), key
        assert_logits_close(engine.model.logits(ids), logits)
        with torch.no_grad():
            parameter.copy_(kept)
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
        for tensor in _engine_tensors(engine):
            tensor.add_(1)
        for parameter, value in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.data, value + 1)


def test_each_parameter_can_be_saved_by_itself(tmp_path):
    """Savers treat tensors in one storage as copies of each other, or as views of something larger."""
    model = _load("llada-gqa")
    sfs_triton.accelerate(model)
    state = model.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    save_model(model, tmp_path / "model.safetensors")
    given = load_file(GOLDEN / "models" / "llada-gqa" / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == given.keys() and all(torch.equal(saved[key], given[key]) for key in given)


def test_training_changes_what_is_generated():
    model = _load("llada-mha")
    engine, ids = sfs_triton.accelerate(model), torch.arange(16)[None]
    before = engine.model.logits(ids)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    after = engine.model.logits(ids)
    assert not torch.equal(before, after)
    assert_logits_close(after, model(ids).logits.detach())


@pytest.mark.parametrize("cache", ["none", "region"])
@pytest.mark.parametrize("name", MODELS)
def test_generates_what_a_loaded_checkpoint_does(engines, models, name, cache):
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    engine = sfs_triton.accelerate(models[name])
    mine, wanted = (e.generate(prompts, gen_length=24, cache=cache) for e in (engine, engines[name]))
    assert [(one.canvas, one.nfe) for one in mine] == [(one.canvas, one.nfe) for one in wanted]


class _Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, mlp = config.d_model, config.mlp_hidden_size
        self.attn_norm, self.ff_norm = _Norm(width), _Norm(width)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ff_proj, self.up_proj = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(mlp, width, bias=False)


class _RemoteConfig:
    """Keys as attributes, nothing else: the config of a checkpoint's own code need not derive from transformers."""

    def __init__(self, **keys):
        self.__dict__.update(keys)

    def to_dict(self):
        return dict(self.__dict__)


class _Remote(nn.Module):
    """A stand-in for LLaDA's own class: its modules, but not its forward pass."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, nn.Module()
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "emb_drop": nn.Dropout(0.1),
            "blocks": nn.ModuleList(_Block(config) for _ in range(config.n_layers)),
            "ln_f": _Norm(config.d_model),
            "ff_out": nn.Linear(config.d_model, config.vocab_size, bias=False),
        }
        self.model.transformer = nn.ModuleDict(parts)


def _remote(**changes):
    folder = GOLDEN / "models" / "llada-mha"
    keys = {**json.loads((folder / "config.json").read_text()), **changes}
    model = _Remote(_RemoteConfig(**{k: v for k, v in keys.items() if v is not ...}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_the_class_of_a_checkpoints_own_code(engines):
    model = _remote()
    engine = sfs_triton.accelerate(model)
    assert _memory(_engine_tensors(engine)) == _memory(model.parameters())
    wanted = engines["llada-mha"].generate([1, 2, 3], gen_length=16)
    assert engine.generate([1, 2, 3], gen_length=16).canvas == wanted.canvas
    done = sfs_triton.custom_generate(model, torch.tensor([[1, 2, 3]]), gen_length=16)
    assert done.sequences[0].tolist() == [1, 2, 3, *wanted.tokens]


class _Rotary(nn.Module):
    """Has no parameter, but buffers."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("inv_freq", torch.arange(width // 2).float(), persistent=False)
        self.original_inv_freq = self.inv_freq


class _DreamLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        narrow = width // heads * config.num_key_value_heads
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, out in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
            self.self_attn.add_module(name, nn.Linear(width, out, bias=True))
        self.self_attn.o_proj = nn.Linear(width, width, bias=False)
        self.self_attn.rotary_emb = _Rotary(width // heads)
        for name in ("gate_proj", "up_proj"):
            self.mlp.add_module(name, nn.Linear(width, config.intermediate_size, bias=False))
        self.mlp.down_proj, self.mlp.act_fn = nn.Linear(config.intermediate_size, width, bias=False), nn.SiLU()
        self.input_layernorm, self.post_attention_layernorm = _Norm(width), _Norm(width)


class _RemoteDream(nn.Module):
    """A stand-in for Dream's own class, whose ``generate`` is not that of transformers."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model, self.vocab_size = config, nn.Module(), config.vocab_size
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.model.layers = nn.ModuleList(_DreamLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = _Norm(config.hidden_size)
        self.model.rotary_emb = _Rotary(config.hidden_size // config.num_attention_heads)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig(alg="entropy", steps=512, mask_token_id=config.mask_token_id)

    def generate(self, *args, **kwargs):
        raise AssertionError("Dream's own sampler was called")


@pytest.mark.parametrize("name", ["dream-gqa", "dream-r7"])
def test_dreams_own_class(engines, name):
    folder = GOLDEN / "models" / name
    model = _RemoteDream(_RemoteConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    engine, wanted = sfs_triton.accelerate(model), engines[name].generate([1, 2, 3], gen_length=16)
    assert _memory(_engine_tensors(engine)) == _memory(model.parameters())
    assert engine.generate([1, 2, 3], gen_length=16).canvas == wanted.canvas
    done = sfs_triton.custom_generate(model, torch.tensor([[1, 2, 3]]), gen_length=16)
    assert done.sequences[0].tolist() == [1, 2, 3, *wanted.tokens] and done.nfe.tolist() == [wanted.nfe]


def _lora(model):
    model.peft_config = {}


def _adapters(model):
    model._hf_peft_config_loaded = True


def _quantised(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


def _int8(model):
    model.model.transformer.ln_f.weight = nn.Parameter(torch.ones(64, dtype=torch.int8), requires_grad=False)


def _half(model):
    model.model.transformer.ln_f.half()


def _offloaded(model):
    model.model.transformer.blocks[1].to("meta")


def _classifier(model):
    model.score = nn.Linear(64, 2)


def _short(model):
    model.model.transformer.ln_f = _Norm(63)


def _fewer(model):
    del model.model.transformer.blocks[0].up_proj


def _no_config(model):
    model.config = None


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (_lora, ArgumentError, "_Remote with adapters.*merge_and_unload"),
        (_adapters, ArgumentError, "_Remote with adapters"),
        (_quantised, ArgumentError, "_Remote with quantised weights.*bitsandbytes"),
        (_int8, ArgumentError, r"ln_f\.weight has dtype torch\.int8"),
        (_half, ArgumentError, r"ln_f\.weight has dtype torch\.float16, others torch\.float32"),
        (_offloaded, ArgumentError, r"blocks\.1\..* is on the device 'meta'"),
        (_classifier, CheckpointError, r"_Remote has no place for parameters: score\.bias, score\.weight"),
        (_short, CheckpointError, r"ln_f\.weight has shape \[63\].*\[64\]"),
        (_fewer, CheckpointError, r"_Remote lacks parameters: .*blocks\.0\.up_proj\.weight"),
        (_no_config, ArgumentError, "_Remote without a config"),
    ],
)
def test_models_that_cannot_be_shared(change, error, text):
    model = _remote()
    change(model)
    kept = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
    with pytest.raises(error, match=text):
        sfs_triton.accelerate(model)
    assert kept == {key: parameter.data_ptr() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mask_token_id": ...}, "config of _Remote: lacks the required key 'mask_token_id'"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "_Remote: .*none of the families"),
        ({"alibi": True}, "_Remote: alibi=True"),
    ],
)
def test_configurations_that_cannot_be_used(changes, text):
    with pytest.raises(CheckpointError, match=text):
        sfs_triton.accelerate(_remote(**changes))


def test_ends_of_responses_are_those_of_the_checkpoint(records, monkeypatch):
    model, tokenizer = records
    assert sfs_triton.accelerate(model, tokenizer=tokenizer).spec == sfs_triton.load(EMBEDDED, "cpu").spec
    for ends, text in (([896], "generation_config: eos_token_id=896 is outside the vocabulary"), (5, "=5 is the mask")):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        with pytest.raises(CheckpointError, match=text):
            sfs_triton.accelerate(model, tokenizer=tokenizer)


def test_a_vision_tower_stays_and_its_projector_feeds_the_engine():
    model, plain = _illada(), _illada()
    model.model.vision_tower, model.model.mm_projector = nn.Linear(8, 16), nn.Linear(16, 64)
    model.model.image_newline = nn.Parameter(torch.zeros(64))
    engine = sfs_triton.accelerate(model)
    features = model.model.mm_projector(model.model.vision_tower(torch.randn(3, 8)))
    assert features.requires_grad
    ids, options = [7, 9, 9, 9, 11], {"gen_length": 16, "cache": "region"}
    found = engine.generate(ids, prompt_embeds=(range(1, 4), features), **options)
    assert found.canvas[:5] == ids
    table = plain.get_input_embeddings().weight
    with torch.no_grad():  # the same vectors as embeddings of ids
        table[100:103] = features
    plain.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    plain.config.tie_word_embeddings = False
    wanted = sfs_triton.accelerate(plain).generate([7, 100, 101, 102, 11], **options)
    assert (found.response, found.commit_step) == (wanted.response, wanted.commit_step)
    assert found.commit_step != engine.generate(ids, **options).commit_step
    model.model.adapter = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="has no place for parameters: model.adapter.bias, model.adapter.weight"):
        sfs_triton.accelerate(model)


def test_wrappers_and_other_things():
    model = _load("llada-mha")
    with pytest.raises(ArgumentError, match="DataParallel around a model: pass hf_model.module"):
        sfs_triton.accelerate(nn.DataParallel(model))
    with pytest.raises(ArgumentError, match="not a torch module"):
        sfs_triton.accelerate("GSAI-ML/LLaDA-8B-Instruct")
    with pytest.raises(ArgumentError, match="cuda_graphs='nonsense'"):
        sfs_triton.accelerate(model, cuda_graphs="nonsense")
    with pytest.raises(ArgumentError, match="tokenizer=3"):
        sfs_triton.accelerate(model, tokenizer=3)
    with pytest.raises(ArgumentError, match="a tokenizer goes into tokenizer=") as caught:
        sfs_triton.accelerate(model, AutoTokenizer.from_pretrained(EMBEDDED))
    assert len(str(caught.value)) < 200
    for wrong in (torch.tensor([1, 2]), [[1, 2]]):
        with pytest.raises(ArgumentError, match=r"is not a tensor of token ids \[B, L\]"):
            model.generate(wrong, max_new_tokens=4)
    with pytest.raises(ArgumentError, match="assistant_model"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, assistant_model=model)
    untied = _illada()
    untied.set_output_embeddings(nn.Linear(64, 128, bias=False))
    with pytest.raises(ArgumentError, match="tie_weights"):
        sfs_triton.accelerate(untied)


def test_a_tokenizer_gives_text(records, embedded):
    model, tokenizer = records
    engine = sfs_triton.accelerate(model, tokenizer=tokenizer)
    mine, wanted = (e.generate(RECORDS, gen_length=32) for e in (engine, embedded))
    assert (mine.text, mine.canvas) == (wanted.text, wanted.canvas)
    assert engine.text.token_id("<|mdm_mask|>") == embedded.text.token_id("<|mdm_mask|>")
    assert engine.text.piece(wanted.tokens[0]) == embedded.text.piece(wanted.tokens[0])
    assert engine.text.special_ids() == embedded.text.special_ids()
    assert engine.text.special.items() >= embedded.text.special.items()
    with pytest.raises(ArgumentError, match="chat template refused"):
        engine.generate([{"role": 3}], gen_length=8)
    with pytest.raises(ArgumentError, match="not valid Unicode"):
        engine.generate("a \ud800", gen_length=8)


def test_a_tokenizer_without_a_chat_template(records):
    model, tokenizer = records
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    engine = sfs_triton.accelerate(model, tokenizer=bare)
    ids = tokenizer.encode(RECORDS, add_special_tokens=False)
    mine, wanted = engine.generate(RECORDS, gen_length=16), engine.generate(ids, gen_length=16)
    assert (mine.canvas, mine.text) == (wanted.canvas, wanted.text) and mine.canvas[: len(ids)] == ids
    with pytest.raises(ArgumentError, match="chat template refused"):
        engine.generate([{"role": "user", "content": RECORDS}], gen_length=8)


def test_text_without_a_tokenizer(records):
    engine = sfs_triton.accelerate(records[0])
    with pytest.raises(ArgumentError, match="prompt 0 is text, .* needs a tokenizer"):
        engine.generate(RECORDS)
    assert engine.generate([5 + i for i in range(1, 9)], gen_length=8).text is None


def test_an_engine_follows_its_model_and_keeps_none_alive():
    model = _load("llada-mha")
    first = engines_of.engine_of(model)
    assert engines_of.engine_of(model) is first
    assert engines_of.engine_of(copy.deepcopy(model)) is not first
    model.to(torch.bfloat16)
    second = engines_of.engine_of(model)
    assert second is not first and second.model.dtype == torch.bfloat16
    held = len(engines_of._ENGINES)
    del model
    gc.collect()
    assert len(engines_of._ENGINES) < held


# -------------------------------------------------------------------------------------------------- custom_generate


def _generate(model, ids, **options):
    return transformers.GenerationMixin.generate(model, ids, custom_generate=sfs_triton.custom_generate, **options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", [SlowFast(), Threshold(tau=0.9, block_length=8)], ids=["slowfast", "threshold"])
def test_generate_gives_what_the_engine_gives(engines, models, name, sampler):
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    ids = torch.tensor([[1, 2, 3, 4, 5], [496, 496, 9, 8, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    done = _generate(models[name], ids, attention_mask=mask, max_new_tokens=16, sampler=sampler)
    generations = engines[name].generate(prompts, gen_length=16, sampler=sampler)
    width = max(len(generation.tokens) for generation in generations)
    assert done.sequences.shape == (2, 5 + width) and torch.equal(done.sequences[:, :5], ids)
    for index, generation in enumerate(generations):
        assert done.sequences[index, 5:].tolist() == generation.tokens + [496] * (width - len(generation.tokens))
    assert done.nfe.tolist() == [generation.nfe for generation in generations]
    torch.testing.assert_close(
        done.tokens_per_forward.tolist(), [generation.tokens_per_forward for generation in generations]
    )
    assert torch.equal(models[name].generate(ids, attention_mask=mask, max_length=21, sampler=sampler)[0], done[0])


def test_a_response_ends_with_its_end_of_text(records, embedded):
    model, tokenizer = records
    chats = [[{"role": "user", "content": text}] for text in (RECORDS, "15,44,79,50")]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    given = tokenizer.apply_chat_template(chats, tokenizer_kwargs={"padding_side": "left"}, **options)
    assert given["attention_mask"].sum() < given["attention_mask"].numel()
    done = _generate(model, given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=64)
    generations = embedded.generate([RECORDS, "15,44,79,50"], gen_length=64)
    assert [len(generation.tokens) < 64 for generation in generations] == [True, True]
    texts = tokenizer.batch_decode(done.sequences[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [generation.text for generation in generations]
    comma = tokenizer.convert_tokens_to_ids(",")
    short = _generate(model, given["input_ids"][1:, -8:], max_new_tokens=64, eos_token_id=[1, comma], pad_token_id=7)
    assert short.sequences[0, -1].item() in (1, comma)


def test_noise_comes_from_the_seed_and_the_configuration(engines, models):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    done = _generate(
        models["llada-gqa"], ids, max_new_tokens=16, do_sample=True, temperature=2.0, top_p=0.9, top_k=20, seed=[7, 9]
    )
    sampler = SlowFast(temperature=2.0, top_p=0.9, top_k=20)
    generations = engines["llada-gqa"].generate(ids, gen_length=16, sampler=sampler, seed=[7, 9])
    assert [generation.nfe for generation in generations] == done.nfe.tolist()
    assert done.sequences[0, 3 : 3 + len(generations[0].tokens)].tolist() == generations[0].tokens
    plain = _generate(models["llada-gqa"], ids, max_new_tokens=16, temperature=2.0, sampler=FixedSteps(temperature=0.0))
    assert plain.nfe.tolist() == [16, 16]


def _cut_behind(tokenizer, tokens, stop):
    """Cut ``tokens`` behind the one that completes ``stop``, by decoding ever longer prefixes."""
    for n in range(1, len(tokens) + 1):
        if stop in tokenizer.decode(tokens[:n]):
            return tokens[:n]
    return tokens


@pytest.mark.parametrize("how", ["argument", "configuration", "both"])
def test_stop_strings(records, how):
    model, tokenizer = records
    chat = [{"role": "user", "content": "15,44,79,50"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = ids["input_ids"]
    width, options = ids.shape[1], {"max_new_tokens": 48, "sampler": SlowFast()}
    whole = model.generate(ids, **options)
    response = whole.sequences[0, width:].tolist()
    text = tokenizer.decode(response)
    stop = text[text.index("=") :][:2]
    given = {
        "argument": {"stop_strings": [stop, "never to be seen"]},
        "configuration": {"generation_config": GenerationConfig(stop_strings=stop)},
        "both": {"stop_strings": stop, "generation_config": GenerationConfig(stop_strings=text[0])},
    }[how]
    done = model.generate(ids, tokenizer=tokenizer, **given, **options)
    wanted = _cut_behind(tokenizer, response, stop)
    assert done.sequences[0, width:].tolist() == wanted and 0 < len(wanted) < len(response)
    assert torch.equal(done.tokens_per_forward, whole.tokens_per_forward)
    both = model.generate(torch.cat((ids, ids)), stop_strings=[text[0]], tokenizer=tokenizer, **options)
    assert both.sequences[:, width:].tolist() == [_cut_behind(tokenizer, response, text[0])] * 2
    none = model.generate(ids, stop_strings="never to be seen", tokenizer=tokenizer, **options)
    assert torch.equal(none.sequences, whole.sequences)


def test_stop_strings_where_generate_keeps_its_tokenizer(records):
    """transformers hands none to a ``custom_generate``, so the engine's own has to do."""
    model, tokenizer = records
    model = copy.deepcopy(model)
    ids = torch.tensor([tokenizer.encode(RECORDS, add_special_tokens=False)])
    options = {"max_new_tokens": 16, "stop_strings": ","}
    for more in ({}, {"tokenizer": tokenizer}):
        with pytest.raises(ArgumentError, match=r"stop_strings=',' .*accelerate\(hf_model, tokenizer=tokenizer\)"):
            _generate(model, ids, **options, **more)
    wanted = sfs_triton.custom_generate(model, ids, gen_length=16, stop_strings=",", tokenizer=tokenizer)
    sfs_triton.accelerate(model, tokenizer=tokenizer)
    assert torch.equal(_generate(model, ids, **options).sequences, wanted.sequences)
    assert wanted.sequences.shape[1] < ids.shape[1] + 16 and model.generate(ids, **options).keys() == wanted.keys()
    for wrong in ([""], [3], ["a", None], 3):
        with pytest.raises(ArgumentError, match="stop_strings=.* (not a non-empty string|neither a string)"):
            _generate(model, ids, max_new_tokens=4, stop_strings=wrong)
    model.generation_config.stop_strings = ["x"]
    with pytest.raises(ArgumentError, match=r"model\.generation_config\.stop_strings=\['x'\]"):
        model.generate(ids, max_new_tokens=4)


def test_response_lengths_of_prompts(engines, models):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    done = sfs_triton.custom_generate(models["llada-mha"], ids, gen_length=[8, 12], cache="region")
    generations = engines["llada-mha"].generate(ids, gen_length=[8, 12], cache="region")
    assert done.sequences[0].tolist() == [1, 2, 3, *generations[0].tokens, *[496] * (12 - len(generations[0].tokens))]
    direct = sfs_triton.custom_generate(models["llada-mha"], ids, generation_config=GenerationConfig(max_new_tokens=4))
    assert direct.sequences.shape == (2, 7)
    with pytest.raises(ArgumentError, match="max_new_tokens=None"):
        sfs_triton.custom_generate(models["llada-mha"], ids)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2.*repeat the prompt"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5.*sampler.cfg_scale"),
        ({"output_scores": True}, "output_scores=True"),
        ({"max_time": 3.0}, "max_time=3.0"),
        ({"do_sample": True, "sampler": SlowFast(temperature=0.5)}, "sampler.temperature=0.5 are both given"),
        ({"do_sample": True, "sampler": 3}, "sampler=3"),
        ({"do_sample": True, "sampler": "greedy"}, "sampler='greedy' is not one of"),
        ({"sampler": 3}, "sampler=3"),
        ({"on_step": 3}, "on_step=3"),
        ({"cache": "nonsense"}, "nonsense"),
        ({"gen_length": 0}, "gen_length=0"),
        ({"max_new_tokens": 10_000}, "the model allows 512"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "prompt 0 is padded elsewhere than on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "prompt 0 is empty"),
        ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1.0)])}, "MaxTimeCriteria"),
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 0)])}, "MinLengthLogitsProcessor"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds="),
    ],
)
def test_what_cannot_be_honoured_is_named(models, options, text):
    with pytest.raises(ArgumentError, match=text):
        _generate(models["llada-mha"], torch.tensor([[1, 2, 3]]), **{"max_new_tokens": 8, **options})


def test_inference_mode_leaves_a_model_that_can_be_trained():
    model, ids = _load("llada-mha"), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        _generate(model, ids, max_new_tokens=4)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_settings_of_dreams_own_sampler(models):
    """Settings of the checkpoint are ignored, settings of the caller are not."""
    model, ids = copy.copy(models["dream-gqa"]), torch.tensor([[1, 2, 3]])
    model.generation_config = GenerationConfig(alg="entropy", steps=512, eos_token_id=496, pad_token_id=496)
    assert _generate(model, ids, max_new_tokens=4).sequences.shape == (1, 7)
    with pytest.raises(ArgumentError, match="steps=8.*sampler="):
        _generate(model, ids, max_new_tokens=4, steps=8)


def _filled():
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    return cache


@pytest.mark.parametrize("how", ["ours", "transformers'"])
def test_a_cache_by_name_where_generate_would_make_its_own(records, embedded, how):
    """Since 5.24 transformers calls its own ``cache``, too; the embedded model's configuration does not forbid one."""
    model, tokenizer = records
    ids = torch.tensor([tokenizer.encode(RECORDS, add_special_tokens=False)])
    assert model.generation_config.use_cache is not False
    run = type(model).generate if how == "ours" else _generate
    for cache in ("none", "region"):
        done = run(model, ids, max_new_tokens=16, cache=cache)
        assert done.nfe.tolist() == [embedded.generate(ids[0], gen_length=16, cache=cache).nfe]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"past_key_values": transformers.DynamicCache()}, None),
        ({"cache": transformers.DynamicCache()}, None),
        ({"cache": _filled()}, "cache holds cached positions"),
        ({"past_key_values": _filled()}, "past_key_values holds cached positions"),
        ({"position_ids": torch.tensor([[0, 1, 2]])}, None),
        ({"position_ids": torch.tensor([[5, 6, 7]])}, "position_ids"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask is"),
        ({"token_type_ids": torch.zeros(1, 3)}, "token_type_ids"),
        ({"token_type_ids": None, "logits_to_keep": 1, "use_cache": True}, None),
    ],
)
def test_what_generate_passes_along(models, options, text):
    ids = torch.tensor([[1, 2, 3]])
    if text is None:
        assert sfs_triton.custom_generate(models["llada-mha"], ids, gen_length=4, **options).nfe.item() > 0
    else:
        with pytest.raises(ArgumentError, match=text):
            sfs_triton.custom_generate(models["llada-mha"], ids, gen_length=4, **options)


class _Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value.tolist()))

    def put_draft(self, value, **kwargs):
        self.calls.append(("draft", value.tolist()))

    def end(self):
        self.calls.append(("end", None))


def test_steps_and_drafts(models):
    model, ids = models["llada-mha"], torch.tensor([[1, 2, 3, 4], [496, 5, 6, 7]])
    mask, frames, recorder = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), [], _Recorder()
    done = _generate(model, ids, attention_mask=mask, max_new_tokens=8, on_step=frames.append)
    assert len(frames) == done.nfe.max()
    _generate(model, ids, attention_mask=mask, max_new_tokens=8, on_step=integration.Drafts(recorder))
    drafts = [value for kind, value in recorder.calls if kind == "draft"]
    assert drafts == [[frame.tokens[0][4:], frame.tokens[1][3:]] for frame in frames]
    kinds = [kind for kind, _ in recorder.calls]
    assert kinds == ["put", *["draft"] * len(frames), "put", "end"]
    assert recorder.calls[0][1] == ids.tolist() and recorder.calls[-2][1] == done.sequences[:, 4:].tolist()


def test_drafts_of_a_stream(models):
    recorder, engine = _Recorder(), sfs_triton.accelerate(models["llada-mha"])
    drafts = integration.Drafts(recorder)
    drafts.begin(torch.tensor([[1, 2, 3]]))
    with engine.stream([1, 2, 3], gen_length=8) as stream:
        for frame in stream:
            drafts(frame)
        drafts.end(torch.tensor([stream.result().tokens]))
    assert [len(value[0]) for kind, value in recorder.calls if kind == "draft"] == [8] * stream.result().nfe
    uneven = integration.Drafts(_Recorder())
    with pytest.raises(ArgumentError, match=r"responses of one length, these have \[8, 9\]"):
        sfs_triton.custom_generate(models["llada-mha"], torch.tensor([[1], [2]]), gen_length=[8, 9], on_step=uneven)


def test_streamers_of_transformers(records, capsys):
    model, tokenizer = records
    ids = torch.tensor([tokenizer.encode("15,44,79,50", add_special_tokens=False)])
    options = {"max_new_tokens": 16, "sampler": SlowFast()}
    wanted = tokenizer.decode(model.generate(ids, **options).sequences[0, ids.shape[1] :], skip_special_tokens=True)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, streamer=streamer, **options)
    shown = capsys.readouterr().out
    assert "\033[33m" in shown and shown.endswith(wanted + "\n")
    plain = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, streamer=plain, **options)
    assert "".join(plain) == wanted
    streamer._takes_logits = True
    with pytest.raises(ArgumentError, match="takes logits"):
        model.generate(ids, streamer=streamer, **options)
    with pytest.raises(ArgumentError, match="no put"):
        integration.Drafts(3)
    with pytest.raises(ArgumentError, match="either streamer or on_step"):
        model.generate(ids, streamer=plain, on_step=print, **options)


# ------------------------------------------------------------------------------------------------------------ import


def _python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_transformers_is_imported_only_when_asked_for():
    done = _python("import sys, sfs_triton; print('transformers' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sfs_triton.nonsense
    assert sfs_triton.accelerate is integration.accelerate


def test_without_transformers_the_extra_is_named():
    done = _python("import sys; sys.modules['transformers'] = None; import sfs_triton; sfs_triton.accelerate")
    assert "MissingDependencyError" in done.stderr and 'pip install "sfs_triton[hf]"' in done.stderr
