"""Tokenizer and chat template of a checkpoint."""

from .codec import TextCodec

__all__ = ["TextCodec"]
