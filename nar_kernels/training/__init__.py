"""The trainer: ``nar-kernels train``."""
