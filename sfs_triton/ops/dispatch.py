"""One name per operation, for all back ends. Models, samplers and runners call these and nothing below.

``operations`` picks once, for a device: plain torch (:mod:`sfs_triton.ops.torch`) or Triton kernels
(:mod:`sfs_triton.kernels`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..distributed import Vocabulary
from ..errors import ArgumentError, BackendError, MissingDependencyError, check_choice, first_line, require
from .torch import blocks, sharded
from .torch.confidence import Choice, Draw, filter_logits, score_of
from .torch.credit import CreditRules, Credits
from .torch.divergence import divergence
from .torch.ends import discourage, put_last, raise_logits, without_ends
from .torch.fused_linear import product
from .torch.int8 import int8_speed
from .torch.linear import FORMATS, GROUPS, Matrix, Quantised, quantize
from .torch.narrow import CalmOrBest, NearBest, NearDecided, Revocable, WithinFactor
from .torch.rope_cache import rope_tables

logger = logging.getLogger("sfs_triton")

BACKENDS = ("torch", "triton")


@dataclass(frozen=True)
class Ops:
    """An implementation of every operation; :mod:`sfs_triton.ops.torch` documents each."""

    attention: Callable[..., torch.Tensor]
    compact: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    confidence: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    decide_block: Callable[..., None]
    decide_cycle: Callable[..., None]
    embedding: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    linear_heads: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]
    linear_normed: Callable[..., Any]
    linear_silu_mul: Callable[..., torch.Tensor]
    list_positions: Callable[..., None]
    lm_head: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    lm_head_partials: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    mark_candidates: Callable[..., torch.Tensor]
    merge_partials: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    position_ranges: Callable[..., None]
    publish: Callable[..., None]
    rms_norm: Callable[..., torch.Tensor]
    rope_cache: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    scatter_choices: Callable[..., None]
    silu_mul: Callable[..., torch.Tensor]

    def product(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        bias: torch.Tensor | None = None,
        rows: slice | None = None,
        **kept: Any,
    ) -> torch.Tensor:
        """``x @ matrix^T``, plus ``bias``: ``[..., K]`` to ``[..., N]``, for ``matrix [N, K]`` or ``rows`` of it.

        A plain matrix is multiplied by torch's libraries, a quantised one by :attr:`linear`. ``kept``: the memory for
        the result, ``scratch`` and ``name`` of :func:`~sfs_triton.ops.torch.fused_linear.product`.
        """
        if rows is not None:
            matrix, bias = matrix[rows], None if bias is None else bias[rows]
        return product(x, matrix, bias, quantised=self.linear, **kept)

    def choose(
        self,
        hidden: torch.Tensor,
        head: Matrix,
        draw: Draw,
        *,
        rows: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        ends: torch.Tensor | None = None,
        credits: Credits | None = None,
        divergences: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        top_p: torch.Tensor | None = None,
        raised: torch.Tensor | None = None,
        raise_by: torch.Tensor | None = None,
        **noise: torch.Tensor | None,
    ) -> Choice:
        """Choose and score a token for each row of ``hidden [T, d]``, by ``head [V, d]``.

        ``rows`` int32 ``[T]`` selects rows of ``hidden``, of which the first ``count [1]`` are computed. ``noise``
        is ``temperature`` (float32 ``[T]``), ``seed``, ``position`` and ``step`` (int64 ``[T]``), where the draw has
        noise; ``top_p`` (float32 ``[T]``) is there where it has a nucleus, and ``ends`` (int64 ``[n]``), the tokens
        that end a text, where the draw treats them differently. The logit of ``raised [T]`` (int64) is raised by
        ``raise_by [T]`` (float32). Where the draw gives credit, ``credits`` are read and updated at ``place`` (int64
        ``[T]``); where divergence is wanted, ``divergences`` float32 ``[P]`` takes it there, from the hidden states
        ``before [T, d]`` where they are ``known [T]``. With ``vocabulary``, ``head`` is this rank's part of it: ranks
        exchange 5 or 6 numbers per row, and one more for the entropy; only top-p, top-k and the divergence gather all
        logits of a row.
        """
        if raised is None and draw.by_head:
            if isinstance(head, Quantised):
                head, noise = head.codes, noise | {"scale": head.scale}
            how = {"rows": rows, "count": count, **noise}
            if vocabulary is None:
                return Choice(*self.lm_head(hidden, head, **how))
            values, winner = self.lm_head_partials(hidden, head, vocab_start=vocabulary.start, **how)
            gathered = vocabulary.group.all_gather(sharded.pack(values, winner))
            return Choice(*self.merge_partials(*sharded.unpack(gathered)))
        if rows is not None:
            hidden, before, known = (None if x is None else x[rows.clamp(min=0)] for x in (hidden, before, known))
        kept = {"credits": credits, "divergences": divergences}
        given = noise | {"top_p": top_p, "raised": raised, "raise_by": raise_by, "place": place}
        given |= {"before": before, "known": known}
        size = head.shape[0] if vocabulary is None else vocabulary.size  # the same on all ranks, as the blocks must be

        def choose(at: slice) -> Choice:
            rows = kept | blocks.rows_of(given, at)
            return self._choose_from_logits(hidden[at], head, draw, vocabulary, ends, **rows)

        most = blocks.SORTED if draw.filtered or draw.divergence else blocks.LOGITS
        return Choice(*blocks.by_rows(choose, hidden.shape[0], size, most))

    def _choose_from_logits(
        self,
        hidden: torch.Tensor,
        head: Matrix,
        draw: Draw,
        vocabulary: Vocabulary | None,
        ends: torch.Tensor | None,
        credits: Credits | None,
        divergences: torch.Tensor | None,
        place: torch.Tensor | None,
        before: torch.Tensor | None,
        known: torch.Tensor | None,
        top_p: torch.Tensor | None,
        raised: torch.Tensor | None,
        raise_by: torch.Tensor | None,
        **noise: torch.Tensor | None,
    ) -> Choice:
        """:meth:`choose` by way of logits ``[T, V]`` in memory, for all rows of ``hidden``."""
        logits = self.product(hidden if before is None else torch.cat((hidden, before)), head)
        if vocabulary is not None and (draw.filtered or draw.divergence):
            logits, vocabulary = vocabulary.gather(logits), None
        start, entropy = 0 if vocabulary is None else vocabulary.start, None
        logits = discourage(logits, draw, ends, start)
        if draw.divergence:
            logits, then = logits.chunk(2)
            divergences.index_copy_(0, place, divergence(logits, then, known))
        if raised is not None:
            logits = raise_logits(logits, raised, raise_by, start)
        if draw.credit is not None:
            token, score = self._measure(logits.float().clone(), Draw(), vocabulary)
            earned = credits.add(place, token, score.pow(draw.credit.power), draw.credit.decay)
            logits = earned.raise_logits(logits, draw.credit.weight, start)
        rest = without_ends(logits, ends, start) if draw.eos == "last" else logits
        if draw.entropy:
            entropy = -self._measure(rest, Draw(metric="entropy"), vocabulary)[1]
        if draw.filtered:
            return Choice(*self._choose_filtered(logits, draw, ends, top_p, **noise), entropy)
        token, score = self._measure(logits, draw, vocabulary, **noise)
        if draw.eos == "last":  # the same noise draws the same token again, unless that is one of those left out
            score = put_last(token, score, self._measure(rest, draw, vocabulary, **noise)[1], ends, draw.metric)
        return Choice(token, score, entropy)

    def _measure(
        self, logits: torch.Tensor, draw: Draw, vocabulary: Vocabulary | None, **noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose and score by logits ``[T, v]``, of the whole vocabulary or of this rank's part."""
        if vocabulary is not None:
            return _choose_together(logits, draw, vocabulary, **noise)
        return self.confidence(logits, metric=draw.metric, tempered=draw.tempered, **noise)

    def _choose_filtered(
        self,
        logits: torch.Tensor,
        draw: Draw,
        ends: torch.Tensor | None,
        top_p: torch.Tensor | None,
        **noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose among the tokens that top-p and top-k leave of ``logits [T, V]``."""
        logits = logits.float()
        if draw.tempered and draw.noise:  # filtered logits are tempered already
            temperature = noise["temperature"]
            logits, noise["temperature"] = logits / temperature[:, None], torch.ones_like(temperature)
        drawn = filter_logits(logits, draw.top_k, top_p)
        rest = without_ends(drawn if draw.tempered else logits, ends) if draw.eos == "last" else None
        token, score = self._measure(drawn, draw, None, **noise)
        if not draw.tempered and draw.metric == "confidence":
            score = logits.softmax(-1).gather(-1, token[:, None].long())[:, 0]
        elif not draw.tempered:
            score = self._measure(logits, Draw(metric=draw.metric), None)[1]
        if rest is not None:
            score = put_last(token, score, score_of(rest, token.long(), draw.metric), ends, draw.metric)
        return token, score


def _choose_together(
    logits: torch.Tensor, draw: Draw, vocabulary: Vocabulary, **noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:meth:`Ops.choose` from each rank's own logits ``[T, v]``."""
    group, logits = vocabulary.group, sharded.measured(logits, draw, noise.get("temperature"))
    gathered = group.all_gather(sharded.partials(logits, draw, vocab_start=vocabulary.start, **noise))
    token, score = sharded.merge(gathered, draw.metric)
    if draw.metric == "entropy":
        score = group.all_gather(sharded.entropy(logits, score)).sum(0)
    return token, score


def check_backend(backend: str | None) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` unless ``backend`` is None or one of :data:`BACKENDS`."""
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def operations(backend: str | None, device: torch.device) -> Ops:
    """Return the operations for ``device``, all by ``backend``; None is torch.

    On every GPU ``publish`` is a kernel, imported when it is first launched: a captured graph needs it, and plain torch
    has no store to host memory that a graph can hold.

    Raises:
        ArgumentError: ``backend`` is unknown, or cannot run on ``device``.
        MissingDependencyError: ``backend="triton"`` and triton is not installed.
    """
    check_backend(backend)
    module = _module(backend or "torch", device)
    ops = Ops(**{field.name: getattr(module, field.name) for field in fields(Ops)})
    return replace(ops, publish=_publish_on_gpu) if device.type == "cuda" and backend != "triton" else ops


def check_kernels(device: torch.device) -> None:
    """Launch one small kernel: the first needs a C compiler, and better fails before weights are read.

    Raises:
        BackendError: it does not run; says why.
    """
    from ..kernels.publish import publish

    counter = torch.zeros(1, dtype=torch.int64, device=device)
    published = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    try:
        publish([], [], counter, published)
    except Exception as error:  # of whatever Triton calls: compilers, linkers, drivers
        raise BackendError(f"Triton's kernels cannot run on device {str(device)!r}: {first_line(error)}") from error


def check_int8(device: torch.device, backend: str | None) -> None:
    """Raise unless int8 weights can be multiplied on ``device``.

    Raises:
        ArgumentError: it is no CPU, or the back end is not torch.
        BackendError: this CPU's products are not exact.
    """
    on_cpu = device.type == "cpu" and backend != "triton"
    require(
        on_cpu, f"quantization='int8' is for backend 'torch' on a CPU, not {backend or 'torch'!r} on {str(device)!r}"
    )
    speed = int8_speed()
    if speed is None:
        raise BackendError("quantization='int8' needs a CPU with exact products of int8: AVX-512 VNNI, AVX-VNNI or AMX")
    if speed < 1:
        logger.warning("products in int8 take %.1f times as long as in float32 on this CPU", 1 / speed)


def _publish_on_gpu(*arguments: object) -> None:
    from ..kernels.publish import publish

    publish(*arguments)


def _module(backend: str, device: torch.device):
    if backend == "triton":
        try:
            import triton
        except ImportError:
            raise MissingDependencyError("backend='triton' needs the package triton: pip install triton") from None
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ArgumentError(
                f"backend='triton' cannot run on device {str(device)!r}: kernels need a GPU, or TRITON_INTERPRET=1 in "
                "the environment before triton is imported (slow; for tests)"
            )
    return importlib.import_module(f".{backend}_backend", __package__)


__all__ = [
    "CalmOrBest",
    "Choice",
    "CreditRules",
    "Credits",
    "Draw",
    "FORMATS",
    "GROUPS",
    "Matrix",
    "NearBest",
    "NearDecided",
    "Ops",
    "Quantised",
    "Revocable",
    "WithinFactor",
    "check_backend",
    "check_int8",
    "check_kernels",
    "operations",
    "quantize",
    "rope_tables",
]
