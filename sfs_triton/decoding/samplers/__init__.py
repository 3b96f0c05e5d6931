"""Samplers as frozen, validated records. Every threshold and every selection rule is set here and nowhere else."""

from .base import Sampler
from .fixed import FixedSteps
from .slowfast import PRESETS, SlowFast
from .threshold import Threshold

# Names on the command line, in requests and in evaluations; ``vanilla`` is one token per step.
SAMPLERS: dict[str, type[Sampler]] = {
    "slowfast": SlowFast,
    "threshold": Threshold,
    "fixed": FixedSteps,
    "vanilla": FixedSteps,
}

__all__ = ["PRESETS", "SAMPLERS", "FixedSteps", "Sampler", "SlowFast", "Threshold"]
