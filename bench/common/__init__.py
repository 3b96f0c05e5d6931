"""Modules that several rooms of the benchmarks share."""
