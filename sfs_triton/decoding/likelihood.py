"""Likelihoods of given answers: how they are estimated, and their values."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import check_choice, check_flag, check_integer, check_number, make_plain, require

METHODS = ("monte-carlo", "confidence")


@dataclass(frozen=True, kw_only=True)
class LikelihoodParams:
    """Parameters of a likelihood. With the seed they determine its value; batches do not.

    Args:
        method: ``"monte-carlo"`` is LLaDA's estimate, a bound of the log-likelihood over answers masked at random.
            ``"confidence"`` is iLLaDA's: the answer is revealed token by token, always the most probable one first,
            which overestimates.
        mc_num: masked copies per answer, for ``"monte-carlo"``.
        mc_batch: copies whose numbers of masks are spread evenly, as those of a batch are in LLaDA's evaluation. It
            divides ``mc_num``.
        cfg_scale: classifier-free guidance, as a sampler's.
        pad_eos: put an end-of-text behind the answer, for ``"confidence"``.
        check_greedy: find also whether greedy decoding, one token per forward, gives the answer.

    Raises:
        ArgumentError: names the argument and its value.
    """

    method: str = "monte-carlo"
    mc_num: int = 128
    mc_batch: int = 32
    cfg_scale: float = 0.0
    pad_eos: bool = False
    check_greedy: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("method", self.method, METHODS)
        check_integer("mc_num", self.mc_num)
        check_integer("mc_batch", self.mc_batch)
        check_number("cfg_scale", self.cfg_scale)
        check_flag("pad_eos", self.pad_eos)
        check_flag("check_greedy", self.check_greedy)
        if self.method == "monte-carlo":
            fits = self.mc_num % self.mc_batch == 0
            require(fits, f"mc_num={self.mc_num} is not a multiple of mc_batch={self.mc_batch}")
            require(not self.pad_eos, "pad_eos=True goes with method='confidence' only")

    @property
    def branches(self) -> int:
        """Forwards per masked copy: two with guidance."""
        return 2 if self.cfg_scale else 1

    def forwards(self, length: int) -> int:
        """Return the forwards of one canvas that an answer of ``length`` tokens takes, at most."""
        check_integer("length", length)
        copies = self.mc_num if self.method == "monte-carlo" else length
        return self.branches * (copies + length * self.check_greedy)


@dataclass(frozen=True)
class Likelihood:
    """Estimated log-likelihood of an answer after its prompt: ``value`` in nats, for the whole answer.

    ``greedy``: greedy decoding gives the answer; None where that was not checked. ``forwards``: forwards of its canvas.
    """

    value: float
    greedy: bool | None
    forwards: int
