// A run of Philox words of one sample, as many lanes at once as this translation unit may use.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "philox.h"

namespace nar {

// Local to the translation unit: compiled once per instruction set (see order_statistic.h).
namespace {

#if defined(__AVX2__)

// One counter per 64-bit lane, each of its four words in a register of its own. Only the low halves
// count; the high halves hold leftovers, which the 32 x 32 -> 64 bit product ignores.
#if defined(__AVX512F__)
using Vec = __m512i;
constexpr int kLanes = 8, kChains = 4;
inline Vec splat(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }
inline Vec high(Vec a) { return _mm512_srli_epi64(a, 32); }
inline Vec xor3(Vec a, Vec b, Vec c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Vec pack(Vec low, Vec high) {
  return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA);
}
// Counters in the order that leaves the unpacked words in sequence.
inline Vec first_counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline void store(uint32_t* out, Vec words01, Vec words23) {
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(words01, words23));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(words01, words23));
}
#else
using Vec = __m256i;
constexpr int kLanes = 4, kChains = 2;
inline Vec splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Vec add(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }
inline Vec high(Vec a) { return _mm256_srli_epi64(a, 32); }
inline Vec xor3(Vec a, Vec b, Vec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Vec pack(Vec low, Vec high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
inline Vec first_counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline void store(uint32_t* out, Vec words01, Vec words23) {
  _mm256_storeu_si256(reinterpret_cast<Vec*>(out), _mm256_unpacklo_epi64(words01, words23));
  _mm256_storeu_si256(reinterpret_cast<Vec*>(out + 8), _mm256_unpackhi_epi64(words01, words23));
}
#endif

// Words 0 .. num_words - 1 of a sample, and on to the next multiple of kWordPadding.
//
// kChains counters of every lane go through the rounds side by side, to hide the latency of the
// multiplications: as many as the registers hold.
inline void fill_words(uint32_t* out, int64_t num_words, uint64_t seed, uint32_t stream,
                       uint64_t sample) {
  constexpr int kStep = 4 * kLanes * kChains;
  static_assert(kWordPadding % kStep == 0);
  const Vec m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1);
  const Vec sample_low = splat(sample & 0xFFFFFFFF), sample_high = splat(sample >> 32);
  Vec block = first_counters();
  for (int64_t i = 0; i < num_words; i += kStep) {
    Vec c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int u = 0; u < kChains; ++u) {
      c0[u] = block, c1[u] = sample_low, c2[u] = sample_high, c3[u] = splat(stream);
      block = add(block, splat(kLanes));
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Vec key0 = splat(k0), key1 = splat(k1);
      for (int u = 0; u < kChains; ++u) {
        const Vec p0 = multiply(c0[u], m0), p1 = multiply(c2[u], m1);
        c0[u] = xor3(high(p1), c1[u], key0);
        c1[u] = p1;
        c2[u] = xor3(high(p0), c3[u], key1);
        c3[u] = p0;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int u = 0; u < kChains; ++u) {
      store(out + i + u * 4 * kLanes, pack(c0[u], c1[u]), pack(c2[u], c3[u]));
    }
  }
}

#else

inline void fill_words(uint32_t* out, int64_t num_words, uint64_t seed, uint32_t stream,
                       uint64_t sample) {
  for (int64_t i = 0; i < num_words; i += 4) {
    const Words4 block = random_block(seed, stream, sample, static_cast<uint32_t>(i / 4));
    for (int j = 0; j < 4; ++j) out[i + j] = block.word[j];
  }
}

#endif

}  // namespace
}  // namespace nar
