"""Triton kernels: one file an operation, primitives beside. Importing these needs ``triton``."""
