"""Triton kernels, one op a file. Only torch, triton and siblings are imported here; no policy, no model names."""
