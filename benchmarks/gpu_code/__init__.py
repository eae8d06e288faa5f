"""Static analysis of the GPU kernels: `python -m benchmarks.gpu_code`."""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: compile, do not interpret
