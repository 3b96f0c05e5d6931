"""Conversations with a model."""

from .conversation import Conversation

__all__ = ["Conversation"]
