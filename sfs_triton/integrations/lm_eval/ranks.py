"""Process groups of an evaluation, over gloo: ranks that share its requests, and tensor-parallel groups."""

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

from ...decoding.likelihood import Likelihood, LikelihoodParams
from ...decoding.params import DecodingParams
from ...distributed import Group, close, join
from ...engine import Engine
from ...errors import RankFailure, SequenceFault
from ...scheduling.outputs import Generation

PATIENCE = timedelta(days=7)  # ranks may wait long for others with long answers


class Ranks:
    """Ranks started by ``torchrun`` or ``accelerate launch``; a single rank without them.

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
        """Return the items of all ranks on rank ``to``, None on the others."""
        parts = [None] * self.size if self.rank == to else None
        distributed.gather_object(item, parts, dst=to * self._together, group=self._group)
        return parts

    def wait(self) -> None:
        distributed.barrier(group=self._group)


class TPGroup:
    """Tensor-parallel group of processes that share a model: the first evaluates, the others compute the same batches.

    Args:
        size: number of processes.
        device: device of the model.
    """

    def __init__(self, size: int, device: Any):
        self.group = join(size, device, replicas=True)
        self._batches: Group = join(size, "cpu", replicas=True, patience=PATIENCE)
        if size > 1:
            _GROUPS.append(self)
            atexit.register(leave)

    @property
    def leads(self) -> bool:
        return self.group.rank == 0

    def end(self) -> None:
        """End the other processes; called by the first when it is done."""
        if self.leads:
            with suppress(RankFailure):  # they have ended already
                self._batches.exchange("")

    def generate(
        self, engine: Engine, ids: Sequence[list[int]], params: DecodingParams, seeds: Sequence[int]
    ) -> list[Generation]:
        """Decode a batch, on the other processes as well."""
        self._send({"ids": list(ids), "params": params.to_dict(), "seeds": list(seeds)})
        return _generate(engine, ids, params, seeds)

    def likelihood(
        self,
        engine: Engine,
        pairs: Sequence[tuple[list[int], list[int]]],
        params: LikelihoodParams,
        seeds: Sequence[int],
        batch_size: int,
    ) -> list[Likelihood]:
        """Estimate likelihoods, on the other processes as well."""
        how = {"seed": list(seeds), "batch_size": batch_size, **asdict(params)}
        self._send({"pairs": pairs, "how": how})
        return engine.likelihood(pairs, **how)

    def _send(self, batch: dict[str, Any]) -> None:
        if self.group.size > 1:
            self._batches.exchange(json.dumps(batch))

    def follow(self, engine: Engine) -> NoReturn:
        """Compute the batches of the first process until it is done; then exit.

        Raises:
            RankFailure: the first process has ended.
        """
        while received := self._batches.exchange("")[0]:
            batch = json.loads(received)
            with suppress(SequenceFault):  # the first process has the same fault
                if "pairs" in batch:
                    engine.likelihood(batch["pairs"], **batch["how"])
                    continue
                _generate(engine, batch["ids"], DecodingParams.parse(**batch["params"]), batch["seeds"])
        raise SystemExit(0)


def _generate(
    engine: Engine, ids: Sequence[list[int]], params: DecodingParams, seeds: Sequence[int]
) -> list[Generation]:
    how = {"gen_length": params.gen_length, "sampler": params.sampler, "cache": params.cache}
    return engine.generate(ids, seed=seeds, **how)


_GROUPS: list[TPGroup] = []  # tensor-parallel groups of this process


def leave() -> None:
    """End the tensor-parallel groups of this process and leave all process groups."""
    while _GROUPS:
        _GROUPS.pop().end()
    close()
