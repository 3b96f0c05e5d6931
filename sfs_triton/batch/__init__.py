"""Batch runs over files of prompts."""

from .files import BatchError
from .run import BatchSettings, Summary, in_process, run_batch

__all__ = ["BatchError", "BatchSettings", "Summary", "in_process", "run_batch"]
