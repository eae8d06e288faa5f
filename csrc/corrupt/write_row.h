// The outputs of a row whose keys do not tie at a bound.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "corrupt/corrupt.h"
#include "runtime/blocks.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

template <typename Id>  // int32_t or int64_t
struct RowOutput {
  Id* __restrict input_ids;
  Id* __restrict labels;
  uint8_t* __restrict masked;
};

#if defined(__AVX512F__)
inline void store_ids(int32_t* to, __mmask16 there, __m512i ids) {
  _mm512_mask_storeu_epi32(to, there, ids);
}
inline void store_ids(int64_t* to, __mmask16 there, __m512i ids) {
  const __m256i low = _mm512_castsi512_si256(ids), high = _mm512_extracti64x4_epi64(ids, 1);
  _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(there), _mm512_cvtepi32_epi64(low));
  _mm512_mask_storeu_epi64(to + 8, static_cast<__mmask8>(there >> 8), _mm512_cvtepi32_epi64(high));
}
#elif defined(__AVX2__)
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
#if defined(__AVX512F__)
  const __m512i below_mask = _mm512_set1_epi32(static_cast<int>(mask));
  const __m512i below_keep = _mm512_set1_epi32(static_cast<int>(keep));
  const __m512i hidden_id = _mm512_set1_epi32(mask_id), ignored = _mm512_set1_epi32(kIgnore);
  // Ids and labels of up to 16 positions, and which are masked.
  const auto write = [&](int64_t i, __mmask16 there) {
    const __m512i key = _mm512_maskz_loadu_epi32(there, keys + i);
    const __m512i id = _mm512_maskz_loadu_epi32(there, clean + i);
    const __mmask16 is_masked = _mm512_cmplt_epu32_mask(key, below_mask);
    const __mmask16 hidden = _mm512_mask_cmpge_epu32_mask(is_masked, key, below_keep);
    store_ids(out.input_ids + i, there, _mm512_mask_mov_epi32(id, hidden, hidden_id));
    store_ids(out.labels + i, there, _mm512_mask_mov_epi32(ignored, is_masked, id));
    return is_masked;
  };
  const auto write_some = [&](int64_t i, int64_t count) {
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    _mm_mask_storeu_epi8(out.masked + i, there, _mm_maskz_set1_epi8(write(i, there), 1));
  };
  constexpr int64_t kLine = 64 / sizeof(Id);
  const int64_t place = reinterpret_cast<uintptr_t>(out.input_ids) / sizeof(Id);
  int64_t i = std::min(-place & (kLine - 1), length);
  if (i > 0) write_some(0, i);  // from then on stores do not cross lines of the cache
  for (; i + 64 <= length; i += 64) {
    uint64_t masked = 0;
    for (int j = 0; j < 64; j += 16) masked |= uint64_t{write(i + j, 0xFFFF)} << j;
    _mm512_storeu_si512(out.masked + i, _mm512_maskz_set1_epi8(masked, 1));
  }
  for (; i < length; i += 16) write_some(i, std::min<int64_t>(length - i, 16));
#else
  int64_t i = 0;
#if defined(__AVX2__)
  // Compilers' code is half as fast: they compare unsigned numbers through the minimum, and pack
  // the results more than once.
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  const __m256i below_mask = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(mask)), flip);
  const __m256i below_keep = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(keep)), flip);
  in_blocks<32>(length, [&](int64_t first, int64_t count) {
    for (i = first; i + 32 <= first + count; i += 32) {
      __m256i is_masked[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + 8 * j;
        const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(clean + at));
        const __m256i key =
            _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + at)), flip);
        is_masked[j] = _mm256_cmpgt_epi32(below_mask, key);
        const __m256i hidden =
            _mm256_andnot_si256(_mm256_cmpgt_epi32(below_keep, key), is_masked[j]);
        store_ids(out.input_ids + at, _mm256_blendv_epi8(id, _mm256_set1_epi32(mask_id), hidden));
        store_ids(out.labels + at,
                  _mm256_blendv_epi8(_mm256_set1_epi32(kIgnore), id, is_masked[j]));
      }
      // Packing works within halves of a vector.
      const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(is_masked[0], is_masked[1]),
                                                _mm256_packs_epi32(is_masked[2], is_masked[3]));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(halves, order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.masked + i),
                          _mm256_and_si256(bytes, _mm256_set1_epi8(1)));
    }
  });
#endif
  // Bits instead of conditions, of which compilers make branches.
  for (; i < length; ++i) {
    const int32_t masked = -static_cast<int32_t>(keys[i] < mask);
    const int32_t hidden = masked & -static_cast<int32_t>(keys[i] >= keep);
    out.input_ids[i] = (mask_id & hidden) | (clean[i] & ~hidden);
    out.labels[i] = (clean[i] & masked) | (kIgnore & ~masked);
    out.masked[i] = masked & 1;
  }
#endif
}

}  // namespace
}  // namespace nar
