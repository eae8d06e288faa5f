// The outputs of a row whose keys do not tie at a bound.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "corrupt/corrupt.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

template <typename Id>  // int32_t or int64_t
struct RowOutput {
  Id* __restrict input_ids;
  Id* __restrict labels;
  uint8_t* __restrict masked;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
inline void store_ids(int32_t* to, __m256i ids) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ids);
}
inline void store_ids(int64_t* to, __m256i ids) {
  __m256i* vectors = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(vectors, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(ids)));
  _mm256_storeu_si256(vectors + 1, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(ids, 1)));
}
#endif

// Keys below `mask` are masked; of those, the ones below `keep` keep their token.
template <typename Id>
void write_row(uint32_t keep, uint32_t mask, int64_t length, int32_t mask_id,
               const uint32_t* __restrict keys, const int32_t* __restrict clean,
               RowOutput<Id> out) {
  constexpr int32_t kIgnore = static_cast<int32_t>(kIgnoreIndex);
  int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Compilers' code is half as fast: they compare unsigned numbers through the minimum, and pack
  // the results more than once.
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  const __m256i below_mask = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(mask)), flip);
  const __m256i below_keep = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(keep)), flip);
  for (; i + 32 <= length; i += 32) {
    __m256i is_masked[4];
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(clean + at));
      const __m256i key =
          _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + at)), flip);
      is_masked[j] = _mm256_cmpgt_epi32(below_mask, key);
      const __m256i hidden = _mm256_andnot_si256(_mm256_cmpgt_epi32(below_keep, key), is_masked[j]);
      store_ids(out.input_ids + at, _mm256_blendv_epi8(id, _mm256_set1_epi32(mask_id), hidden));
      store_ids(out.labels + at, _mm256_blendv_epi8(_mm256_set1_epi32(kIgnore), id, is_masked[j]));
    }
    // Packing works within halves of a vector.
    const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(is_masked[0], is_masked[1]),
                                              _mm256_packs_epi32(is_masked[2], is_masked[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(halves, order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.masked + i),
                        _mm256_and_si256(bytes, _mm256_set1_epi8(1)));
  }
#endif
  // Bits instead of conditions, of which compilers make branches.
  for (; i < length; ++i) {
    const int32_t masked = -static_cast<int32_t>(keys[i] < mask);
    const int32_t hidden = masked & -static_cast<int32_t>(keys[i] >= keep);
    out.input_ids[i] = (mask_id & hidden) | (clean[i] & ~hidden);
    out.labels[i] = (clean[i] & masked) | (kIgnore & ~masked);
    out.masked[i] = masked & 1;
  }
}

}  // namespace
}  // namespace nar
