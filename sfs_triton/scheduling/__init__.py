"""Sequences, and the batches that they are decoded in."""
