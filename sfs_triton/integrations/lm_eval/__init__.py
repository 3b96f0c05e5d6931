"""lm-eval: the model ``sfs_triton`` for masked-diffusion checkpoints.

Importing this package registers the model; ``lm_eval.simple_evaluate(model="sfs_triton", ...)`` works from then on.
The command ``sfs-eval`` is :mod:`sfs_triton.cli.evaluate`.
"""

from .model import DiffusionLM, LikelihoodError

__all__ = ["DiffusionLM", "LikelihoodError"]
