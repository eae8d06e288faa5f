"""Static analysis of the GPU kernels: `python -m benchmarks.gpu_code`."""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: compile, do not interpret
# What Triton has in its cache may name the lines of another checkout.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
