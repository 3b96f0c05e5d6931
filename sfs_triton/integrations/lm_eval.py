"""lm-eval: a model named ``sfs_triton``, and ``sfs-eval``, which is lm-eval's command line with that model in it.

Importing this module registers the model; ``lm_eval.simple_evaluate(model="sfs_triton", ...)`` works from then on.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed

from .. import __version__
from ..caching import POLICIES, CachePolicy, cache_policy
from ..engine import Engine, load
from ..errors import ArgumentError, MissingDependencyError, SfsError, require
from ..generation import Generation
from ..samplers import SAMPLERS, Sampler, SlowFast
from ..text import TextCodec

try:
    import lm_eval.models  # noqa: F401  # before the model below: the registry fills itself only while it is empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(f'this needs lm-eval ({error}): pip install "sfs_triton[eval]"') from error

LM_EVALS_DEVICE = "cuda:0"  # what lm-eval passes when nobody has asked for a device
PATIENCE = timedelta(days=7)  # ranks with long answers may keep the others waiting


# --------------------------------------------------------------------------------------------------------- settings


def _settings_of(sampler: str) -> set[str]:
    """What can be set for a sampler."""
    names = {f.name for f in fields(SAMPLERS[sampler])} - {"name"}
    if sampler == "slowfast":
        return names | {"preset"}
    return names - {"steps", "metric", "eps"} if sampler == "vanilla" else names


def _settings_of_cache(cache: str) -> set[str]:
    return {f.name for f in fields(POLICIES[cache])}


def make_settings(sampler: str, cache: str, given: Mapping[str, Any]) -> tuple[Sampler, CachePolicy]:
    """A sampler and a cache policy by name, with the settings that ``model_args`` give.

    Raises:
        ArgumentError: names the argument, its value, and what it belongs to.
    """
    require(sampler in SAMPLERS, f"model_args: sampler={sampler!r} is not one of {tuple(SAMPLERS)}")
    require(cache in POLICIES, f"model_args: cache={cache!r} is not one of {tuple(POLICIES)}")
    of_sampler, of_cache = _settings_of(sampler), _settings_of_cache(cache)
    for name, value in given.items():
        if name in of_sampler | of_cache:
            continue
        owners = [f"sampler={other}" for other in SAMPLERS if name in _settings_of(other)]
        owners += [f"cache={other}" for other in POLICIES if name in _settings_of_cache(other)]
        why = f"goes with {', '.join(owners)}" if owners else "is not known"
        raise ArgumentError(f"model_args: {name}={value!r} {why}; given are sampler={sampler}, cache={cache}")
    chosen = {name: value for name, value in given.items() if name in of_sampler}
    if sampler == "slowfast":
        settings = SlowFast.preset(chosen.pop("preset", "paper"), **chosen)
    else:
        settings = SAMPLERS[sampler](**chosen)
    policy = cache_policy(cache, **{name: value for name, value in given.items() if name in of_cache})
    settings.check_cache(policy)
    return settings, policy


def _whole(name: str, value: Any, least: int) -> int:
    """An integer; the command line gives some of them as text."""
    fine = not isinstance(value, (bool, float)) and str(value).lstrip("-").isdecimal() and int(value) >= least
    require(fine, f"model_args: {name}={value!r} is not an integer of at least {least}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    require(isinstance(value, bool), f"model_args: {name}={value!r} is neither True nor False")
    return value


class Wish(NamedTuple):
    """What one request's ``gen_kwargs`` ask for."""

    length: int
    until: tuple[str, ...]
    sampler: Sampler


def read_wish(task: str, given: Mapping[str, Any], sampler: Sampler, length: int) -> Wish:
    """``gen_kwargs`` of a request, over the model's own ``sampler`` and response ``length``.

    A request that samples (``do_sample``) brings its own temperature, top-p and top-k; for one that does not, the
    model's stay as they are. All other settings of the sampler can be given, too.

    Raises:
        ArgumentError: names task, argument and value.
    """
    wish = dict(normalize_gen_kwargs(dict(given), length))
    until, length, samples = wish.pop("until"), wish.pop("max_gen_toks"), wish.pop("do_sample")
    for stop in until:
        require(isinstance(stop, str), f"task {task!r}: until={until!r} holds {stop!r}, which is no text")
    require(length > 0, f"task {task!r}: max_gen_toks={length} is not positive")
    beams = wish.pop("num_beams", 1)
    require(beams == 1, f"task {task!r}: num_beams={beams!r} is not supported: a diffusion model has no beams")
    draw = {name: wish.pop(name) for name in ("temperature", "top_p", "top_k") if name in wish}
    if samples and draw["temperature"] > 0:
        top_p, top_k = draw.get("top_p"), draw.get("top_k")
        wish["temperature"] = float(draw["temperature"])
        wish["top_p"] = None if top_p is None or top_p >= 1 else float(top_p)
        wish["top_k"] = None if top_k is None or top_k <= 0 else int(top_k)
    known = {f.name for f in fields(sampler)} - {"name"}
    for name, value in wish.items():
        require(name in known, f"task {task!r}: gen_kwargs {name}={value!r} is no setting of {type(sampler).__name__}")
    wanted = sampler.replace(**wish) if wish else sampler
    wanted.check_length(length)
    return Wish(length, tuple(stop for stop in until if stop), wanted)


# ------------------------------------------------------------------------------------------------------- statistics


@dataclass(slots=True)
class Cost:
    """What the requests of one task took. ``seconds`` is time in ``generate``, of one rank."""

    requests: int = 0
    tokens: int = 0
    nfe: int = 0
    seconds: float = 0.0
    truncated: int = 0


@dataclass
class Tally:
    """Costs by task, of this rank and, once they are gathered, of all."""

    own: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    gathered: list[dict[str, Cost]] | None = None

    def add(self, task: str, batch: Sequence[Generation], truncated: int) -> None:
        cost = self.own[task]
        cost.requests += len(batch)
        cost.tokens += sum(len(done.tokens) for done in batch)
        cost.nfe += sum(done.nfe for done in batch)
        cost.seconds += batch[0].seconds
        cost.truncated += truncated

    def summary(self) -> dict[str, dict[str, Any]]:
        """Figures by task, and for all of them under ``"all"``, summed over the ranks.

        Ranks run side by side, so ``seconds`` is the slowest rank's and ``tokens_per_second`` what all ranks together
        decoded in that time.
        """
        ranks = [self.own] if self.gathered is None else self.gathered
        tasks = list(dict.fromkeys(task for rank in ranks for task in rank))
        figures = {task: _figures([rank.get(task, Cost()) for rank in ranks]) for task in tasks}
        return figures | {"all": _figures([_total(rank) for rank in ranks])}

    def table(self) -> str:
        """The summary as a table in Markdown, as lm-eval prints its own."""
        heads = ("Task", "requests", "tokens/s", "NFE", "TPF", "tokens", "seconds")
        rows = [
            (
                task,
                f"{f['requests']}",
                f"{f['tokens_per_second']:.1f}",
                f"{f['nfe_per_request']:.1f}",
                f"{f['tokens_per_forward']:.2f}",
                f"{f['tokens']}",
                f"{f['seconds']:.1f}",
            )
            for task, f in self.summary().items()
        ]
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines = ["|".join(["", *(cell.rjust(w) for cell, w in zip(row, widths, strict=True)), ""]) for row in rows]
        head = "|".join(["", *(cell.rjust(w) for cell, w in zip(heads, widths, strict=True)), ""])
        return "\n".join([head, "|".join(["", *("-" * (w - 1) + ":" for w in widths), ""]), *lines])


def _total(costs: Mapping[str, Cost]) -> Cost:
    return Cost(*(sum(getattr(cost, f.name) for cost in costs.values()) for f in fields(Cost)))


def _figures(ranks: Sequence[Cost]) -> dict[str, Any]:
    requests, tokens, nfe = (sum(getattr(rank, name) for rank in ranks) for name in ("requests", "tokens", "nfe"))
    seconds = max(rank.seconds for rank in ranks)
    return {
        "requests": requests,
        "tokens": tokens,
        "nfe": nfe,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "nfe_per_request": nfe / max(requests, 1),
        "tokens_per_forward": tokens / max(nfe, 1),
        "truncated": sum(rank.truncated for rank in ranks),
        "requests_by_rank": [rank.requests for rank in ranks],
    }


_TALLIES: list[Tally] = []  # of every model of this process, for what sfs-eval prints at the end


# ------------------------------------------------------------------------------------------------------------ ranks


class Ranks:
    """This process among those that ``torchrun`` or ``accelerate launch`` has started; alone without them."""

    def __init__(self) -> None:
        self.rank, self.size, self.local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        self._group = None
        if self.size > 1:
            if distributed.is_initialized():  # by whom and for which devices ever
                self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            else:
                distributed.init_process_group("gloo", timeout=PATIENCE)
                atexit.register(_leave)  # threads of gloo's that outlive the interpreter abort the process

    def device(self, asked: Any) -> Any:
        """The device of this rank: its own GPU, unless one was named by number."""
        if self.size > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return asked

    def all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks in a row, on the CPU."""
        own = tensor.detach().cpu().reshape(-1)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own, group=self._group)
        return torch.cat(parts)

    def gather(self, item: Any, to: int) -> list | None:
        parts = [None] * self.size if self.rank == to else None
        distributed.gather_object(item, parts, dst=to, group=self._group)
        return parts

    def wait(self) -> None:
        distributed.barrier(group=self._group)


def _leave() -> None:
    """End the group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ model


class Job(NamedTuple):
    """One request, ready to run."""

    place: int
    request: Instance
    ids: list[int]
    wish: Wish
    seed: int
    truncated: bool


@register_model("sfs_triton")
class DiffusionLM(LM):
    """Masked-diffusion models for lm-eval.

    Args:
        pretrained: ``"embedded"``, a checkpoint folder, a hub id, or an :class:`Engine`.
        sampler, cache: ``slowfast``, ``threshold``, ``fixed`` or ``vanilla``, and a policy; every other setting of
            either (``preset``, ``tau_high``, ``block_length``, ``capacity``, ...) is an argument, too.
        batch_size: prompts decoded at a time.
        max_gen_toks: response positions where a task does not say.
        seed: of the noise, for temperatures above 0. A request's own follows from its document and its repeat.
        truncation: drop the beginning of prompts that are too long; they are an error otherwise.
        add_bos_token: begin prompts with the checkpoint's begin-of-text, if they do not.
        device, dtype, impl, loop: as for :func:`sfs_triton.load`.
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
        impl: str | None = None,
        loop: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        require(
            pretrained is not None, "model_args: pretrained is missing: 'embedded', a checkpoint folder or a hub id"
        )
        require(max_batch_size is None, f"model_args: max_batch_size={max_batch_size!r} goes with batch_size=auto only")
        self._sampler, self._policy = make_settings(sampler, cache, settings)
        self._batch_size = _whole("batch_size", batch_size, 1)
        self._length = _whole("max_gen_toks", max_gen_toks, 1)
        self._seed = _whole("seed", seed, 0)
        self._truncation = _flag("truncation", truncation)
        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.size
        self._name = pretrained if isinstance(pretrained, str) else "engine"
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            self.engine = load(pretrained, self._ranks.device(device), None if dtype == "auto" else dtype, impl, loop)
        require(self.engine.text is not None, f"model_args: pretrained={self._name!r} has no tokenizer.json")
        self._device = self.engine.model.device
        self._bos = _begin_of_text(self.engine.text, self._name) if _flag("add_bos_token", add_bos_token) else []
        added = self.engine.text.tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: index for index, token in added if token.special}
        self._told = {"sampler": {"kind": sampler, **asdict(self._sampler)}}
        self._told["cache"] = {"kind": cache, **asdict(self._policy)}
        self.tally = Tally()
        _TALLIES.append(self.tally)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> DiffusionLM:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> DiffusionLM:
        """A model of ``model_args`` and of what lm-eval's own options add to them; ``model_args`` win."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == LM_EVALS_DEVICE:
            del options["device"]
        return cls(**{**options, **arg_dict})

    # ---------------------------------------------------------------------------------------------------- requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests, each cut at the first of its stop strings."""
        jobs, same = self._jobs(requests)
        answers: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(jobs), disable=hidden, desc="Running generate_until requests") as bar:
            for batch in self._batches(jobs):
                wish = batch[0].wish
                done = self.engine.generate(
                    [job.ids for job in batch],
                    gen_length=wish.length,
                    sampler=wish.sampler,
                    cache=self._policy,
                    seed=[job.seed for job in batch],
                )
                self.tally.add(batch[0].request.task_name, done, sum(job.truncated for job in batch))
                for job, row in zip(batch, done, strict=True):
                    answers[job.place] = self._cut(row, wish.until)
                    self.cache_hook.add_partial("generate_until", job.request.args, answers[job.place])
                bar.update(len(batch))
        for place, first in same.items():
            answers[place] = answers[first]
        return answers

    def _jobs(self, requests: Sequence[Instance]) -> tuple[list[Job], dict[int, int]]:
        """Everything that can be checked before the first of many hours is spent.

        Some ranks get their last request again, so that all have equally many. Such places, and where each one's
        answer stands, come back second: they are neither decoded nor counted twice.
        """
        jobs: list[Job] = []
        seen: Counter[int] = Counter()
        first: dict[int, int] = {}
        same = {}
        for place, request in enumerate(requests):
            repeat, repeats = seen[id(request)], request.repeats or 1
            seen[id(request)] += 1
            if repeat >= repeats:
                same[place] = first[id(request)]
                continue
            first.setdefault(id(request), place)
            context, given = request.args
            wish = read_wish(request.task_name, given, self._sampler, self._length)
            ids, truncated = self._encode(request, context, wish.length)
            seed = self._seed + (request.doc_id or 0) * repeats + repeat
            jobs.append(Job(place, request, ids, wish, seed, truncated))
        return jobs, same

    def _encode(self, request: Instance, context: str, length: int) -> tuple[list[int], bool]:
        """Token ids of a prompt that leaves ``length`` positions free, and whether that took its beginning away."""
        ids, task = self.engine.text.encode(context), f"task {request.task_name!r}, document {request.doc_id}"
        if ids[: len(self._bos)] != self._bos:
            ids = self._bos + ids
        room = self.engine.spec.max_length - length
        require(room > 0, f"{task}: max_gen_toks={length}, but the model has {self.engine.spec.max_length} positions")
        require(bool(ids), f"{task}: the prompt is empty, set add_bos_token=True")
        if len(ids) <= room:
            return ids, False
        require(
            self._truncation,
            f"{task}: the prompt has {len(ids)} tokens; with max_gen_toks={length} the model has room for {room}. "
            "Fewer shots, fewer positions, or truncation=True, which drops the prompt's beginning",
        )
        return self._bos + ids[len(ids) - room + len(self._bos) :], True

    def _batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs of one task and one wish together, longest prompts first: what does not fit into memory fails early."""
        alike: dict[tuple, list[Job]] = defaultdict(list)
        for job in jobs:
            alike[job.request.task_name, job.wish].append(job)
        for group in alike.values():
            group.sort(key=lambda job: -len(job.ids))
            for at in range(0, len(group), self._batch_size):
                yield group[at : at + self._batch_size]

    def _cut(self, done: Generation, until: Sequence[str]) -> str:
        """A response's text before the first stop string. Special tokens stop it, too, but are not part of a text."""
        text, stops = done.text, {self._special[stop] for stop in until if stop in self._special}
        end = next((i for i, token in enumerate(done.tokens) if token in stops), None)
        if end is not None:
            text = self.engine.text.decode(done.tokens[:end])
        return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Refused: a masked-diffusion model has no likelihood that could be computed in a few passes."""
        _refuse(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused, as :meth:`loglikelihood`."""
        _refuse(requests)

    # -------------------------------------------------------------------------------------------------- chat, ranks

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation in the checkpoint's template; its last turn is continued if so asked."""
        if add_generation_prompt:
            return self.engine.text.render(chat_history)
        last = chat_history[-1] if chat_history else {}
        require(last.get("role") == "assistant", f"there is no assistant's turn to continue in {chat_history!r}")
        return self.engine.text.render(chat_history[:-1]) + last["content"]

    def chat_template(self, chat_template: bool | str = False) -> str:
        fine = isinstance(chat_template, bool) or chat_template == "default"
        require(fine, f"apply_chat_template={chat_template!r}: only the checkpoint's own template can be used")
        return self.engine.text.template or ""

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.world_size == 1 else self._ranks.all(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        """Objects of all ranks; the costs go along, so that they are there when the results are put together."""
        if self.world_size == 1:
            return [obj]
        parts = self._ranks.gather((obj, dict(self.tally.own)), dst)
        if parts is None:
            return None
        self.tally.gathered = [costs for _, costs in parts]
        return [part for part, _ in parts]

    def barrier(self) -> None:
        if self.world_size > 1:
            self._ranks.wait()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into a result's ``config``: version, settings, and the figures under ``speed``."""
        own = {"version": __version__, "pretrained": self._name, "loop": self.engine.loop, "device": str(self._device)}
        return {"sfs_triton": {**own, **self._told, "batch_size": self._batch_size}, "speed": self.tally.summary()}


def _begin_of_text(text: TextCodec, name: str) -> list[int]:
    token = text.special.get("bos_token")
    index = None if token is None else text.token_id(token)
    require(index is not None, f"model_args: add_bos_token=True, but {name!r} names no begin-of-text token")
    return [index]


def _refuse(requests: Sequence[Instance]) -> None:
    tasks = sorted({request.task_name or "?" for request in requests})
    raise NotImplementedError(
        f"task {', '.join(tasks)}: needs log-likelihoods, of which a masked-diffusion model has none that a few passes "
        "give; use a task that generates its answers (mmlu_generative for mmlu, arc_challenge_chat for arc_challenge)"
    )


def main() -> None:
    """Entry point of the console script ``sfs-eval``."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SfsError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    finally:
        _leave()
    if os.environ.get("RANK", "0") == "0":
        for tally in _TALLIES:
            print(tally.table())


if __name__ == "__main__":
    main()
