"""The lm-eval model ``sfs_triton``: requests are checked and encoded, then decoded, or their likelihoods estimated."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ...decoding.likelihood import LikelihoodParams
from ...decoding.params import cache_to_dict, sampler_to_dict
from ...engine import Engine, load
from ...errors import MissingDependencyError, SfsError, require
from ...scheduling.outputs import Generation
from ...text.codec import TextCodec
from ...version import __version__

try:
    import lm_eval.models  # noqa: F401  # before the model below: the registry is filled only while it is empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm

    from .settings import GenKwargs, flag, integer, parse_gen_kwargs, parse_likelihood, parse_model_args
except ImportError as error:
    raise MissingDependencyError(f'this needs lm-eval ({error}): pip install "sfs_triton[eval]"') from error

from .costs import ALL_COSTS, EvaluationCosts, TaskCost
from .ranks import Ranks, TPGroup

logger = logging.getLogger("lm_eval")  # whose command line shows what is logged there

DEFAULT_DEVICE = "cuda:0"  # lm-eval's default device


class LikelihoodError(SfsError, NotImplementedError):
    """A task requests log-likelihoods that are not opted in to, or that there are none of."""


class EncodedRequest(NamedTuple):
    """One checked and encoded request; ``index``: of its result. ``gen`` is None where the likelihood of ``answer`` is
    asked for."""

    index: int
    request: Instance
    ids: list[int]
    gen: GenKwargs | None
    seed: int
    truncated: bool
    answer: Sequence[int] = ()


@register_model("sfs_triton")
class DiffusionLM(LM):
    """The lm-eval model ``sfs_triton`` for masked-diffusion checkpoints.

    Args:
        pretrained: ``"embedded"``, a checkpoint folder, a hub id, or an :class:`Engine`.
        sampler, cache: the name of a sampler; a cache policy. Every option of
            either (``preset``, ``tau_high``, ``block_length``, ``capacity``, ...) is also an argument.
        batch_size: prompts decoded together.
        max_gen_toks: default number of response positions.
        seed: random seed, for temperatures above 0. A request's own is derived from it, its document and its repeat.
        truncation: drop the start of prompts that are too long; otherwise they are an error.
        add_bos_token: prepend the checkpoint's begin-of-text token to prompts without it.
        likelihood: estimate log-likelihoods, which are refused otherwise, by this ``method`` of
            :class:`sfs_triton.LikelihoodParams`: ``"monte-carlo"`` or ``"confidence"``.
        mc_num, mc_batch, pad_eos, check_greedy: further fields of it; ``check_greedy`` is True here. Its guidance is
            the sampler's ``cfg_scale``.
        device, dtype, backend, cuda_graphs, quantization, mask_token_id, max_length, adapter: as for
            :func:`sfs_triton.load`.
        tensor_parallel: number of neighbouring ``torchrun`` processes that share a model and count as one process.
            Except in the first of them, the constructor does not return: the process exits when the first is done.
    """

    def __init__(
        self,
        pretrained: str | Engine | None = None,
        sampler: str = "slowfast",
        cache: str = "none",
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        truncation: bool = False,
        add_bos_token: bool = False,
        likelihood: str | None = None,
        mc_num: int | str | None = None,
        mc_batch: int | str | None = None,
        pad_eos: bool | None = None,
        check_greedy: bool | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        cuda_graphs: bool | None = None,
        quantization: str | None = None,
        mask_token_id: int | None = None,
        max_length: int | None = None,
        adapter: str | None = None,
        tensor_parallel: int | str = 1,
        **options: Any,
    ):
        super().__init__()
        self._sampler, self._cache = parse_model_args(sampler, cache, options)
        require(
            pretrained is not None, "model_args: pretrained is missing: 'embedded', a checkpoint folder or a hub id"
        )
        require(max_batch_size is None, f"model_args: max_batch_size={max_batch_size!r} goes with batch_size=auto only")
        self._batch_size = integer("batch_size", batch_size, 1)
        self._gen_length = integer("max_gen_toks", max_gen_toks, 1)
        self._seed = integer("seed", seed, 0)
        self._truncation = flag("truncation", truncation)
        given = {"mc_num": mc_num, "mc_batch": mc_batch, "pad_eos": pad_eos, "check_greedy": check_greedy}
        self._likelihood = parse_likelihood(likelihood, given, self._sampler.cfg_scale)
        self._tp = TPGroup(integer("tensor_parallel", tensor_parallel, 1), device)
        self._ranks = Ranks(self._tp.group.size)
        self._rank, self._world_size = self._ranks.rank, self._ranks.size
        self._name = pretrained if isinstance(pretrained, str) else "engine"
        if isinstance(pretrained, Engine):
            shared = max(self._tp.group.size, pretrained.model.group.size)
            require(shared == 1, f"model_args: tensor_parallel={shared} needs the name of a model, not an engine")
            self.engine = pretrained
        else:
            where, dtype = self._ranks.device(device), None if dtype == "auto" else dtype
            graphs = None if cuda_graphs is None else flag("cuda_graphs", cuda_graphs)
            how = {"quantization": quantization, "tensor_parallel": self._tp.group}
            how |= {"mask_token_id": mask_token_id, "max_length": max_length, "adapter": adapter}
            self.engine = load(pretrained, where, dtype, backend, graphs, **how)
        if not self._tp.leads:
            self._tp.follow(self.engine)
        codec = self.engine.codec(f"model_args: pretrained={self._name!r}: an evaluation")
        self._device = self.engine.model.device
        self._bos = _begin_of_text(codec, self._name) if flag("add_bos_token", add_bos_token) else []
        self._special = codec.special_ids()
        self._settings = {"sampler": sampler_to_dict(self._sampler), "cache": cache_to_dict(self._cache)}
        self._settings["likelihood"] = None if self._likelihood is None else asdict(self._likelihood)
        self.costs = EvaluationCosts()
        ALL_COSTS.append(self.costs)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> DiffusionLM:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> DiffusionLM:
        """Create a model from ``model_args`` and lm-eval's own options; ``model_args`` take precedence."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == DEFAULT_DEVICE:
            del options["device"]
        return cls(**{**options, **arg_dict})

    # ---------------------------------------------------------------------------------------------------- requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers in the order of the requests, each cut at the first of its stop strings."""
        encoded, repeated = self._encode_all(requests)
        self.costs.started = True
        answers: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(encoded), disable=hidden, desc="Running generate_until requests") as bar:
            for batch in self._batches(encoded):
                ids, seeds = [one.ids for one in batch], [one.seed for one in batch]
                done = self._tp.generate(self.engine, ids, batch[0].gen.params, seeds)
                tokens, nfe = sum(len(each.tokens) for each in done), sum(each.nfe for each in done)
                self._count(batch, tokens, nfe, done[0].seconds)
                for one, generation in zip(batch, done, strict=True):
                    answers[one.index] = self._cut(generation, one.gen.until)
                    self.cache_hook.add_partial("generate_until", one.request.args, answers[one.index])
                bar.update(len(batch))
        for index, first in repeated.items():
            answers[index] = answers[first]
        return answers

    def _encode_all(self, requests: Sequence[Instance]) -> tuple[list[EncodedRequest], dict[int, int]]:
        """Check and encode all requests before the first is computed.

        Some ranks get their last request again, so that all ranks have equally many. Returned second: the indices of
        such repeats, and the index of each one's answer; they are neither computed nor counted twice.
        """
        encoded: list[EncodedRequest] = []
        seen: Counter[int] = Counter()
        first: dict[int, int] = {}
        repeated = {}
        for index, request in enumerate(requests):
            repeat, repeats = seen[id(request)], request.repeats or 1
            seen[id(request)] += 1
            if repeat >= repeats:
                repeated[index] = first[id(request)]
                continue
            first.setdefault(id(request), index)
            seed = self._seed + (request.doc_id or 0) * repeats + repeat
            encode = self._encode_answer if request.request_type == "loglikelihood" else self._encode_open
            encoded.append(encode(index, request, seed))
        return encoded, repeated

    def _encode_open(self, index: int, request: Instance, seed: int) -> EncodedRequest:
        """Encode a request for a response."""
        context, given = request.args
        gen = parse_gen_kwargs(request.task_name, given, self._sampler, self._cache, self._gen_length)
        length, ids = gen.params.gen_length, self.engine.text.encode(context)
        ids, truncated = self._fit(_name_of(request), ids, length, f"max_gen_toks={length}")
        return EncodedRequest(index, request, ids, gen, seed, truncated)

    def _encode_answer(self, index: int, request: Instance, seed: int) -> EncodedRequest:
        """Encode a request for the likelihood of an answer. The answers of a document share their random draws."""
        name, (ids, answer) = _name_of(request), self.engine.text.encode_pair(*request.args)
        require(bool(answer), f"{name}: the answer {request.args[1]!r} has no tokens")
        length = len(answer) + self._likelihood.pad_eos
        ids, truncated = self._fit(name, ids, length, f"an answer of {length} tokens")
        self.engine.check_no_mask(name, [*ids, *answer])
        return EncodedRequest(index, request, ids, None, seed, truncated, answer)

    def _fit(self, name: str, ids: list[int], length: int, what: str) -> tuple[list[int], bool]:
        """Return the token ids of a prompt that leaves ``length`` positions free, and whether it was truncated."""
        if ids[: len(self._bos)] != self._bos:
            ids = self._bos + ids
        limit = self.engine.spec.max_length - length
        require(limit > 0, f"{name}: {what}, but the model has {self.engine.spec.max_length} positions")
        require(bool(ids), f"{name}: the prompt is empty, set add_bos_token=True")
        if len(ids) <= limit:
            return ids, False
        require(
            self._truncation,
            f"{name}: the prompt has {len(ids)} tokens; with {what} the model has room for {limit}. "
            "Use fewer shots, fewer positions, or truncation=True, which drops the start of the prompt",
        )
        return self._bos + ids[len(ids) - limit + len(self._bos) :], True

    def _batches(self, encoded: Sequence[EncodedRequest]) -> Iterator[list[EncodedRequest]]:
        """Batch requests of equal task and parameters, longest prompts first: out of memory then shows early."""
        alike: dict[tuple, list[EncodedRequest]] = defaultdict(list)
        for one in encoded:
            alike[one.request.task_name, one.gen].append(one)
        for group in alike.values():
            group.sort(key=lambda one: -len(one.ids) - len(one.answer))
            for at in range(0, len(group), self._batch_size):
                yield group[at : at + self._batch_size]

    def _cut(self, done: Generation, until: Sequence[str]) -> str:
        """Return a response's text before the first stop string. Special tokens also stop it, and are not returned."""
        text, stops = done.text, {self._special[stop] for stop in until if stop in self._special}
        end = next((i for i, token in enumerate(done.tokens) if token in stops), None)
        if end is not None:
            text = self.engine.text.decode(done.tokens[:end])
        return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]

    def _count(self, batch: Sequence[EncodedRequest], tokens: int, nfe: int, seconds: float) -> None:
        truncated = sum(one.truncated for one in batch)
        self.costs.add(batch[0].request.task_name, TaskCost(len(batch), tokens, nfe, seconds, truncated))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each answer, and whether greedy decoding gives it (False if not checked).

        Raises:
            LikelihoodError: likelihoods were not opted in to.
        """
        params = self._likelihood
        if params is None:
            raise LikelihoodError(
                f"{_tasks_of(requests)}: needs log-likelihoods, which cost a masked-diffusion model many forwards: set "
                f"likelihood=monte-carlo ({LikelihoodParams.mc_num} per answer) or likelihood=confidence (one per "
                "token of it), or use a task that generates its answers (mmlu_generative for mmlu, "
                "arc_challenge_chat for arc_challenge)"
            )
        encoded, repeated = self._encode_all(requests)
        forwards = sum(params.forwards(len(one.answer)) for one in encoded)
        text = "%s: the likelihoods of %d answers (%s) take up to %d forwards of one canvas, %d at a time"
        logger.info(text, _tasks_of(requests), len(encoded), params.method, forwards, self._batch_size)
        self.costs.started = True
        found: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(encoded), disable=hidden, desc="Running loglikelihood requests") as bar:
            for batch in self._batches(encoded):
                pairs, seeds = [(one.ids, one.answer) for one in batch], [one.seed for one in batch]
                start = time.perf_counter()
                done = self._tp.likelihood(self.engine, pairs, params, seeds, self._batch_size)
                self._count(batch, 0, sum(each.forwards for each in done), time.perf_counter() - start)
                for one, each in zip(batch, done, strict=True):
                    found[one.index] = each.value, bool(each.greedy)
                    self.cache_hook.add_partial("loglikelihood", one.request.args, found[one.index])
                bar.update(len(batch))
        for index, first in repeated.items():
            found[index] = found[first]
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raise LikelihoodError: there are estimates for an answer after a prompt, none for whole documents."""
        raise LikelihoodError(
            f"{_tasks_of(requests)}: needs log-likelihoods of whole documents (perplexity), of which a "
            "masked-diffusion model has no published estimate"
        )

    # -------------------------------------------------------------------------------------------------- chat, ranks

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation in the checkpoint's template; without a generation prompt its end stays open."""
        if add_generation_prompt:
            return self.engine.text.render(chat_history)
        last = chat_history[-1] if chat_history else {}
        require(last.get("role") == "assistant", f"{chat_history!r} has no assistant's turn to continue")
        return self.engine.text.render(chat_history[:-1]) + last["content"]

    def chat_template(self, chat_template: bool | str = False) -> str:
        valid = isinstance(chat_template, bool) or chat_template == "default"
        require(valid, f"apply_chat_template={chat_template!r}: only the checkpoint's own template can be used")
        return self.engine.text.template or ""

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.world_size == 1 else self._ranks.all(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        """Gather the objects of all ranks, and with them the costs, which the combined results need."""
        if self.world_size == 1:
            return [obj]
        parts = self._ranks.gather((obj, dict(self.costs.own)), dst)
        if parts is None:
            return None
        self.costs.gathered = [costs for _, costs in parts]
        return [part for part, _ in parts]

    def barrier(self) -> None:
        if self.world_size > 1:
            self._ranks.wait()

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries for a result's ``config``: version, settings, and the figures under ``speed``."""
        own = {
            "version": __version__,
            "pretrained": self._name,
            "execution": self.engine.execution,
            "device": str(self._device),
        }
        return {"sfs_triton": {**own, **self._settings, "batch_size": self._batch_size}, "speed": self.costs.summary()}


def _begin_of_text(text: TextCodec, name: str) -> list[int]:
    token = text.special.get("bos_token")
    index = None if token is None else text.token_id(token)
    require(index is not None, f"model_args: add_bos_token=True, but {name!r} names no begin-of-text token")
    return [index]


def _name_of(request: Instance) -> str:
    return f"task {request.task_name!r}, document {request.doc_id}"


def _tasks_of(requests: Sequence[Instance]) -> str:
    return f"task {', '.join(sorted({request.task_name or '?' for request in requests}))}"
