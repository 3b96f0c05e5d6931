"""Base of all samplers: what they share, and what the machines and cache policies ask of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...errors import check_choice, check_flag, check_integer, check_number, make_plain, require
from ...kernels.rules import BlockRules, CycleRules
from ...ops.dispatch import CalmOrBest, Draw, NearBest, NearDecided, Revocable, WithinFactor

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = 1_000_000  # of whole numbers: no canvas has so many positions
ENDS = ("free", "last", "never")
MOST_PENALTY = 10_000  # far above what logits differ by: such a penalty leaves no probability
MOST_IDS = 64  # of a sequence that ends the thinking


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Parameters that all samplers share.

    Args:
        temperature: 0 takes the most likely token; above, Gumbel noise keyed by seed, token, position and step.
        top_p, top_k: limits of the tokens that can be drawn.
        cfg_scale: classifier-free guidance, ``c + cfg_scale * (c - u)``, with the given positions masked in ``u``.
        eos_stop: stop at the leftmost committed end-of-text; later positions become end-of-text and are not computed.
        eos: ``"never"``: no token that ends a text is drawn. ``"last"``: a position at which one is chosen is committed
            when nothing else is left, by a score below all others; scores leave these tokens out.
        eos_penalty: subtracted from the logit of the end-of-text that fills canvases, not of other tokens that end a
            text; 10000 is never.
        grow: the canvas starts with so many response positions. Once they are decided, it grows by as many, until they
            hold an end-of-text or its length is reached (iLLaDA's variable length). Each part is decoded as a response
            of its own to all before it: ``steps`` are those of a part.
        end_think_token_ids, end_think_logit_boost, end_think_boost_power: while the response does not hold the whole
            sequence of tokens, each step raises one logit: at the leftmost undecided position of its block, the token
            that continues the sequence there, by ``boost * ((place + 1) / gen_length) ** power`` (iLLaDA's boost).
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    eos_stop: bool = False
    eos: str = "free"
    eos_penalty: float = 0.0
    grow: int | None = None
    end_think_token_ids: tuple[int, ...] | None = None
    end_think_logit_boost: float = 0.0
    end_think_boost_power: float = 2.0

    by_stage: ClassVar[bool] = False  # works in cycles of a slow and a fast stage, not block by block
    presets: ClassVar[Mapping[str, Sampler]] = {}  # the default first
    open_blocks: ClassVar[int] = 1  # blocks in which the first step may commit
    block_length = None

    def __post_init__(self) -> None:
        make_plain(self)
        check_number("temperature", self.temperature)
        require(
            self.temperature == 0 or self.temperature >= 1e-6,
            f"temperature={self.temperature!r} is neither 0 nor at least 1e-6",
        )
        check_number("cfg_scale", self.cfg_scale)
        check_flag("eos_stop", self.eos_stop)
        check_choice("eos", self.eos, ENDS)
        check_number("eos_penalty", self.eos_penalty, most=MOST_PENALTY)
        if self.grow is not None:
            check_integer("grow", self.grow, most=LARGEST)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            require(0 < self.top_p <= 1, f"top_p={self.top_p!r} is not in (0, 1]")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, most=LARGEST)
        self._check_end_of_think()

    def _check_end_of_think(self) -> None:
        ids, boost, power = self.end_think_token_ids, self.end_think_logit_boost, self.end_think_boost_power
        check_number("end_think_logit_boost", boost, most=MOST_PENALTY)
        check_number("end_think_boost_power", power, most=100)
        require(power > 0, f"end_think_boost_power={power!r} is not above 0")
        if ids is not None:
            fine = isinstance(ids, (list, tuple)) and 1 <= len(ids) <= MOST_IDS
            require(fine, f"end_think_token_ids={ids!r} is no list of 1 to {MOST_IDS} token ids")
            for index, token in enumerate(ids):
                check_integer(f"end_think_token_ids[{index}]", token, 0)
            object.__setattr__(self, "end_think_token_ids", tuple(ids))
        require(not boost or ids is not None, f"end_think_logit_boost={boost!r} needs end_think_token_ids")

    @classmethod
    def preset(cls, name: str | None = None, **changes: Any) -> Self:
        """Return one of ``presets``, by default the first, with some fields changed."""
        name = next(iter(cls.presets), None) if name is None else name
        check_choice("preset", name, cls.presets)
        return cls.presets[name].replace(**changes)

    @property
    def name(self) -> str | None:
        """Name of the preset that has the same settings, those aside that all samplers share; None if there is none."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(Sampler)}
        alike = ((name, all(getattr(self, f) == getattr(each, f) for f in own)) for name, each in self.presets.items())
        return next((name for name, same in alike if same), None)

    def replace(self, **changes: Any) -> Sampler:
        """Return a copy with some fields changed."""
        unknown = set(changes) - {f.name for f in fields(self)}
        require(not unknown, f"{type(self).__name__} has no setting {sorted(unknown)}")
        return replace(self, **changes)

    def draw(self) -> Draw:
        """Return the rules for drawing and scoring tokens."""
        ends = {"eos": self.eos, "eos_penalty": self.eos_penalty}
        return Draw(noise=self.temperature > 0, nucleus=self.has_nucleus, top_k=self.top_k, **ends)

    def narrowing(self) -> CalmOrBest | NearBest | NearDecided | Revocable | WithinFactor | None:
        """Return the rule that leaves the candidates that a step commits; None: the machine decides among all."""
        return None

    @property
    def has_nucleus(self) -> bool:
        """True if ``top_p`` is below 1."""
        return self.top_p is not None and self.top_p < 1

    def blanked(self) -> Sampler:
        """Return this sampler with its per-sequence numbers (:meth:`sampling_values`) blanked.

        Sequences can share a batch if these are equal."""
        nucleus = 1e-3 if self.has_nucleus else None
        return replace(self, temperature=float(self.temperature > 0), top_p=nucleus, grow=None)

    def sampling_values(self) -> dict[str, float]:
        """Return the per-sequence parameters, which may differ within a batch: those of ``SAMPLING`` that it uses."""
        return {"temperature": self.temperature or 1.0, "top_p": self.top_p if self.has_nucleus else math.inf}

    def block_steps(self, length: int) -> int:
        """Return the steps that a schedule gives to each block of ``length`` response positions; 0 without one."""
        return 0

    def schedule_sizes(self, longest: int) -> dict[str, int]:
        """Return the sizes of the tensors that hold a sequence's schedule, for responses of up to ``longest``."""
        return {}

    def schedule(self, length: int, seed: int) -> dict[str, list[float] | torch.Tensor]:
        """Return the values of those tensors for one sequence."""
        return {}

    @property
    def most_candidates(self) -> int | None:
        """Most positions that a step may commit; None if the canvas is the limit."""
        return self.block_length

    def check_cache(self, policy) -> None:
        """Refuse a cache policy that does not work with this sampler."""
        require(
            policy.name != "delayed",
            f"cache={policy.name!r} does not go with {type(self).__name__}: it is for the open blocks of MultiBlock",
        )

    @abstractmethod
    def rules(
        self, opening: str = "normal", *, look_ahead: int = 0, partial: bool = False, span_cap: int | None = None
    ) -> BlockRules | CycleRules:
        """Return the rules of the state machine; arguments come from the cache policy."""

    @abstractmethod
    def step_cap(self, length: int) -> int:
        """Return a step limit for ``length`` positions: more than it can take."""

    @property
    def least_length(self) -> int:
        """Least response length; for infilling, where ``gen_length`` must be valid and is not used."""
        return self.grow or self.block_length or 1

    def check_length(self, length: int) -> None:
        """Refuse a response length that is not a multiple of the block length, or of the parts that it grows by."""
        block = self.block_length
        if self.grow is not None:
            require(length % self.grow == 0, f"gen_length={length} is not a multiple of grow={self.grow}")
            fits = block is None or self.grow % block == 0
            require(fits, f"grow={self.grow} is not a multiple of block_length={block}")
        require(block is None or length % block == 0, f"gen_length={length} is not a multiple of block_length={block}")


@dataclass(frozen=True, kw_only=True)
class BlockSampler(Sampler):
    """Base of samplers that decode block by block.

    Args:
        block_length: length of a block; None is one block.
    """

    block_length: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length is not None:
            check_integer("block_length", self.block_length, most=LARGEST)

    @abstractmethod
    def selection(self) -> dict[str, Any]:
        """Return the fields of ``BlockRules`` that say which positions a step commits."""

    def step_cap(self, length: int) -> int:
        """Return a step limit for ``length`` positions: a step that decides commits one, and a block may open twice."""
        return 2 * length + 2

    def share_of_steps(self, steps: int, length: int) -> int:
        """Return the steps of a schedule per block of ``length`` response positions: rounded down, at least 1."""
        return max(1, steps // -(-length // (self.block_length or length)))

    def rules(
        self,
        opening: str = "normal",
        *,
        look_ahead: int = 0,
        partial: bool = False,
        span_cap: int | None = None,
        **delays: int | None,
    ) -> BlockRules:
        """Return the rules of the block machine; arguments come from the cache policy.

        ``look_ahead`` and ``span_cap`` are for the cycle machine; blocks have neither. ``delays`` are ``delay`` and
        ``refresh_every`` of blocks that are cached one by one.
        """
        how = {"block_length": self.block_length, "opening": opening, "eos_stop": self.eos_stop, "partial": partial}
        return BlockRules(**self.selection(), **how, **delays)
