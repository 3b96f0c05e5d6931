"""Evaluation with lm-eval: tasks that need no network (tasks/), the paper's benchmarks (paper/), and a sandbox."""
