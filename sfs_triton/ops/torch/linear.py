"""Linear layer with weights in 8 or 4 bits in plain torch, and the quantisation of such weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import blocks, int4
from .int8 import LARGEST, int8_linear

GROUPS = {"int4": 128, "int4-64": 64}  # weights of a row that share a scale
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, **dict.fromkeys(GROUPS, torch.uint8)}  # of codes


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix ``[N, K]`` in 8 or 4 bits an element. Sliced by rows, without a copy.

    In 8 bits it is near ``codes * scale[:, None]``; 4 bits are as in :mod:`.int4`.
    """

    codes: torch.Tensor  # [N, K], float8_e4m3fn or, on a CPU, int8; or [N, K / 2], uint8: two weights per byte
    scale: torch.Tensor  # [N], float32; of 4 bits [groups, N]
    zero: torch.Tensor | None = None  # of 4 bits: the codes of zero, uint8 [groups, N]; None: 8

    @classmethod
    def empty(cls, n_out: int, n_in: int, form: str, device: torch.device) -> Quantised:
        """Allocate a matrix of a format, without zero points."""
        group = GROUPS.get(form)
        codes = torch.empty(n_out, n_in if group is None else n_in // 2, dtype=FORMATS[form], device=device)
        shape = (n_out,) if group is None else (n_in // group, n_out)
        return cls(codes, torch.empty(shape, dtype=torch.float32, device=device))

    def __getitem__(self, rows: slice) -> Quantised:
        zero = None if self.zero is None else self.zero[..., rows]
        return Quantised(self.codes[rows], self.scale[..., rows], zero)

    @property
    def shape(self) -> torch.Size:
        n_out, width = self.codes.shape
        return torch.Size((n_out, width if self.group is None else 2 * width))

    @property
    def group(self) -> int | None:
        """Number of weights that share a scale; None: a whole row."""
        return 2 * self.codes.shape[1] // len(self.scale) if self.codes.dtype == torch.uint8 else None

    @property
    def form(self) -> str:
        """Name of the format, among those of the same codes that with groups of this size."""
        names = [name for name, dtype in FORMATS.items() if dtype == self.codes.dtype]
        return next((name for name in names if GROUPS.get(name) == self.group), names[0])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scale, self.zero) if x is not None)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix in ``dtype``, each weight rounded once."""
        return dequantise(self.codes, self.scale, dtype, self.zero)


Matrix = torch.Tensor | Quantised


def quantize(weight: torch.Tensor, form: str = "fp8") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of ``weight [N, K]``, as a :class:`Quantised` has them: 8 bits have a scale per row.

    A row's largest magnitude becomes the largest code, 448 in float8 (e4m3) and 127 in int8; zeros only: scale 1.
    Rounding is to the nearest, ties to even, so an element is off by at most ``max(|w| / 16, scale / 1024)`` in float8
    and by ``scale / 2`` in int8. A row with NaN or infinities (in float32) has no such codes: its scale is not finite,
    and the caller checks that. :func:`.int4.quantize` has the rules of 4 bits.

    Raises:
        ValueError: not a float matrix, or its rows are no whole groups.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is a {weight.dtype} tensor of shape {list(weight.shape)}, not a float matrix")
    if (group := GROUPS.get(form)) is not None:
        if weight.shape[1] % group:
            raise ValueError(f"weight has rows of {weight.shape[1]}, which are no whole groups of {group}")
        return int4.quantize(weight, group)
    wide = weight.float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    # rows close to zero: a scale that is not subnormal keeps the quotients finite
    most = LARGEST if form == "int8" else torch.finfo(FORMATS[form]).max
    scale = torch.where(largest == 0, 1.0, (largest / most).clamp(min=torch.finfo(torch.float32).tiny))
    codes = wide / scale[:, None]
    return (codes.round_() if form == "int8" else codes).to(FORMATS[form]), scale


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    decode: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x @ W^T`` for ``W`` of the codes ``weight``, plus ``residual`` if given. ``W`` is converted to ``x``'s dtype
    first, by ``decode`` in place of :func:`dequantise` if that is given; of int8 weights the codes are multiplied,
    with ``x`` rounded to int8."""
    decode = decode or dequantise
    n_out, n_in = weight.shape[0], x.shape[-1]
    if weight.dtype == torch.int8:
        out = int8_linear(x, weight, scale)
    elif n_out * n_in <= blocks.WEIGHTS:
        out = F.linear(x, decode(weight, scale, x.dtype, zero))
    else:
        out = x.new_empty(*x.shape[:-1], n_out)
        matrix = Quantised(weight, scale, zero)
        for rows in blocks.blocks(n_out, n_in, blocks.WEIGHTS):
            part = matrix[rows]
            out[..., rows] = F.linear(x, decode(part.codes, part.scale, x.dtype, part.zero))
    return out if residual is None else out + residual


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrix of codes, computed in float32 or wider and rounded to ``dtype`` once."""
    if codes.dtype == torch.uint8:
        return int4.dequantise(codes, scale, zero, dtype)
    # every code is exact in 16 bits; the product with a float32 scale is computed in float32 wherever it is stored
    return codes.to(dtype).mul_(scale[:, None])
