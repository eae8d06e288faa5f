"""All that a GPU can prove about this package, within minutes: `python -m benchmarks.gpu_suite`."""
