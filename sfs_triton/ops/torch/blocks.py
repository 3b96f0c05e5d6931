"""Blocks in which large intermediate results are made: below a gigabyte at LLaDA-8B, whatever the canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

# Elements at a time. Smaller problems are one block, whose bits do not depend on these numbers.
LOGITS = 2**25  # about 10 bytes each, in 16 bits, in float32 and as probabilities
SORTED = 2**23  # logits that are sorted for top-p: about 40 bytes each
NOISE = 2**22  # numbers drawn, in 64-bit integers: about 60 bytes each
WEIGHTS = 2**26  # weights decoded from 8 or 4 bits, in the dtype of the product


def blocks(total: int, width: int, most: int) -> Iterator[slice]:
    """Divide ``total`` rows of ``width`` elements into slices of at most ``most`` elements, or of single rows.

    There is at least one slice, empty for 0 rows.
    """
    size = max(1, most // max(1, width))
    for first in range(0, max(1, total), size):
        yield slice(first, min(first + size, total))


def by_rows(
    make: Callable[[slice], tuple[torch.Tensor | None, ...]], n_rows: int, width: int, most: int
) -> tuple[torch.Tensor | None, ...]:
    """Concatenate the tensors that ``make`` returns for each block of rows along their last dimension."""
    parts = [make(rows) for rows in blocks(n_rows, width, most)]
    if len(parts) == 1:
        return parts[0]
    return tuple(None if each[0] is None else torch.cat(each, -1) for each in zip(*parts, strict=True))


def rows_of(tensors: dict[str, torch.Tensor | None], rows: slice) -> dict[str, torch.Tensor | None]:
    """Slice each tensor that is there."""
    return {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}
