// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nar {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next check would report it again
  std::string message =
      std::string(what) + " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; this build has kernels for " NAR_CUDA_ARCHS
               ": build on a machine whose nvcc knows this GPU (in a checkout: NAR_KERNELS_CUDA=1 "
               "pip install .)";
  }
  throw std::runtime_error(message);
}

}  // namespace nar
