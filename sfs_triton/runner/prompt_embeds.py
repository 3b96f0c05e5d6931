"""Prompt positions given as vectors: a projector's images, say, in place of the embeddings of token ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ..errors import as_plain, check_integer, require
from ..models import Transformer


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """``vectors [n, d]``, on the model's device and in its dtype, for the embeddings of ``places`` of a prompt."""

    places: tuple[int, ...]
    vectors: torch.Tensor

    @classmethod
    def parse(cls, name: str, given: Any, length: int, model: Transformer) -> PromptEmbeds:
        """Check a pair of places and vectors, the argument ``name``, for a prompt of ``length``; None is no place.

        Raises:
            ArgumentError: names the shape, dtype, place or vector at fault.
        """
        width = model.spec.d_model
        if given is None:
            return cls((), torch.empty((0, width), dtype=model.dtype, device=model.device))
        fine = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
        require(fine, f"{name} is a {type(given).__name__}, not a pair of places and vectors")
        places, vectors = given
        kind = type(vectors).__name__
        require(isinstance(vectors, (torch.Tensor, numpy.ndarray)), f"{name}: the vectors are a {kind}, not a tensor")
        vectors, places = torch.as_tensor(vectors), as_plain(places)
        require(isinstance(places, Sequence), f"{name}: the places are {places!r}, not a list of positions")
        places = [as_plain(place) for place in places]
        shape = list(vectors.shape)
        require(shape == [len(places), width], f"{name}: the vectors have shape {shape}, not {[len(places), width]}")
        require(vectors.is_floating_point(), f"{name}: the vectors have dtype {vectors.dtype}, which is no float")
        for place in places:
            check_integer(f"{name}: place", place, 0, length - 1)
        twice = next((place for place, count in Counter(places).items() if count > 1), None)
        require(twice is None, f"{name}: place {twice} is given twice")
        vectors = vectors.detach().to(model.device, model.dtype)
        wrong = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        require(not wrong, f"{name}: the vectors at places {[places[n] for n in wrong[:4]]} have NaN or infinities")
        return cls(tuple(places), vectors)

    def digest(self) -> str:
        """Return a digest of places and vectors, by which ranks compare them."""
        raw = self.vectors.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr(self.places).encode() + raw).hexdigest()
