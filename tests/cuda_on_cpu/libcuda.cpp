// A stand-in for the CUDA driver: it keeps what a kernel is launched with, and launches nothing.
// Triton's own launchers, which it compiles for each machine, are linked against it.

#include <cstdint>
#include <cstring>

namespace {

struct Launch {
  uint32_t grid_and_block[6];
  uint64_t arguments[64];
};

}  // namespace

extern "C" {

// For Python: the sizes of the next kernel's arguments, and its last launch.
int sizes[64];
int num_arguments = 0;
int num_launches = 0;
Launch last;

int cuLaunchKernelEx(const uint32_t* config, void*, void** arguments, void**) {
  std::memset(&last, 0, sizeof last);
  std::memcpy(last.grid_and_block, config, sizeof last.grid_and_block);
  for (int i = 0; i < num_arguments; ++i) {
    std::memcpy(&last.arguments[i], arguments[i], sizes[i]);
  }
  ++num_launches;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = &last;
  return 0;
}

int cuPointerGetAttribute(uint64_t* value, int, uint64_t pointer) {
  *value = pointer;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "no driver";
  return 0;
}

#define UNUSED_CALL(name) \
  int name() { return 0; }
UNUSED_CALL(cuInit)
UNUSED_CALL(cuCtxGetDevice)
UNUSED_CALL(cuCtxGetLimit)
UNUSED_CALL(cuCtxSetCurrent)
UNUSED_CALL(cuCtxSetLimit)
UNUSED_CALL(cuDeviceGet)
UNUSED_CALL(cuDeviceGetAttribute)
UNUSED_CALL(cuDevicePrimaryCtxRetain)
UNUSED_CALL(cuDriverGetVersion)
UNUSED_CALL(cuFuncGetAttribute)
UNUSED_CALL(cuFuncSetAttribute)
UNUSED_CALL(cuFuncSetCacheConfig)
UNUSED_CALL(cuModuleGetFunction)
UNUSED_CALL(cuModuleLoadData)
UNUSED_CALL(cuModuleUnload)
UNUSED_CALL(cuOccupancyMaxActiveClusters)
UNUSED_CALL(cuStreamIsCapturing)
UNUSED_CALL(cuTensorMapEncodeTiled)

}  // extern "C"
