"""Conversations with a model."""

from .conversation import Answer, Chat, Settings, Totals

__all__ = ["Answer", "Chat", "Settings", "Totals"]
