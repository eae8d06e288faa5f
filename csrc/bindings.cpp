// The Python module nar_kernels._cpp: raw addresses in, kernels below, no torch. Callers have
// checked dtypes, devices, shapes and contiguity (nar_kernels/ops.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "corrupt.h"
#include "cpu_features.h"
#include "order_statistic.h"
#include "permutation.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

nar::Windows make_windows(uintptr_t tokens, int token_type, int64_t num_corpus_tokens,
                          uintptr_t starts, int64_t batch, int64_t seq_len, int64_t num_tokens,
                          int64_t mask_id) {
  return {pointer<const void>(tokens),
          static_cast<nar::TokenType>(token_type),
          num_corpus_tokens,
          pointer<const int64_t>(starts),
          batch,
          seq_len,
          num_tokens,
          mask_id};
}

void write_record(const nar::InvalidTokens& found, int64_t* record) {
  record[0] = found.count;
  record[1] = found.count ? found.offset : 0;
  record[2] = found.count ? found.token : 0;
}

void windows(uintptr_t tokens, int token_type, int64_t num_corpus_tokens, uintptr_t starts,
             int64_t batch, int64_t seq_len, int64_t num_tokens, int64_t mask_id, uintptr_t out,
             uintptr_t invalid) {
  const nar::Windows w = make_windows(tokens, token_type, num_corpus_tokens, starts, batch, seq_len,
                                      num_tokens, mask_id);
  write_record(nar::copy_windows(w, pointer<int64_t>(out)), pointer<int64_t>(invalid));
}

void permute(uintptr_t index, int64_t count, int64_t n, int64_t seed, int stream, int64_t round,
             uintptr_t out) {
  const nar::Permutation permutation(static_cast<uint64_t>(seed), stream,
                                     static_cast<uint64_t>(round), static_cast<uint64_t>(n));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = pointer<const int64_t>(index)[i];
    if (from < 0 || from >= n) {
      throw std::out_of_range("index " + std::to_string(from) +
                              " is outside the permutation of [0, " + std::to_string(n) + ")");
    }
    pointer<int64_t>(out)[i] = static_cast<int64_t>(permutation(static_cast<uint64_t>(from)));
  }
}

void corrupt(uintptr_t tokens, int token_type, int64_t num_corpus_tokens, uintptr_t starts,
             int64_t batch, int64_t seq_len, int64_t num_tokens, int64_t mask_id,
             uintptr_t sample_ids, uintptr_t maskable, uintptr_t ratio_table,
             uintptr_t weight_table, uintptr_t never_mask, int64_t seed, int64_t global_batch,
             bool exact, bool stratified, uint64_t keep_share, uint64_t random_share,
             uint64_t coin_share, int num_threads, uintptr_t input_ids, uintptr_t labels,
             uintptr_t masked_indices, uintptr_t times, uintptr_t loss_weight, uintptr_t num_masked,
             uintptr_t num_maskable, uintptr_t row_buffer, uintptr_t invalid) {
  nar::CorruptArgs a;
  a.windows = make_windows(tokens, token_type, num_corpus_tokens, starts, batch, seq_len,
                           num_tokens, mask_id);
  a.sample_ids = pointer<const int64_t>(sample_ids);
  a.maskable = pointer<const uint8_t>(maskable);
  a.ratio_table = pointer<const uint32_t>(ratio_table);
  a.weight_table = pointer<const float>(weight_table);
  a.never_mask = pointer<const uint8_t>(never_mask);
  a.seed = static_cast<uint64_t>(seed);
  a.global_batch = global_batch;
  a.exact = exact;
  a.stratified = stratified;
  a.keep_share = keep_share;
  a.random_share = random_share;
  a.coin_share = coin_share;
  a.input_ids = pointer<int64_t>(input_ids);
  a.labels = pointer<int64_t>(labels);
  a.masked_indices = pointer<uint8_t>(masked_indices);
  a.times = pointer<float>(times);
  a.loss_weight = pointer<float>(loss_weight);
  a.num_masked = pointer<int64_t>(num_masked);
  a.num_maskable = pointer<int64_t>(num_maskable);
  a.row_buffer = pointer<int64_t>(row_buffer);
  write_record(nar::corrupt_cpu(a, num_threads), pointer<int64_t>(invalid));
  pointer<int64_t>(invalid)[3] = pointer<int64_t>(invalid)[4] = 0;  // bad rows have thrown
}

// For tests: the selection on keys of their choice, three ranks at a time.
std::vector<uint64_t> key_bounds(uintptr_t keys, uintptr_t can_take, int64_t length,
                                 int64_t num_keys, const std::vector<int64_t>& ranks) {
  if (ranks.size() != nar::kNumRanks) throw std::invalid_argument("three ranks are needed");
  std::vector<uint64_t> bounds(nar::kNumRanks);
  nar::key_bounds(pointer<const uint32_t>(keys), pointer<const uint8_t>(can_take), length, num_keys,
                  ranks.data(), bounds.data());
  return bounds;
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.def("corrupt", &corrupt, release_gil());
  m.def("windows", &windows, release_gil());
  m.def("permute", &permute, release_gil());
  m.def("limit_simd", [](int level) { nar::limit_simd(static_cast<nar::SimdLevel>(level)); });
  m.def("simd_level", [] { return static_cast<int>(nar::simd_level()); });
  m.def("key_bounds", &key_bounds);
}
