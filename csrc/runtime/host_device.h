// Functions that both compilers take.
#pragma once

#ifdef __CUDACC__
#define NAR_HOST_DEVICE __host__ __device__
#else
#define NAR_HOST_DEVICE
#endif
