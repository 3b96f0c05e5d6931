"""Execution of steps: every device tensor of a persistent batch, and the ways to launch its steps."""

from .execution import CudaGraphs, Eager, Execution, ExecutionChoice, Outputs, Pair, check_cuda_graphs
from .model_runner import ModelRunner

__all__ = ["CudaGraphs", "Eager", "Execution", "ExecutionChoice", "ModelRunner", "Outputs", "Pair", "check_cuda_graphs"]
