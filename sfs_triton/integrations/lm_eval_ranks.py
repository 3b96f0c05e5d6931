"""Processes that share an evaluation, over gloo; and those of them that share a model."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed

from ..decoding.caching import CachePolicy
from ..decoding.samplers import Sampler
from ..distributed import Group, close, join
from ..engine import Engine
from ..errors import RankFailure, RowFault

PATIENCE = timedelta(days=7)  # ranks with long answers may keep the others waiting


class Ranks:
    """This process among those that ``torchrun`` or ``accelerate launch`` has started; alone without them.

    Of processes that share a model, ``together`` neighbours each, only the first has a part in the evaluation; they
    count as one here.
    """

    def __init__(self, together: int = 1) -> None:
        rank, size, self.local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        self.rank, self.size, self._together = rank // together, size // together, together
        self._group = None
        if self.size > 1:
            if distributed.is_initialized():  # by whom and for which devices ever
                first = list(range(0, size, together))
                self._group = distributed.new_group(first, backend="gloo", timeout=PATIENCE)
            else:
                distributed.init_process_group("gloo", timeout=PATIENCE)
                atexit.register(leave)  # threads of gloo's that outlive the interpreter abort the process

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
        distributed.gather_object(item, parts, dst=to * self._together, group=self._group)
        return parts

    def wait(self) -> None:
        distributed.barrier(group=self._group)


class Team:
    """Processes that share a model: the first evaluates, and the others decode what it decodes.

    Args:
        size: how many they are.
        device: of the model.
    """

    def __init__(self, size: int, device: Any):
        self.group = join(size, device, replicas=True)
        self._orders: Group = join(size, "cpu", replicas=True, patience=PATIENCE)
        if size > 1:
            _TEAMS.append(self)
            atexit.register(leave)

    @property
    def leads(self) -> bool:
        return self.group.rank == 0

    def end(self) -> None:
        """Tell the others that this process is done; they are gone then."""
        if self.leads:
            with suppress(RankFailure):  # then they know
                self._orders.exchange("")

    def tell(self, ids: Sequence[list[int]], length: int, sampler: Sampler, seeds: Sequence[int]) -> None:
        """Have the others decode this as well."""
        if self.group.size > 1:
            order = {"ids": list(ids), "length": length, "sampler": asdict(sampler), "seeds": list(seeds)}
            self._orders.exchange(json.dumps(order))

    def follow(self, engine: Engine, kind: type[Sampler], policy: CachePolicy) -> NoReturn:
        """Decode what the first is told to, until it is done; then end this process.

        Raises:
            RankFailure: the first is gone.
        """
        while order := self._orders.exchange("")[0]:
            told = json.loads(order)
            how = {"gen_length": told["length"], "sampler": kind(**told["sampler"]), "cache": policy}
            with suppress(RowFault):  # which the first has as well
                engine.generate(told["ids"], seed=told["seeds"], **how)
        raise SystemExit(0)


_TEAMS: list[Team] = []  # that this process is in


def leave() -> None:
    """End all groups that this process is in."""
    while _TEAMS:
        _TEAMS.pop().end()
    close()
