"""Check of Triton kernels and CUDA graphs on the user's own card, which picks the back end of an engine."""
