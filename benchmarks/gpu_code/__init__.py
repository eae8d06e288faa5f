"""Static analysis of the GPU kernels: `python -m benchmarks.gpu_code`."""
