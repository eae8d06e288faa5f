// What the Python modules share: how arguments arrive. Callers have checked dtypes, devices, shapes
// and contiguity (nar_kernels/ops.py).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "corrupt.h"

namespace nar {

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Reads 64-bit integers from what struct.pack made, which costs a fraction of as many arguments.
class Unpacker {
 public:
  Unpacker(std::string_view packed, size_t count) : next_(packed.data()) {
    if (packed.size() != count * sizeof(int64_t)) {
      throw std::invalid_argument("packed arguments have the wrong length");
    }
  }

  int64_t integer() {
    int64_t value;
    std::memcpy(&value, next_, sizeof value);
    next_ += sizeof value;
    return value;
  }

  template <typename T>
  T* address() {
    return pointer<T>(integer());
  }

 private:
  const char* next_;
};

// The order is that of `_packed_corrupt` in nar_kernels/ops.py.
inline CorruptArgs unpack_corrupt(std::string_view packed) {
  Unpacker next(packed, 36);
  CorruptArgs a;
  a.windows.tokens = next.address<const void>();
  a.windows.token_type = static_cast<TokenType>(next.integer());
  a.windows.num_corpus_tokens = next.integer();
  a.windows.starts = next.address<const int64_t>();
  a.windows.batch = next.integer();
  a.windows.seq_len = next.integer();
  a.windows.num_tokens = next.integer();
  a.windows.mask_id = next.integer();
  a.sample_ids = next.address<const int64_t>();
  a.first_sample = next.integer();
  a.step = next.address<const int64_t>();
  a.order.num_windows = next.integer();
  a.order.phase = next.integer();
  a.order.stride = next.integer();
  a.order.shuffle = next.integer() != 0;
  a.maskable = next.address<const uint8_t>();
  a.ratio_table = next.address<const uint32_t>();
  a.weight_table = next.address<const float>();
  a.never_mask = next.address<const uint8_t>();
  a.seed = static_cast<uint64_t>(next.integer());
  a.seed_tensor = next.address<const uint64_t>();
  a.global_batch = next.integer();
  a.exact = next.integer() != 0;
  a.stratified = next.integer() != 0;
  a.keep_share = static_cast<uint64_t>(next.integer());
  a.random_share = static_cast<uint64_t>(next.integer());
  a.coin_share = static_cast<uint64_t>(next.integer());
  a.input_ids = next.address<int64_t>();
  a.labels = next.address<int64_t>();
  a.masked_indices = next.address<uint8_t>();
  a.times = next.address<float>();
  a.loss_weight = next.address<float>();
  a.num_masked = next.address<int64_t>();
  a.num_maskable = next.address<int64_t>();
  a.row_buffer = next.address<int64_t>();
  a.invalid = next.address<int64_t>();
  return a;
}

}  // namespace nar
