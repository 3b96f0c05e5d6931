"""Tensor parallelism: each process holds a part of every matrix, and all take the same steps on the same sequences.

A :class:`Group` is the interface of models to ``torch.distributed``; a group of one does nothing. :func:`join` builds
the group from the processes that ``torchrun`` has started.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed

from .errors import ArgumentError, RankFailure, SequenceFault, check_integer, first_line, require

PATIENCE = "SFS_TRITON_PATIENCE"  # environment: seconds that a rank waits for the others; loading takes part of them
_DEFAULT_PATIENCE = 600.0


def share(total: int, rank: int, size: int) -> tuple[int, int]:
    """Return the part ``[start, stop)`` of ``total`` items of one of ``size`` ranks; parts differ by one at most."""
    return total * rank // size, total * (rank + 1) // size


class Group:
    """Process group of one; base class of larger ones. ``rank`` counts from 0 to ``size - 1``."""

    rank, size = 0, 1

    def share(self, total: int) -> tuple[int, int]:
        """Return the part ``[start, stop)`` of ``total`` items of this rank."""
        return share(total, self.rank, self.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' ``x``, in its dtype, and the same bits on every rank. ``x`` may be overwritten.

        It is summed in float32 and rounded once, so that 16-bit models lose nothing by the number of ranks but the
        rounding of each rank's part.
        """
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the ranks' ``x``, all of one shape, as ``[size, *x.shape]``."""
        return x[None]

    def exchange(self, text: str) -> list[str]:
        """Exchange one text per rank. Waits for all ranks."""
        return [text]

    def leave(self, why: str) -> None:
        """Leave the group. Other ranks raise ``RankFailure`` at their next call; this object is unusable afterwards."""

    @contextmanager
    def generation(self, request: Callable[[], str]) -> Iterator[None]:
        """Hold the group for one generation, identified by ``request``, which must be equal on all ranks.

        Raises:
            ArgumentError: the ranks have different requests, or this thread is at another generation.
        """
        yield

    # ------------------------------------------------------------------------------------------- made of the above

    def first(self, make: Callable[[], str]) -> str:
        """Return the result of ``make`` on rank 0; other ranks do not call it.

        Raises:
            RankFailure: it failed; raised on all ranks but rank 0, which raises its own error.
        """
        made = ""
        with self.together("rank 0's part"):
            made = make() if self.rank == 0 else ""
        return self.exchange(made)[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Fail on all ranks if one rank fails in the block.

        Raises:
            RankFailure: says which ranks failed and why; those that did raise their own error.
        """
        mine: Exception | None = None
        try:
            yield
        except RankFailure:
            raise  # the others cannot be reached
        except Exception as error:
            mine = error
        errors = self.exchange("" if mine is None else f"{type(mine).__name__}: {mine}")
        if mine is not None:
            raise mine
        if any(errors):
            failed = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            raise RankFailure(f"{doing} failed on {failed}")

    def any(self, mine: bool) -> bool:
        """Return whether the value is true on some rank."""
        return any(self.exchange("1" if mine else ""))

    def agree(self, what: str, value: str) -> None:
        """Check that all ranks have the same ``value``.

        Raises:
            ArgumentError: they have not, on all of them.
        """
        values = self.exchange(value)
        other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
        if other is not None:
            raise ArgumentError(
                f"ranks 0 and {other} have different {what}: {_short(values[0])} and {_short(values[other])}; every "
                "rank must make the same calls with the same arguments"
            )


ALONE = Group()


class ProcessGroup(Group):
    """Ranks of ``torch.distributed``.

    Args:
        device: group whose backend handles tensors on the model's device.
        host: group for tensors on the CPU; None: ``device`` handles those.
    """

    def __init__(self, device: distributed.ProcessGroup, host: distributed.ProcessGroup | None = None):
        self.rank, self.size = distributed.get_rank(device), distributed.get_world_size(device)
        self._device, self._host = device, device if host is None else host
        self._over: str | None = None
        self._busy, self._thread = threading.Lock(), 0
        _OPEN.append(self)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float().contiguous()
        self._call(distributed.all_reduce, wide, group=self._device)
        return wide.to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather(x, self._device)

    def exchange(self, text: str) -> list[str]:
        host = torch.device("cpu")  # whatever the caller's default device is
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=host)
        lengths = self._gather(torch.tensor([len(mine)], device=host), self._host)[:, 0].tolist()
        room = torch.zeros(max(lengths), dtype=torch.uint8, device=host)
        room[: len(mine)] = mine
        texts = self._gather(room, self._host) if len(room) else room.expand(self.size, 0)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(texts, lengths, strict=True)]

    def leave(self, why: str) -> None:
        if self._over is not None:
            return
        self._over = why
        _OPEN.remove(self)
        groups, self._device, self._host = {self._device, self._host}, None, None
        for group in groups if joined() else ():
            distributed.destroy_process_group(group)  # closes connections, which wakes waiting ranks

    @contextmanager
    def generation(self, request: Callable[[], str]) -> Iterator[None]:
        require(
            self._thread != threading.get_ident(),
            f"a generation with tensor_parallel={self.size} cannot begin inside another: finish or close that first",
        )
        with self._busy:  # one thread at a time; a different order on other ranks is detected here
            self.agree("requests", request())
            self._thread = threading.get_ident()
            try:
                yield
            except SequenceFault:
                raise  # the same error on all ranks
            except BaseException as error:
                self.leave(f"a generation ended with {type(error).__name__}: {error}")
                raise
            finally:
                self._thread = 0

    def _gather(self, x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._call(distributed.all_gather, list(out.unbind(0)), x.contiguous(), group=group)
        return out

    def _call(self, collective: Callable[..., object], *arguments: object, group: object) -> None:
        if self._over is not None:
            raise RankFailure(f"rank {self.rank} of {self.size} has left its group: {self._over}")
        try:
            collective(*arguments, group=group)
        except RuntimeError as error:
            why = first_line(error)
            self.leave(why)
            raise RankFailure(
                f"rank {self.rank} of {self.size} waited for the others in vain: one has failed, or has not come to "
                f"the same call in time ({PATIENCE}); {why}"
            ) from error


_OPEN: list[ProcessGroup] = []


class Vocabulary(NamedTuple):
    """Vocabulary split over the ranks."""

    group: Group
    size: int

    @property
    def start(self) -> int:
        """First id of this rank's part."""
        return self.group.share(self.size)[0]

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Gather logits of all ids, ``[..., V]``, from the ranks' parts. Expensive: V values per row."""
        shares = [share(self.size, rank, self.group.size) for rank in range(self.group.size)]
        most = max(stop - start for start, stop in shares)
        parts = self.group.all_gather(F.pad(logits, (0, most - logits.shape[-1])))
        return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(parts, shares, strict=True)], -1)


def world() -> tuple[int, int]:
    """Return the rank of this process among those that a launcher such as ``torchrun`` started, and their number."""
    if joined():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def joined() -> bool:
    """True once the ranks have connected: from then on, a failure on one is reported on all."""
    return distributed.is_available() and distributed.is_initialized()


def check_processes(size: object) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` unless ``size`` is a number of processes."""
    check_integer("tensor_parallel", size)
    if size > 1:
        require(distributed.is_available(), f"tensor_parallel={size}: this torch is built without torch.distributed")


def check_started(size: int) -> None:
    """Refuse unless the launcher started exactly as many processes as share one model.

    Raises:
        ArgumentError: says how many there are.
    """
    check_processes(size)
    _, there = world()
    require(
        there == size,
        f"tensor_parallel={size}, but this is one of {there} processes (WORLD_SIZE): start as many as share the model, "
        "by torchrun --nproc-per-node N, and say so (tensor_parallel=N, --tensor-parallel N)",
    )


def own_device(device: str | torch.device | None) -> str | torch.device | None:
    """Return this process's own GPU of its machine if the device is a GPU without a number."""
    meant = device is None or str(device) == "cuda"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if meant and torch.cuda.is_available() else device


def join(
    size: int,
    device: str | torch.device | None = None,
    *,
    replicas: bool = False,
    patience: timedelta | None = None,
) -> Group:
    """Join the group of ``size`` ranks that this process belongs to: all started ones, or ``size`` of them.

    Args:
        size: 1 gives a group of one, however many processes were started.
        device: of the model's tensors; default: a GPU if there is one. Ranks talk by NCCL on GPUs, else by gloo.
        replicas: allow more processes than one group has; consecutive ranks then form a group.
        patience: time that a rank waits for the others; default: from the environment, or ten minutes.

    Raises:
        ArgumentError: ``size`` is no such number, or processes were not started for it.
        RankFailure: the others have not connected in time.
    """
    check_processes(size)
    if size == 1:
        return ALONE
    rank, there = world()
    fits = there % size == 0 if replicas else there == size
    require(
        fits and there >= size,
        f"tensor_parallel={size}, but this is one of {there} processes (WORLD_SIZE): start it by "
        f"torchrun --nproc-per-node {size}",
    )
    patience = patience or _patience()
    on_gpus = str(own_device(device)).startswith("cuda")
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=patience)
            atexit.register(close)  # gloo threads that outlive the interpreter abort the process
        mine: list[distributed.ProcessGroup] = []
        for begin in range(0, there, size):  # all processes create all groups in the same order
            ranks = list(range(begin, begin + size))
            made = [distributed.new_group(ranks, backend="gloo", timeout=patience)]
            if on_gpus:
                made.insert(0, distributed.new_group(ranks, backend="nccl", timeout=patience))
            if rank in ranks:
                mine = made
    except (RuntimeError, ValueError) as error:
        why = first_line(error)
        raise RankFailure(f"rank {rank} of {there} could not meet the others: {why}") from error
    return ProcessGroup(*mine)


def close() -> None:
    """Close every group of this process; also runs at exit."""
    for group in list(_OPEN):
        group.leave("it has been closed")
    if joined():
        distributed.destroy_process_group()


def _patience() -> timedelta:
    given = os.environ.get(PATIENCE, _DEFAULT_PATIENCE)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    require(0 < seconds < 1e9, f"{PATIENCE}={given!r} in the environment is not a positive number of seconds")
    return timedelta(seconds=seconds)


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[:most] + "..."
