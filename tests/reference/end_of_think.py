"""Oracle of iLLaDA's boost of the end of thinking; rules are in the README of the recorded cases."""

from __future__ import annotations

from typing import NamedTuple

from sfs_triton.decoding.samplers import Sampler


class EndOfThink(NamedTuple):
    """The sequence of tokens that ends the thinking, and how much its next token is raised."""

    ids: tuple[int, ...] = ()
    boost: float = 0.0
    power: float = 2.0

    @classmethod
    def of(cls, sampler: Sampler) -> EndOfThink:
        ids = sampler.end_think_token_ids or ()
        return cls(ids, sampler.end_think_logit_boost, sampler.end_think_boost_power)

    def raised(self, response: list[int], place: int) -> tuple[int, float]:
        """Return the token that is raised at ``place`` of the response, and by how much: 0 once it is complete."""
        n, ids = len(self.ids), list(self.ids)
        if not n or any(response[first : first + n] == ids for first in range(len(response))):
            return 0, 0.0
        before = response[:place]
        stands = max(k for k in range(n) if k == 0 or before[-k:] == ids[:k])
        return ids[stands], self.boost * ((place + 1) / len(response)) ** self.power
