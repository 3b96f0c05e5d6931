"""One rank of two, as far as loading needs it."""

from __future__ import annotations

from sfs_triton.distributed import Group


class Rank(Group):
    """A rank that never communicates with the other."""

    size = 2

    def __init__(self, rank: int):
        self.rank = rank
