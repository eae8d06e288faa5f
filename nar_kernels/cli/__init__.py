"""The command line: ``nar-kernels``."""
