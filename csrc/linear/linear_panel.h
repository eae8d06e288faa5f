// One panel of `linear`. Included by one file per instruction set.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "linear/linear.h"
#include "runtime/float_math.h"

namespace nar {
namespace {

// The register tile: kIds ids times up to kMostVectors vectors of rows.
constexpr int kIds = 4, kMostVectors = 3;

constexpr int kLine = 16;  // floats of a cache line

#if defined(__AVX512F__)
inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
// Transposes each 4x4 block of four lanes.
inline void transpose(const Floats in[kIds], Floats out[kIds]) {
  const __m512d ab_low = (__m512d)_mm512_unpacklo_ps((__m512)in[0], (__m512)in[1]);
  const __m512d ab_high = (__m512d)_mm512_unpackhi_ps((__m512)in[0], (__m512)in[1]);
  const __m512d cd_low = (__m512d)_mm512_unpacklo_ps((__m512)in[2], (__m512)in[3]);
  const __m512d cd_high = (__m512d)_mm512_unpackhi_ps((__m512)in[2], (__m512)in[3]);
  out[0] = (Floats)_mm512_unpacklo_pd(ab_low, cd_low);
  out[1] = (Floats)_mm512_unpackhi_pd(ab_low, cd_low);
  out[2] = (Floats)_mm512_unpacklo_pd(ab_high, cd_high);
  out[3] = (Floats)_mm512_unpackhi_pd(ab_high, cd_high);
}
#else
inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline void transpose(const Floats in[kIds], Floats out[kIds]) {
  const __m256d ab_low = (__m256d)_mm256_unpacklo_ps((__m256)in[0], (__m256)in[1]);
  const __m256d ab_high = (__m256d)_mm256_unpackhi_ps((__m256)in[0], (__m256)in[1]);
  const __m256d cd_low = (__m256d)_mm256_unpacklo_ps((__m256)in[2], (__m256)in[3]);
  const __m256d cd_high = (__m256d)_mm256_unpackhi_ps((__m256)in[2], (__m256)in[3]);
  out[0] = (Floats)_mm256_unpacklo_pd(ab_low, cd_low);
  out[1] = (Floats)_mm256_unpackhi_pd(ab_low, cd_low);
  out[2] = (Floats)_mm256_unpacklo_pd(ab_high, cd_high);
  out[3] = (Floats)_mm256_unpackhi_pd(ab_high, cd_high);
}
#endif

template <int kVectors>
struct Tile {
  Floats sums[kIds][kVectors];
};

// Never inlined: so the compiler keeps all accumulators in registers. Prefetches the weights at
// `ahead` into L2 meanwhile.
template <int kVectors>
__attribute__((noinline)) Tile<kVectors> multiply_tile(const float* const weight[kIds],
                                                       const float* const ahead[kIds],
                                                       const float* packed, int64_t depth) {
  Tile<kVectors> tile;
  for (auto& sums : tile.sums) std::fill_n(sums, kVectors, Floats{});
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kLine == 0) {
      for (int i = 0; i < kIds; ++i) __builtin_prefetch(ahead[i] + k, 0, 2);
    }
    Floats hidden[kVectors];
    for (auto& v : hidden) v = load<Floats>(packed), packed += kFloats;
    for (int i = 0; i < kIds; ++i) {
      const Floats w = spread(weight[i][k]);
      for (int j = 0; j < kVectors; ++j) tile.sums[i][j] = fused(w, hidden[j], tile.sums[i][j]);
    }
  }
  return tile;
}

// Stores a tile's logits, of at most kIds ids and kFloats rows.
inline void store_logits(const Floats sums[kIds], float* to, int64_t stride, int64_t rows,
                         int64_t ids) {
  Floats columns[kIds];
  transpose(sums, columns);
  const auto column = [&](int64_t row) {
    return reinterpret_cast<const float*>(&columns[row % 4]) + row / 4 * 4;
  };
  if (ids >= kIds && rows >= kFloats) {
    for (int64_t row = 0; row < kFloats; ++row) {
      std::memcpy(to + row * stride, column(row), kIds * sizeof(float));
    }
    return;
  }
  for (int64_t row = 0; row < std::min<int64_t>(rows, kFloats); ++row) {
    std::copy_n(column(row), std::min<int64_t>(ids, kIds), to + row * stride);
  }
}

template <int kVectors>
void multiply_panel(const LinearArgs& a, int64_t first_row, const float* packed, int64_t first,
                    int64_t end) {
  float* const logits = a.logits + first_row * a.stride;
  const int64_t rows = std::min<int64_t>(a.rows - first_row, kVectors * kFloats);
  for (int64_t id = first; id < end; id += kIds) {
    if (id % kLine == 0) {
      for (int64_t row = 0; row < rows; ++row) {
        __builtin_prefetch(logits + row * a.stride + id + kLine, 1);
      }
    }
    const float *weight[kIds], *ahead[kIds];
    float bias[kIds] = {};
    for (int i = 0; i < kIds; ++i) {  // past the end: the last id again
      const int64_t from = std::min(id + i, end - 1);
      weight[i] = a.weight + from * a.weight_stride;
      ahead[i] = a.weight + std::min(from + end - first, a.vocabulary - 1) * a.weight_stride;
      if (a.bias) bias[i] = a.bias[from];
    }
    const Tile<kVectors> tile = multiply_tile<kVectors>(weight, ahead, packed, a.depth);
    for (int j = 0; j < kVectors; ++j) {
      const int64_t row = j * kFloats;
      Floats sums[kIds];
      for (int i = 0; i < kIds; ++i) sums[i] = tile.sums[i][j] + bias[i];
      store_logits(sums, logits + row * a.stride + id, a.stride, rows - row, end - id);
    }
  }
}

constexpr int64_t kPanelRows = kMostVectors * kFloats;

int64_t num_vectors(const LinearArgs& a, int64_t panel) {
  const int64_t rows = std::min(a.rows - panel * kPanelRows, kPanelRows);
  return (rows + kFloats - 1) / kFloats;
}

void pack(const LinearArgs& a, int64_t panel, float* packed) {
  const int64_t width = num_vectors(a, panel) * kFloats;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t row = std::min(panel * kPanelRows + j, a.rows - 1);
    const float* from = a.hidden + row * a.hidden_stride;
    for (int64_t k = 0; k < a.depth; ++k) packed[k * width + j] = from[k];
  }
}

void multiply(const LinearArgs& a, int64_t panel, const float* packed, int64_t first, int64_t end) {
  switch (num_vectors(a, panel)) {
    case 1: return multiply_panel<1>(a, panel * kPanelRows, packed, first, end);
    case 2: return multiply_panel<2>(a, panel * kPanelRows, packed, first, end);
    default: return multiply_panel<3>(a, panel * kPanelRows, packed, first, end);
  }
}

}  // namespace
}  // namespace nar
