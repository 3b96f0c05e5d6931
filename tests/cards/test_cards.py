"""Predictions for a card, by name."""

from __future__ import annotations

import pytest

from bench.cost.cost_model import CEILINGS
from sfs_triton.cards import CARDS, RESERVED, WEIGHT_BYTES, canvases_that_fit, model_bytes, step_seconds
from sfs_triton.decoding.caching import NoCache, RefreshCache, RegionCache
from sfs_triton.models.geometries import REAL
from sfs_triton.ops.dispatch import FORMATS

LLADA = REAL["llada-8b"]


def test_every_format_of_weights_has_a_size():
    """But for int8, which is for CPUs."""
    assert WEIGHT_BYTES.keys() == {None, *FORMATS} - {"int8"}


def test_the_cost_model_has_the_same_card():
    assert CEILINGS["h200"].bytes_per_second == CARDS["h200"].bandwidth


def test_size_of_a_checkpoint():
    """LLaDA-8B's files are 16.03 GB of 16-bit numbers: matrices, embedding, head, and norms of half a megabyte."""
    assert model_bytes(LLADA, None) == pytest.approx(16.03e9, rel=1e-3)
    assert model_bytes(LLADA, "fp8") == pytest.approx(16.03e9 / 2 + 126464 * 4096, rel=1e-3)
    tied = REAL["illada-8b"]
    assert model_bytes(tied, "fp8") > model_bytes(tied, None) / 2 + tied.vocab_size * tied.d_model


@pytest.mark.parametrize(("card", "ms"), [("h200", 3.75), ("h100", 5.37), ("rtx4090", 16.96)])
def test_a_step_of_few_positions_streams_the_weights(card, ms):
    """15.0 GB of weights and 1.1 GB of keys and values at 2,124 positions, by the card's bandwidth."""
    assert 1e3 * step_seconds(CARDS[card], LLADA, None, 128, 2124, 64) == pytest.approx(ms, rel=5e-3)


def test_a_full_step_is_bound_by_arithmetic():
    full = step_seconds(CARDS["h200"], LLADA, None, 2124, 2124, 1024)
    assert 0.035 < full < 0.044 and full == pytest.approx(step_seconds(CARDS["h200"], LLADA, "fp8", 2124, 2124, 1024))


def test_what_fits_24_gb():
    """8 GB beside the weights, less what is reserved: a canvas has 1.1 GB of keys and values, and 0.24 GB are alive."""
    memory = CARDS["rtx4090"].memory
    fits = [
        canvases_that_fit(memory, LLADA, None, policy, 2124) for policy in (NoCache(), RegionCache(), RefreshCache())
    ]
    assert fits == [23, 4, 2]
    left = memory - RESERVED - model_bytes(LLADA, None)
    one = 2 * RegionCache.store.values(LLADA, 2124)
    assert 4 * one < left < 6 * one
    assert canvases_that_fit(memory, LLADA, "fp8", RegionCache(), 2124) > fits[1]
    assert canvases_that_fit(10e9, LLADA, None, RegionCache(), 2124) == 0
