"""The lm-eval model ``sfs_triton``: requests are checked and encoded, then decoded in batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

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

    from .settings import GenKwargs, flag, integer, parse_gen_kwargs, parse_model_args
except ImportError as error:
    raise MissingDependencyError(f'this needs lm-eval ({error}): pip install "sfs_triton[eval]"') from error

from .costs import ALL_COSTS, EvaluationCosts
from .ranks import Ranks, TPGroup

DEFAULT_DEVICE = "cuda:0"  # lm-eval's default device


class LikelihoodError(SfsError, NotImplementedError):
    """A task requests log-likelihoods."""


class EncodedRequest(NamedTuple):
    """One checked and encoded request; ``index``: of its answer."""

    index: int
    request: Instance
    ids: list[int]
    gen: GenKwargs
    seed: int
    truncated: bool


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
                self.costs.add(batch[0].request.task_name, done, sum(one.truncated for one in batch))
                for one, generation in zip(batch, done, strict=True):
                    answers[one.index] = self._cut(generation, one.gen.until)
                    self.cache_hook.add_partial("generate_until", one.request.args, answers[one.index])
                bar.update(len(batch))
        for index, first in repeated.items():
            answers[index] = answers[first]
        return answers

    def _encode_all(self, requests: Sequence[Instance]) -> tuple[list[EncodedRequest], dict[int, int]]:
        """Check and encode all requests before the first is decoded.

        Some ranks get their last request again, so that all ranks have equally many. Returned second: the indices of
        such repeats, and the index of each one's answer; they are neither decoded nor counted twice.
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
            context, given = request.args
            gen = parse_gen_kwargs(request.task_name, given, self._sampler, self._cache, self._gen_length)
            ids, truncated = self._encode(request, context, gen.params.gen_length)
            seed = self._seed + (request.doc_id or 0) * repeats + repeat
            encoded.append(EncodedRequest(index, request, ids, gen, seed, truncated))
        return encoded, repeated

    def _encode(self, request: Instance, context: str, length: int) -> tuple[list[int], bool]:
        """Return the token ids of a prompt that leaves ``length`` positions free, and whether it was truncated."""
        ids, task = self.engine.text.encode(context), f"task {request.task_name!r}, document {request.doc_id}"
        if ids[: len(self._bos)] != self._bos:
            ids = self._bos + ids
        limit = self.engine.spec.max_length - length
        require(limit > 0, f"{task}: max_gen_toks={length}, but the model has {self.engine.spec.max_length} positions")
        require(bool(ids), f"{task}: the prompt is empty, set add_bos_token=True")
        if len(ids) <= limit:
            return ids, False
        require(
            self._truncation,
            f"{task}: the prompt has {len(ids)} tokens; with max_gen_toks={length} the model has room for {limit}. "
            "Use fewer shots, fewer positions, or truncation=True, which drops the start of the prompt",
        )
        return self._bos + ids[len(ids) - limit + len(self._bos) :], True

    def _batches(self, encoded: Sequence[EncodedRequest]) -> Iterator[list[EncodedRequest]]:
        """Batch requests of equal task and parameters, longest prompts first: out of memory then shows early."""
        alike: dict[tuple, list[EncodedRequest]] = defaultdict(list)
        for one in encoded:
            alike[one.request.task_name, one.gen].append(one)
        for group in alike.values():
            group.sort(key=lambda one: -len(one.ids))
            for at in range(0, len(group), self._batch_size):
                yield group[at : at + self._batch_size]

    def _cut(self, done: Generation, until: Sequence[str]) -> str:
        """Return a response's text before the first stop string. Special tokens also stop it, and are not returned."""
        text, stops = done.text, {self._special[stop] for stop in until if stop in self._special}
        end = next((i for i, token in enumerate(done.tokens) if token in stops), None)
        if end is not None:
            text = self.engine.text.decode(done.tokens[:end])
        return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raise LikelihoodError: a masked-diffusion model has no likelihood computable in a few forwards."""
        _refuse(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raise LikelihoodError, as :meth:`loglikelihood`."""
        _refuse(requests)

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


def _refuse(requests: Sequence[Instance]) -> None:
    tasks = sorted({request.task_name or "?" for request in requests})
    raise LikelihoodError(
        f"task {', '.join(tasks)}: needs log-likelihoods, which a masked-diffusion model cannot compute in "
        "a few forwards; use a task that generates its answers (mmlu_generative for mmlu, arc_challenge_chat for "
        "arc_challenge)"
    )
