"""sfs_triton: fast decoding for full-attention masked-diffusion language models.

engine = sfs_triton.load("embedded")
print(engine.generate("15,44,79,50").text)
"""

from .decoding.caching import DelayedCache, DualCache, NoCache, PrefixCache, RefreshCache, RegionCache
from .decoding.likelihood import Likelihood, LikelihoodParams
from .decoding.samplers import (
    KLASS,
    WINO,
    Credit,
    EntropyBound,
    FixedSteps,
    Hierarchy,
    LocalLeap,
    MultiBlock,
    Sampler,
    SlowFast,
    Threshold,
)
from .engine import Engine, load
from .errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    DeviceFault,
    LoopTimeout,
    MissingDependencyError,
    NumericalFault,
    OutOfDeviceMemory,
    RankFailure,
    SfsError,
    StepCapExceeded,
    UnsupportedConfigError,
)
from .scheduling.handles import Pending, Stream
from .scheduling.outputs import Frame, Generation
from .scheduling.trace import StepTrace
from .version import __version__  # noqa: F401

__all__ = [
    "KLASS",
    "WINO",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "Credit",
    "DelayedCache",
    "DeviceFault",
    "DualCache",
    "Engine",
    "EntropyBound",
    "FixedSteps",
    "Frame",
    "Generation",
    "Hierarchy",
    "Likelihood",
    "LikelihoodParams",
    "LocalLeap",
    "LoopTimeout",
    "MissingDependencyError",
    "MultiBlock",
    "NoCache",
    "NumericalFault",
    "OutOfDeviceMemory",
    "Pending",
    "PrefixCache",
    "RankFailure",
    "RefreshCache",
    "RegionCache",
    "Sampler",
    "SfsError",
    "SlowFast",
    "StepCapExceeded",
    "StepTrace",
    "Stream",
    "Threshold",
    "UnsupportedConfigError",
    "load",
]


def __getattr__(name: str) -> object:
    """Import the names that need transformers when they are asked for."""
    if name not in ("accelerate", "custom_generate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations import transformers

    return getattr(transformers, name)
