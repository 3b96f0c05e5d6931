"""Process groups of an evaluation, over gloo: ranks that share its requests, teams that share a model."""

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

from ...decoding.caching import CachePolicy
from ...decoding.samplers import Sampler
from ...distributed import Group, close, join
from ...engine import Engine
from ...errors import RankFailure, RowFault

PATIENCE = timedelta(days=7)  # ranks may wait long for others with long answers


class Ranks:
    """The ranks started by ``torchrun`` or ``accelerate launch``; a single rank without them.

    ``together`` neighbouring processes share a model. Only the first of them takes part in the evaluation, and they
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
            if distributed.is_initialized():  # by any library, for any device
                first = list(range(0, size, together))
                self._group = distributed.new_group(first, backend="gloo", timeout=PATIENCE)
            else:
                distributed.init_process_group("gloo", timeout=PATIENCE)
                atexit.register(leave)  # gloo threads that outlive the interpreter abort the process

    def device(self, asked: Any) -> Any:
        """Return the device of this rank: its own GPU, unless one is named by number."""
        if self.size > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return asked

    def all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the concatenated tensors of all ranks, on the CPU."""
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
    """Processes that share a model: the first evaluates, and the others decode the same batches.

    Args:
        size: number of processes.
        device: device of the model.
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
        """End the other processes of the team; called by the first when it is done."""
        if self.leads:
            with suppress(RankFailure):  # they have ended already
                self._orders.exchange("")

    def tell(self, ids: Sequence[list[int]], length: int, sampler: Sampler, seeds: Sequence[int]) -> None:
        """Send a batch to the other processes, which decode it as well."""
        if self.group.size > 1:
            order = {"ids": list(ids), "length": length, "sampler": asdict(sampler), "seeds": list(seeds)}
            self._orders.exchange(json.dumps(order))

    def follow(self, engine: Engine, kind: type[Sampler], policy: CachePolicy) -> NoReturn:
        """Decode the batches of the first process until it is done; then exit.

        Raises:
            RankFailure: the first process has ended.
        """
        while order := self._orders.exchange("")[0]:
            told = json.loads(order)
            how = {"gen_length": told["length"], "sampler": kind(**told["sampler"]), "cache": policy}
            with suppress(RowFault):  # the first process has the same fault
                engine.generate(told["ids"], seed=told["seeds"], **how)
        raise SystemExit(0)


_TEAMS: list[Team] = []  # teams of this process


def leave() -> None:
    """End all teams and groups of this process."""
    while _TEAMS:
        _TEAMS.pop().end()
    close()
