"""Samplers as frozen, validated records. Every threshold and every selection rule is set here and nowhere else."""

from .base import ENDS, Sampler
from .credit import Credit
from .entropy_bound import EntropyBound
from .fixed import FixedSteps
from .hierarchy import Hierarchy
from .klass import KLASS
from .local_leap import LocalLeap
from .multi_block import MultiBlock
from .slowfast import PRESETS, SlowFast
from .threshold import Threshold
from .wino import WINO

# Names on the command line, in requests and in evaluations; ``vanilla`` is one token per step.
SAMPLERS: dict[str, type[Sampler]] = {
    "slowfast": SlowFast,
    "threshold": Threshold,
    "multi-block": MultiBlock,
    "local-leap": LocalLeap,
    "entropy-bound": EntropyBound,
    "hierarchy": Hierarchy,
    "credit": Credit,
    "klass": KLASS,
    "wino": WINO,
    "fixed": FixedSteps,
    "vanilla": FixedSteps,
}
# For help texts; of each sampler the default first.
PRESET_NAMES = "; ".join(f"{kind}: {', '.join(each.presets)}" for kind, each in SAMPLERS.items() if each.presets)

__all__ = [
    "ENDS",
    "KLASS",
    "PRESETS",
    "PRESET_NAMES",
    "SAMPLERS",
    "WINO",
    "Credit",
    "EntropyBound",
    "FixedSteps",
    "Hierarchy",
    "LocalLeap",
    "MultiBlock",
    "Sampler",
    "SlowFast",
    "Threshold",
]
