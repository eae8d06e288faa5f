// Runs of Philox words of a sample, vectorised for the instruction set of the translation unit.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "rng/philox.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// How far `words_at` goes beyond what it was asked for.
constexpr int kWordsAtPadding = 32;

#if defined(__AVX2__)

// One counter per 64-bit lane, each of its four words in a register of its own. Only the low halves
// count; the high halves hold leftovers, which the 32 x 32 -> 64 bit product ignores.
#if defined(__AVX512F__)
using Vec = __m512i;
constexpr int kLanes = 8;
inline Vec splat(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }
inline Vec high(Vec a) { return _mm512_srli_epi64(a, 32); }
inline Vec xor3(Vec a, Vec b, Vec c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Of each half of 128 bits of a, then of b, the 32-bit words 0 and 2, or 1 and 3.
inline Vec even(Vec a, Vec b) { return (Vec)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88); }
inline Vec odd(Vec a, Vec b) { return (Vec)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD); }
inline Vec load(const int64_t* from) { return _mm512_loadu_si512(from); }
inline Vec shift_left(Vec a, int bits) { return _mm512_slli_epi64(a, bits); }
inline Vec shift_right(Vec a, int bits) { return _mm512_srli_epi64(a, bits); }
// By the sign of each lane.
inline Vec choose(Vec sign, Vec if_negative, Vec otherwise) {
  return _mm512_mask_blend_epi64(_mm512_movepi64_mask(sign), otherwise, if_negative);
}
inline void store_low(uint32_t* out, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(a));
}
// Counters in the order that `fill_words` turns into sequence.
inline Vec first_counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline void store(uint32_t* out, Vec a) { _mm512_storeu_si512(out, a); }
#else
using Vec = __m256i;
constexpr int kLanes = 4;
inline Vec splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Vec add(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }
inline Vec high(Vec a) { return _mm256_srli_epi64(a, 32); }
inline Vec xor3(Vec a, Vec b, Vec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Vec even(Vec a, Vec b) { return (Vec)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88); }
inline Vec odd(Vec a, Vec b) { return (Vec)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD); }
inline Vec load(const int64_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const Vec*>(from));
}
inline Vec shift_left(Vec a, int bits) { return _mm256_slli_epi64(a, bits); }
inline Vec shift_right(Vec a, int bits) { return _mm256_srli_epi64(a, bits); }
inline Vec choose(Vec sign, Vec if_negative, Vec otherwise) {
  return _mm256_castpd_si256(_mm256_blendv_pd(
      _mm256_castsi256_pd(otherwise), _mm256_castsi256_pd(if_negative), _mm256_castsi256_pd(sign)));
}
inline void store_low(uint32_t* out, Vec a) {
  const Vec low = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(low));
}
inline Vec first_counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline void store(uint32_t* out, Vec a) { _mm256_storeu_si256(reinterpret_cast<Vec*>(out), a); }
#endif

// So many counters of every lane go through the rounds side by side, to hide the latency of
// multiplications.
constexpr int kChains = 4;

template <int kCount = kChains>
struct Counters {
  Vec word[4][kCount];
};

constexpr int kRounds = 10;

// Keys of the rounds after the first two. (Of those, compilers do once what does not depend on the
// block.)
struct LateKeys {
  Vec of_round[kRounds - 2][2];
};

inline LateKeys late_keys(uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed) + 2 * kPhiloxW0;
  uint32_t k1 = static_cast<uint32_t>(seed >> 32) + 2 * kPhiloxW1;
  LateKeys keys;
  for (Vec* key : keys.of_round) {
    key[0] = splat(k0), key[1] = splat(k1);
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  return keys;
}

template <int kCount>
inline Counters<kCount> philox4x32(Counters<kCount> c, uint64_t seed, LateKeys& late) {
  // Seems to change the keys. Compilers would keep them in registers, which counters need.
  asm volatile("" : "+m"(late));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    const Vec key0 = round < 2 ? splat(k0) : late.of_round[round - 2][0];
    const Vec key1 = round < 2 ? splat(k1) : late.of_round[round - 2][1];
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) {
      const Vec p0 = multiply(c.word[0][u], splat(kPhiloxM0));
      const Vec p1 = multiply(c.word[2][u], splat(kPhiloxM1));
      c.word[0][u] = xor3(high(p1), c.word[1][u], key0);
      c.word[1][u] = p1;
      c.word[2][u] = xor3(high(p0), c.word[3][u], key1);
      c.word[3][u] = p0;
    }
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  return c;
}

// The four words of each block of a sample, as random_block. `sample_of(u)`: of the lanes of
// block[u].
template <int kCount = kChains, typename SampleOf>
inline Counters<kCount> random_blocks(const Vec* block, uint64_t seed, uint32_t stream,
                                      const SampleOf& sample_of, LateKeys& late) {
  Counters<kCount> c;
  for (int u = 0; u < kCount; ++u) {
    const Vec sample = sample_of(u);
    c.word[0][u] = block[u];
    c.word[1][u] = sample;
    c.word[2][u] = high(sample);
    c.word[3][u] = splat(stream);
  }
  return philox4x32(c, seed, late);
}

// The words of kCount vectors of counters, in sequence.
template <int kCount>
inline void store_words(uint32_t* out, const Counters<kCount>& c) {
  for (int u = 0; u < kCount; ++u) {
    const Vec words01 = even(c.word[0][u], c.word[1][u]);
    const Vec words23 = even(c.word[2][u], c.word[3][u]);
    store(out + 4 * u * kLanes, even(words01, words23));
    store(out + (4 * u + 2) * kLanes, odd(words01, words23));
  }
}

// The words of kCount vectors of blocks from `next` on, in sequence.
template <int kCount>
inline void fill_blocks(uint32_t* out, Vec* next, uint64_t seed, uint32_t stream, uint64_t sample,
                        LateKeys& late) {
  Vec block[kCount];
  for (int u = 0; u < kCount; ++u, *next = add(*next, splat(kLanes))) block[u] = *next;
  const auto sample_of = [sample](int) { return splat(sample); };
  store_words(out, random_blocks<kCount>(block, seed, stream, sample_of, late));
}

// So many words of a sample from position `first` on, a multiple of 4, and some more, up to the
// next multiple of kWordPadding. (Never inlined, like the next: registers would not do for more.)
__attribute__((noinline)) void fill_words(uint32_t* out, int64_t num_words, uint64_t seed,
                                          uint32_t stream, uint64_t sample, int64_t first = 0) {
  constexpr int kStep = 4 * kLanes * kChains;
  static_assert(kWordPadding % kStep == 0 && kLanes * kChains <= kWordsAtPadding);
  LateKeys late = late_keys(seed);
  Vec next = add(first_counters(), splat(static_cast<uint64_t>(first / 4)));
  int64_t i = 0;
  for (; num_words - i > kStep / 2; i += kStep) {
    fill_blocks<kChains>(out + i, &next, seed, stream, sample, late);
  }
  if (i < num_words) fill_blocks<kChains / 2>(out + i, &next, seed, stream, sample, late);
}

// The words of groups of four neighbours: that at counter[g] of sample `first_sample + sample[g]`.
// Groups are in the order of `group_order`. Writes some more, up to the next multiple of
// kWordPadding, for which there must be counters, too.
__attribute__((noinline)) void fill_groups(uint32_t* out, int64_t num_groups, uint64_t seed,
                                           uint32_t stream, const uint64_t* counter,
                                           const uint64_t* sample, uint64_t first_sample) {
  LateKeys late = late_keys(seed);
  for (int64_t g = 0; g < num_groups; g += kLanes * kChains) {
    Vec block[kChains];
    const auto at = [g](const uint64_t* from, int u) {
      return load(reinterpret_cast<const int64_t*>(from) + g + u * kLanes);
    };
    for (int u = 0; u < kChains; ++u) block[u] = at(counter, u);
    const auto sample_of = [&](int u) { return add(at(sample, u), splat(first_sample)); };
    store_words(out + 4 * g, random_blocks(block, seed, stream, sample_of, late));
  }
}

// Where the counter of group g has to be for words to come out in sequence.
inline int64_t group_order(int64_t g) {
  uint64_t lane[kLanes];
  const Vec counters = first_counters();
  std::memcpy(lane, &counters, sizeof lane);
  for (int i = 0; i < kLanes; ++i) {
    if (lane[i] == static_cast<uint64_t>(g % kLanes)) return g - g % kLanes + i;
  }
  return g;
}

// The words at some positions, each of a sample. Reads and writes up to kWordsAtPadding more.
template <typename SampleOf>
inline void words_of(uint32_t* out, const int64_t* positions, int64_t count, uint64_t seed,
                     uint32_t stream, const SampleOf& sample_of) {
  LateKeys late = late_keys(seed);
  for (int64_t i = 0; i < count; i += kLanes * kChains) {
    Vec position[kChains], block[kChains];
    for (int u = 0; u < kChains; ++u) {
      position[u] = load(positions + i + u * kLanes);
      block[u] = shift_right(position[u], 2);
    }
    const Counters<> c =
        random_blocks(block, seed, stream, [&](int u) { return sample_of(i + u * kLanes); }, late);
    for (int u = 0; u < kChains; ++u) {
      const Vec bit0 = shift_left(position[u], 63), bit1 = shift_left(position[u], 62);
      const Vec word = choose(bit1, choose(bit0, c.word[3][u], c.word[2][u]),
                              choose(bit0, c.word[1][u], c.word[0][u]));
      store_low(out + i + u * kLanes, word);
    }
  }
}

__attribute__((noinline)) void words_at(uint32_t* out, const int64_t* positions, int64_t count,
                                        uint64_t seed, uint32_t stream, uint64_t sample) {
  words_of(out, positions, count, seed, stream, [sample](int64_t) { return splat(sample); });
}

__attribute__((noinline)) void words_at(uint32_t* out, const int64_t* positions,
                                        const int64_t* samples, int64_t count, uint64_t seed,
                                        uint32_t stream) {
  words_of(out, positions, count, seed, stream, [=](int64_t i) { return load(samples + i); });
}

// The word at position 0 of each of some samples. Reads and writes up to kWordsAtPadding more.
inline void first_words(uint32_t* out, const int64_t* samples, int64_t count, uint64_t seed,
                        uint32_t stream) {
  LateKeys late = late_keys(seed);
  for (int64_t i = 0; i < count; i += kLanes * kChains) {
    Counters<> c;
    for (int u = 0; u < kChains; ++u) {
      const Vec sample = load(samples + i + u * kLanes);
      c.word[0][u] = splat(0);
      c.word[1][u] = sample;
      c.word[2][u] = high(sample);
      c.word[3][u] = splat(stream);
    }
    c = philox4x32(c, seed, late);
    for (int u = 0; u < kChains; ++u) store_low(out + i + u * kLanes, c.word[0][u]);
  }
}

#else

inline void fill_words(uint32_t* out, int64_t num_words, uint64_t seed, uint32_t stream,
                       uint64_t sample, int64_t first = 0) {
  for (int64_t i = 0; i < num_words; i += 4) {
    const Words4 block = random_block(seed, stream, sample, static_cast<uint32_t>((first + i) / 4));
    for (int j = 0; j < 4; ++j) out[i + j] = block.word[j];
  }
}

inline void fill_groups(uint32_t* out, int64_t num_groups, uint64_t seed, uint32_t stream,
                        const uint64_t* counter, const uint64_t* sample, uint64_t first_sample) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint32_t block = static_cast<uint32_t>(counter[g]);
    const Words4 made = random_block(seed, stream, first_sample + sample[g], block);
    for (int j = 0; j < 4; ++j) out[4 * g + j] = made.word[j];
  }
}

inline int64_t group_order(int64_t g) { return g; }

inline void words_at(uint32_t* out, const int64_t* positions, int64_t count, uint64_t seed,
                     uint32_t stream, uint64_t sample) {
  for (int64_t i = 0; i < count; ++i) out[i] = random_word(seed, stream, sample, positions[i]);
}

inline void words_at(uint32_t* out, const int64_t* positions, const int64_t* samples, int64_t count,
                     uint64_t seed, uint32_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t sample = static_cast<uint64_t>(samples[i]);
    out[i] = random_word(seed, stream, sample, positions[i]);
  }
}

inline void first_words(uint32_t* out, const int64_t* samples, int64_t count, uint64_t seed,
                        uint32_t stream) {
  for (int64_t i = 0; i < count; ++i) out[i] = random_word(seed, stream, samples[i], 0);
}

#endif

}  // namespace
}  // namespace nar
