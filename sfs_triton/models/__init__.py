"""The transformer family: specs, weights and the forward pass."""

from .spec import ModelSpec, read_spec
from .transformer import Transformer
from .update import update_weights
from .weights import Weights, load_weights

__all__ = ["ModelSpec", "Transformer", "Weights", "load_weights", "read_spec", "update_weights"]
