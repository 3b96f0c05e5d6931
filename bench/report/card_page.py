"""Render the table of cards in ``docs/cost-model.md``: computed costs of steps, canvases that fit, measured times."""

from __future__ import annotations

from collections.abc import Sequence

from bench.common.pages import table
from bench.cost.step_count import Setting
from bench.gpu.targets import Record
from bench.shapes.geometry import REAL
from sfs_triton.cards import CARDS, WEIGHT_BYTES, canvases_that_fit, step_seconds
from sfs_triton.decoding.caching import POLICIES

MODEL = "llada-8b"
CACHES = ("none", "region")
HEAD = ("card", "weights", *(f"canvases, `{cache}`" for cache in CACHES), "region step, ms", "whole canvas, ms")


def card_of(gpu: str) -> str | None:
    """Return the card that a driver's name of a GPU is of: the longest name whose parts are all in it."""
    told = "".join(filter(str.isalnum, gpu.lower()))
    fitting = [name for name in CARDS if all(part in told for part in name.split("-"))]
    return max(fitting, key=len, default=None)


def cards_table(found: Sequence[Record]) -> str:
    """Render a row per card and format of the weights; the last record of a card has its measurements, in bfloat16."""
    measured = {card_of(record.header["gpu"]): record for record in found}
    spec, setting, rows = REAL[MODEL], Setting(), []
    length = setting.prompt + setting.response
    for name, card in CARDS.items():
        for quantization in WEIGHT_BYTES:
            fits = [canvases_that_fit(card.memory, spec, quantization, POLICIES[each](), length) for each in CACHES]
            few = step_seconds(card, spec, quantization, setting.capacity, length, setting.span_cap)
            whole = step_seconds(card, spec, quantization, length, length, setting.response)
            record = None if quantization else measured.get(name)
            times = f"{1e3 * few:.1f}", f"{1e3 * whole:.0f}"
            rows.append((name, quantization or "bfloat16", *fits, *times, _measured(record)))
    return table((*HEAD, "measured, ms"), rows) + "\n"


def _measured(record: Record | None) -> str:
    """Format the two steps as a record has them."""
    lines = [record.part("engine", f"triton, region, {kind}") if record else {} for kind in ("list", "full")]
    times = [f"{line['ms']:.1f}" if line.get("ms") else "not measured" for line in lines]
    return " and ".join(times) if len(set(times)) > 1 else times[0]
