"""The kernels that are compiled and counted, and how often parts of them are expected to run."""

from benchmarks.gpu_code.cases import choose, corrupt, mask_tokens, nll, unmask
from benchmarks.gpu_code.cases.case import CudaCase, TritonCase


def triton_cases() -> list[TritonCase]:
    operations = (corrupt, nll, unmask, choose, mask_tokens)
    return [case for op in operations for case in op.triton_cases()]


def cuda_cases() -> list[CudaCase]:
    return [*corrupt.cuda_cases(), *unmask.cuda_cases()]
