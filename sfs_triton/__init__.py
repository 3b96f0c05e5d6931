"""sfs_triton: fast decoding for full-attention masked-diffusion language models.

engine = sfs_triton.load("embedded")
print(engine.generate("15,44,79,50").text)
"""

from .caching import DualCache, NoCache, PrefixCache, RefreshCache
from .engine import Engine, Frame, Generation, load
from .errors import (
    ArgumentError,
    CheckpointError,
    MissingDependencyError,
    NumericalFault,
    SfsError,
    StepCapExceeded,
    UnsupportedConfigError,
)
from .samplers import FixedSteps, Sampler, SlowFast, Threshold
from .trace import StepTrace

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DualCache",
    "Engine",
    "FixedSteps",
    "Frame",
    "Generation",
    "MissingDependencyError",
    "NoCache",
    "NumericalFault",
    "PrefixCache",
    "RefreshCache",
    "Sampler",
    "SfsError",
    "SlowFast",
    "StepCapExceeded",
    "StepTrace",
    "Threshold",
    "UnsupportedConfigError",
    "load",
]
