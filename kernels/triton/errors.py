"""Errors of kernels. Nothing here needs triton."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel cannot run on a device: it does not compile, or asks for more than a block can have.

    The error of Triton is the cause. No part of the launch has run.
    """
