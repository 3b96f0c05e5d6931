"""The operations in plain torch, one op a file, mirroring the kernels: the CPU product path and the kernels' twins."""
