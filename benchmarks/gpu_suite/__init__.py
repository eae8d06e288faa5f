"""GPU validation in minutes, tests and benchmarks: `python -m benchmarks.gpu_suite`."""
