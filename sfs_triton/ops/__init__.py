"""One function per operation: plain torch, and the Triton kernels beside it."""
