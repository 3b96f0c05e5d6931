"""Likelihoods of answers, from forwards of their canvases in which some of the answer is masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..decoding.likelihood import Likelihood, LikelihoodParams
from ..decoding.samplers import FixedSteps
from ..errors import NumericalFault, OutOfDeviceMemory, first_line
from ..models import Transformer
from ..models.cache import Scope
from .cuda_graph import launching
from .faults import is_lack_of_memory

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows [T, d] and their tokens [T]: float [T, n]


class Question(NamedTuple):
    """Token ids of a prompt and of its answer, and the seed of the answer's masks."""

    prompt: list[int]
    answer: list[int]
    seed: int = 0

    @property
    def length(self) -> int:
        """Positions of prompt and answer."""
        return len(self.prompt) + len(self.answer)


class MaskedCopy(NamedTuple):
    """A copy of the canvas of question ``index`` with masks at ``places`` of the answer."""

    index: int
    places: list[int]


class LikelihoodRunner:
    """Estimate the likelihoods of answers.

    Copies of any questions share a forward. Logits are computed at masks alone, in blocks, and reduced at once.

    Args:
        batch_size: copies per forward. It changes no value but by rounding.
    """

    def __init__(self, model: Transformer, questions: Sequence[Question], params: LikelihoodParams, batch_size: int):
        self._model, self._questions = model, questions
        self._params, self._batch_size = params, batch_size
        self._tail = [model.spec.eos_id] if params.pad_eos else []
        self._forwards = [0] * len(questions)
        # long ones first: out of memory shows early, and few copies are padded
        self._order = sorted(range(len(questions)), key=lambda index: -questions[index].length)

    def run(self) -> list[Likelihood]:
        """Return the likelihood of each answer.

        Raises:
            NumericalFault: the model produced NaN; ``finished`` has the likelihoods of the other answers.
            OutOfDeviceMemory: names the batch size.
        """
        try:
            values = self._monte_carlo() if self._params.method == "monte-carlo" else self._by_confidence()
            greedy = self._greedy() if self._params.check_greedy else [None] * len(values)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            longest = self._questions[self._order[0]].length
            raise OutOfDeviceMemory(
                f"batch_size={self._batch_size} canvases of up to {longest} positions do not fit "
                f"{str(self._model.device)!r}: {first_line(error)}; use a smaller batch_size"
            ) from error
        done = [Likelihood(*each) for each in zip(values, greedy, self._forwards, strict=True)]
        broken = [index for index, each in enumerate(done) if math.isnan(each.value)]
        if broken:
            finished = {index: each for index, each in enumerate(done) if index not in broken}
            raise NumericalFault(f"the model produced NaN logits: answers {broken}", finished)
        return done

    # ---------------------------------------------------------------------------------------------------- estimates

    def _monte_carlo(self) -> list[float]:
        values = [0.0] * len(self._questions)
        for copy, losses in self._measured(self._drawn_copies(), self._losses):
            length = len(self._questions[copy.index].answer)
            values[copy.index] -= sum(losses) * length / len(copy.places) / self._params.mc_num
        return values

    def _drawn_copies(self) -> Iterator[MaskedCopy]:
        for index in self._order:
            question, params = self._questions[index], self._params
            for places in draw_masks(len(question.answer), params.mc_num, params.mc_batch, question.seed):
                yield MaskedCopy(index, places)

    def _by_confidence(self) -> list[float]:
        values = [0.0] * len(self._questions)

        def reveal(copy: MaskedCopy, losses: Sequence[float]) -> bool:
            best = min(range(len(losses)), key=losses.__getitem__)
            values[copy.index] -= losses[best]
            del copy.places[best]
            return bool(copy.places)

        self._reveal(reveal, self._losses)
        return values

    def _greedy(self) -> list[bool]:
        equal = [True] * len(self._questions)

        def reveal(copy: MaskedCopy, choices: Sequence[tuple[float, float]]) -> bool:
            best = max(range(len(choices)), key=lambda row: choices[row][0])
            equal[copy.index] = bool(choices[best][1])  # a wrong token ends it
            del copy.places[best]
            return equal[copy.index] and bool(copy.places)

        self._reveal(reveal, self._choices)
        return equal

    def _reveal(self, reveal: Callable[[MaskedCopy, Sequence], bool], measure: Measure) -> None:
        """Reveal one token of each answer per forward, by ``reveal``, which returns whether the answer needs more."""
        left = [MaskedCopy(index, list(range(len(self._questions[index].answer)))) for index in self._order]
        while left:
            left = [copy for copy, measured in self._measured(left, measure) if reveal(copy, measured)]

    # ----------------------------------------------------------------------------------------------------- forwards

    def _losses(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._model.cross_entropy(hidden, tokens)

    def _choices(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of each row's most probable token, and whether that is the answer's."""
        choice = self._model.choose(hidden, FixedSteps().draw())
        return torch.stack((choice.score, (choice.token == tokens).float()), -1)

    def _measured(self, copies: Iterable[MaskedCopy], measure: Measure) -> Iterator[tuple[MaskedCopy, list]]:
        """Yield each copy with ``measure`` of its masked places."""
        copies = iter(copies)
        while batch := list(islice(copies, self._batch_size)):
            with launching(self._model.device.type):
                measured = self._measure(batch, measure)
            values = measured.tolist()  # one read per forward
            for copy in batch:
                self._forwards[copy.index] += self._params.branches
                count = len(copy.places)
                yield copy, values[:count]
                values = values[count:]

    @torch.inference_mode()
    def _measure(self, batch: Sequence[MaskedCopy], measure: Measure) -> torch.Tensor:
        """Forward some copies; return ``measure`` of all masked places, copy by copy."""
        model, guided = self._model, self._params.cfg_scale
        with torch.device("cpu"):  # not the caller's default device
            tokens, masks, wanted, lengths = self._canvases(batch)
            rows = (masks >= 0).flatten().nonzero()[:, 0]
            select = (masks - int(model.spec.shifted)).clamp_(min=0)
            prompts = torch.tensor([len(self._questions[copy.index].prompt) for copy in batch])[:, None]
            blank = tokens.masked_fill(torch.arange(tokens.shape[1]) < prompts, model.spec.mask_id)
            ranges = torch.stack((0 * lengths, lengths, lengths, lengths), 1).int()
        alike = bool((lengths == tokens.shape[1]).all())
        key_range = None if alike else ranges.to(model.device)  # keys behind a canvas are not read
        scope = Scope(0, tokens.shape[1], tokens.shape[1], key_range=key_range)
        select = select.to(model.device)
        hidden = model.forward(tokens.to(model.device), scope, select=select)
        if guided:
            hidden = hidden + guided * (hidden - model.forward(blank.to(model.device), scope, select=select))
        return measure(hidden.flatten(0, 1)[rows.to(model.device)], wanted.to(model.device))

    def _canvases(self, batch: Sequence[MaskedCopy]) -> tuple[torch.Tensor, ...]:
        """Return masked canvases ``[b, L]``, positions of their masks ``[b, m]``, -1 idle, the tokens there, one after
        another, and the lengths of the canvases."""
        rows, masks, wanted = [], [], []
        for copy in batch:
            question = self._questions[copy.index]
            canvas = torch.tensor(question.prompt + question.answer + self._tail)
            at = torch.tensor(copy.places) + len(question.prompt)
            wanted.append(canvas[at])
            canvas[at] = self._model.spec.mask_id
            rows.append(canvas)
            masks.append(at)
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, True), pad_sequence(masks, True, -1), torch.cat(wanted), lengths


def draw_masks(length: int, mc_num: int, mc_batch: int, seed: int) -> Iterator[list[int]]:
    """Draw ``mc_num`` sets of places to mask in an answer of ``length``: the draws of LLaDA's evaluation.

    The number of masks of the first copy of every ``mc_batch`` is uniform in 1..length; the others' go on from there
    in equal steps, and from ``length`` round to 1. The draws are those of torch's CPU generator after
    ``manual_seed(seed)``: per batch that number, then a permutation per copy.
    """
    random = torch.Generator("cpu").manual_seed(seed)
    for _ in range(mc_num // mc_batch):
        first = int(torch.randint(1, length + 1, (), generator=random, device="cpu"))
        last = first + (mc_batch - 1) * (length / mc_batch)
        counts = torch.linspace(first, last, mc_batch, dtype=torch.float32, device="cpu").round().long()
        for count in ((counts - 1) % length + 1).tolist():
            order = torch.randperm(length, generator=random, device="cpu")
            yield (order < count).nonzero()[:, 0].tolist()
