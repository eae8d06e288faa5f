// In place of CUDA's own header: what the kernels of csrc use of it, on the CPU, for tests.
//
// A block runs on one OS thread, each of its threads as a fiber that goes on until it reaches a
// barrier or a warp collective; then the next one is resumed, in an order that `schedule` picks.
// Warps run as far apart as barriers allow, so that a missing one shows. A few blocks run at a
// time, and begin in the order of their index, as on a GPU. What a GPU would hang on or leave
// undefined (a barrier that not all reach, lanes in different collectives, a wrong mask) is an
// error with the place.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

// In place of those of csrc/runtime/shared_memory.h: a block never leaves its OS thread.
#define NAR_SHARED(Type, name)   \
  static thread_local Type name; \
  cuda_on_cpu::fill_once(&name, sizeof name)
#define NAR_DYNAMIC_SHARED(Type, name) \
  Type* name = reinterpret_cast<Type*>(cuda_on_cpu::dynamic_shared.data())

struct alignas(2) uchar2 {
  unsigned char x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kWarp = 32, kBlocksAtOnce = 3;
constexpr size_t kStack = 64 << 10;

enum class State { kRunnable, kSleeping, kAtBarrier, kInCollective, kExited };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  const char* waits_for;    // the collective
  int barrier, of_barrier;  // its number, and for how many threads it is; 0: for all
  dim3 thread;
};

// One of them an OS thread.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  int running = 0;  // index of current
  ucontext_t scheduler;
  std::string error;
  // What lanes give to a collective, twice, since a fast lane may be at the next one already.
  std::vector<uint64_t> given[2];
  std::vector<int> turn;
  std::vector<void*> filled;  // with garbage: see fill_once
  const std::function<void()>* kernel;
};

inline thread_local Block block;
inline thread_local std::vector<unsigned char> dynamic_shared;
// The order of warps and lanes. 0: ascending, 1: descending, else shuffled by this seed.
inline std::atomic<unsigned> schedule{0};
inline std::atomic<int> num_processors{132};      // that the device says it has
inline std::atomic<int> shared_bytes{227 << 10};  // so many, too

// How much dynamic shared memory the launches of a kernel may ask for: an attribute of the kernel,
// whichever thread launches it. One that a thread lowers, another may rely on.
class MostShared {
 public:
  void set(void (*kernel)(), int bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int& most = of_[kernel];
    if (bytes < most)
      throw std::runtime_error("a launch by another thread may rely on more memory");
    most = bytes;
  }
  int of(void (*kernel)()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return of_.count(kernel) ? of_[kernel] : 48 << 10;
  }
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    of_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<void (*)(), int> of_;
};
inline MostShared most_shared;

inline void leave(State state) {
  Fiber* fiber = block.current;
  fiber->state = state;
  swapcontext(&fiber->context, &block.scheduler);
}

inline void fail(const std::string& what) {
  const dim3 t = block.current->thread;
  block.error = what + " (thread " + std::to_string(t.x) + ", " + std::to_string(t.y) +
                " of block " + std::to_string(blockIdx.x) + ")";
  leave(State::kExited);  // never to be resumed
}

inline void run_fiber() {
  (*block.kernel)();
  leave(State::kExited);
}

inline void prepare_block() {
  const int count = static_cast<int>(blockDim.x * blockDim.y);
  while (static_cast<int>(block.fibers.size()) < count) {
    block.fibers.push_back(std::make_unique<Fiber>());
  }
  block.fibers.resize(count);
  for (auto& given : block.given) given.assign(count, 0);
  block.turn.assign(count, 0);
  block.error.clear();
  block.filled.clear();
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.state = State::kRunnable;
    fiber.waits_for = "";
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

// Changes all fibers in one state to another; returns whether there were any.
inline bool change(State from, State to) {
  bool any = false;
  for (auto& fiber : block.fibers) {
    if (fiber->state != from) continue;
    fiber->state = to;
    any = true;
  }
  return any;
}

inline bool any_in(State state) {
  return std::any_of(block.fibers.begin(), block.fibers.end(),
                     [&](const auto& fiber) { return fiber->state == state; });
}

// Runs the lanes of a warp until each waits for something, and lets them go on where that is a
// collective that all have come to. Returns whether any lane ran.
inline bool run_warp(int warp, const std::vector<int>& lanes) {
  bool ran = false, together = true;
  const int first = warp * kWarp;
  for (int lane : lanes) {
    Fiber& fiber = *block.fibers[first + lane];
    if (fiber.state != State::kRunnable) continue;
    block.current = &fiber;
    block.running = first + lane;
    threadIdx = fiber.thread;
    swapcontext(&block.scheduler, &fiber.context);
    if (!block.error.empty()) throw std::runtime_error(block.error);
    ran = true;
  }
  for (int lane : lanes) {
    const Fiber& fiber = *block.fibers[first + lane];
    together &= fiber.state == State::kInCollective &&
                std::strcmp(fiber.waits_for, block.fibers[first]->waits_for) == 0;
  }
  for (int lane : lanes) {
    if (together) block.fibers[first + lane]->state = State::kRunnable;
  }
  return ran;
}

// Threads that have not exited: those that __syncthreads waits for.
inline int num_living() {
  return static_cast<int>(
      std::count_if(block.fibers.begin(), block.fibers.end(),
                    [](const auto& fiber) { return fiber->state != State::kExited; }));
}

// Lets threads go on whose barrier all have reached that it is for; returns whether there were any.
inline bool open_barriers() {
  bool any = false;
  for (auto& fiber : block.fibers) {
    if (fiber->state != State::kAtBarrier) continue;
    const auto waits_there = [&](const auto& other) {
      return other->state == State::kAtBarrier && other->barrier == fiber->barrier;
    };
    const auto waiting = std::count_if(block.fibers.begin(), block.fibers.end(), waits_there);
    if (waiting < (fiber->of_barrier ? fiber->of_barrier : num_living())) continue;
    const int barrier = fiber->barrier;
    for (auto& other : block.fibers) {
      if (waits_there(other) && other->barrier == barrier) other->state = State::kRunnable;
    }
    any = true;
  }
  return any;
}

inline void put_in_order(std::vector<int>* order, std::mt19937* generator) {
  std::iota(order->begin(), order->end(), 0);
  if (schedule == 1) std::reverse(order->begin(), order->end());
  if (schedule > 1) std::shuffle(order->begin(), order->end(), *generator);
}

// A warp runs as far as it can before the next one does: so the first is ahead of the others by all
// that barriers allow.
inline void run_block() {
  prepare_block();
  std::mt19937 generator(schedule + blockIdx.x);
  std::vector<int> warps(block.fibers.size() / kWarp), lanes(kWarp);
  while (any_in(State::kRunnable)) {
    put_in_order(&warps, &generator);
    for (int warp : warps) {
      put_in_order(&lanes, &generator);
      while (run_warp(warp, lanes)) continue;
    }
    if (change(State::kSleeping, State::kRunnable)) continue;
    if (!any_in(State::kInCollective)) open_barriers();
  }
  for (auto& fiber : block.fibers) {
    if (fiber->state == State::kExited) continue;
    throw std::runtime_error(
        "deadlock: thread " + std::to_string(fiber->thread.x) + ", " +
        std::to_string(fiber->thread.y) + " of block " + std::to_string(blockIdx.x) + " waits at " +
        (fiber->state == State::kAtBarrier ? "__syncthreads" : fiber->waits_for) +
        " and others never come");
  }
}

// Shared memory holds garbage before a block: NaN, as floats of any size. Nothing may be written
// behind it.
constexpr unsigned char kGarbage = 0xFF;
constexpr size_t kBehindShared = 1 << 10;

// By the first thread of a block that comes to its memory.
inline void fill_once(void* memory, size_t bytes) {
  if (std::find(block.filled.begin(), block.filled.end(), memory) != block.filled.end()) return;
  std::memset(memory, kGarbage, bytes);
  block.filled.push_back(memory);
}

inline void fill_shared(size_t bytes) { dynamic_shared.assign(bytes + kBehindShared, kGarbage); }

inline void check_behind_shared(size_t bytes) {
  for (size_t i = bytes; i < dynamic_shared.size(); ++i) {
    if (dynamic_shared[i] == kGarbage) continue;
    throw std::runtime_error("block " + std::to_string(blockIdx.x) + " wrote to byte " +
                             std::to_string(i) + " of " + std::to_string(bytes) +
                             " in shared memory");
  }
}

// Blocks begin in the order of their index: later ones may wait for what earlier ones publish.
inline void run_grid(dim3 grid, dim3 size, size_t shared, const std::function<void()>& kernel) {
  std::atomic<unsigned> next{0};
  std::mutex mutex;
  std::string error;
  auto work = [&] {
    for (unsigned index; (index = next++) < grid.x;) {
      blockIdx = dim3(index), blockDim = size, gridDim = grid;
      block.kernel = &kernel;
      try {
        fill_shared(shared);
        run_block();
        check_behind_shared(shared);
      } catch (const std::exception& failure) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (error.empty()) error = failure.what();
        // Blocks that wait for this one would wait for ever.
        std::fprintf(stderr, "cuda_on_cpu: %s\n", error.c_str());
        if (grid.x > 1) std::abort();
      }
    }
  };
  std::vector<std::thread> threads;
  const unsigned count = std::min<unsigned>(kBlocksAtOnce, grid.x);
  for (unsigned i = 0; i < count; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (!error.empty()) throw std::runtime_error(error);
}

// Gives a value, waits for the other lanes of the warp, and returns what all of them gave.
inline const uint64_t* exchange(const char* what, uint32_t mask, uint64_t value) {
  if (mask != 0xFFFFFFFF) fail(std::string(what) + " with a mask that is not all lanes");
  const int me = block.running;
  uint64_t* given = block.given[block.turn[me] ^= 1].data();
  given[me] = value;
  block.current->waits_for = what;
  leave(State::kInCollective);
  return given + me / kWarp * kWarp;
}

inline int lane() { return block.running % kWarp; }

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// ---- barriers, warp collectives, atomics

inline void __barrier_sync_count(unsigned barrier, unsigned count) {
  cuda_on_cpu::block.current->barrier = static_cast<int>(barrier);
  cuda_on_cpu::block.current->of_barrier = static_cast<int>(count);
  cuda_on_cpu::leave(cuda_on_cpu::State::kAtBarrier);
}
inline void __syncthreads() { __barrier_sync_count(0, 0); }
inline void __syncwarp() { cuda_on_cpu::exchange("__syncwarp", 0xFFFFFFFF, 0); }
inline void __nanosleep(unsigned) {
  std::this_thread::yield();
  cuda_on_cpu::leave(cuda_on_cpu::State::kSleeping);
}
template <typename T>
void __stcs(T* at, T value) {
  *at = value;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return cuda_on_cpu::from_bits<T>(
      cuda_on_cpu::exchange("__shfl_sync", mask, cuda_on_cpu::to_bits(value))[from % 32]);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance) {
  const uint64_t* given =
      cuda_on_cpu::exchange("__shfl_up_sync", mask, cuda_on_cpu::to_bits(value));
  const int from = cuda_on_cpu::lane() - static_cast<int>(distance);
  return from < 0 ? value : cuda_on_cpu::from_bits<T>(given[from]);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  const int from = cuda_on_cpu::lane() ^ bits;
  return cuda_on_cpu::from_bits<T>(
      cuda_on_cpu::exchange("__shfl_xor_sync", mask, cuda_on_cpu::to_bits(value))[from]);
}

inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  const uint64_t* given = cuda_on_cpu::exchange("__ballot_sync", mask, value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(given[i]) << i;
  return bits;
}

inline bool __all_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline bool __any_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  const uint64_t* given = cuda_on_cpu::exchange("__reduce_add_sync", mask, value);
  return static_cast<uint32_t>(std::accumulate(given, given + 32, uint64_t{0}));
}

inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  const uint64_t* given = cuda_on_cpu::exchange("__reduce_min_sync", mask, value);
  return static_cast<uint32_t>(*std::min_element(given, given + 32));
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  const uint64_t* given = cuda_on_cpu::exchange("__reduce_max_sync", mask, value);
  return static_cast<uint32_t>(*std::max_element(given, given + 32));
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __fdividef(float a, float b) { return a / b * (1 + 0x1p-22f); }  // not exact
inline float __logf(float x) { return std::log(x) * (1 + 0x1p-20f); }         // nor is this
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __dp2a_lo(int a, int b, int c) {
  return static_cast<int16_t>(a & 0xFFFF) * static_cast<int8_t>(b & 0xFF) +
         (a >> 16) * static_cast<int8_t>(b >> 8 & 0xFF) + c;
}
inline unsigned __float2uint_rz(float x) {  // saturates
  return x >= 0x1p32f ? 0xFFFFFFFF : x > 0 ? static_cast<unsigned>(x) : 0;
}
using std::max;
using std::min;

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
template <typename T, typename Choose>
T atomic_choose(T* at, T value, Choose choose) {
  T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(at, &old, choose(old, value), false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  return atomic_choose(at, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicMin(unsigned* at, unsigned value) {
  return atomic_choose(at, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

using Word64 = unsigned long long;
inline Word64 atomicAdd(Word64* at, Word64 value) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
inline Word64 atomicExch(Word64* at, Word64 value) {
  return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}
inline Word64 atomicCAS(Word64* at, Word64 expected, Word64 value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

// ---- the host's side

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorNoKernelImageForDevice
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                                  : "cudaError";
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kReserved = 1 << 10;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::num_processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_cpu::shared_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = cuda_on_cpu::shared_bytes + kReserved;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kReserved;
  }
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_on_cpu::shared_bytes) return cudaErrorInvalidValue;
  cuda_on_cpu::most_shared.set(reinterpret_cast<void (*)()>(kernel), bytes);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, size = config->blockDim;
  if (grid.x == 0 || size.x % 32 != 0 || size.x * size.y == 0 || size.x * size.y > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const int most = cuda_on_cpu::most_shared.of(reinterpret_cast<void (*)()>(kernel));
  if (config->dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  cuda_on_cpu::run_grid(grid, size, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
