// Positions of the set bytes of a row.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
// The set bits of each byte, ascending.
struct SetBits {
  uint8_t bit[256][8] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0, n = 0; i < 8; ++i) {
        if (byte >> i & 1) bit[byte][n++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr SetBits kSetBits;
#endif

#if defined(__AVX512F__)
// Which of the next 64 of n bytes are not 0.
inline uint64_t set_bits(const uint8_t* bytes, int64_t n) {
  const __mmask64 there = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  const __m512i found = _mm512_maskz_loadu_epi8(there, bytes);
  return _mm512_test_epi8_mask(found, found);
}
#endif

// How many of n bytes are 1 and not 0.
inline int64_t count_set(const uint8_t* bytes, int64_t n) {
  int64_t count = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < n; i += 64) count += _mm_popcnt_u64(set_bits(bytes + i, n - i));
#else
  constexpr int64_t kBlock = 31 * 8;  // sums of bytes that fit in a byte
  for (int64_t first = 0; first < n; first += kBlock) {
    uint64_t words[kBlock / 8] = {}, sum = 0;
    std::memcpy(words, bytes + first, static_cast<size_t>(std::min(kBlock, n - first)));
    for (uint64_t word : words) sum += word;
    count += static_cast<int64_t>(sum * 0x0101010101010101u >> 56);
  }
#endif
  return count;
}

#if defined(__AVX512F__)
// 8 numbers from `at` on, of the type of the output.
inline __m512i eight_from(int64_t at, const int64_t*) {
  return _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(at));
}
inline __m256i eight_from(int64_t at, const int32_t*) {
  const __m256i step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_add_epi32(step, _mm256_set1_epi32(static_cast<int>(at)));
}
inline __m512i next_eight(__m512i eight) { return _mm512_add_epi64(eight, _mm512_set1_epi64(8)); }
inline __m256i next_eight(__m256i eight) { return _mm256_add_epi32(eight, _mm256_set1_epi32(8)); }

// Those whose bits are set.
inline void store_set(int64_t* out, __m512i eight, uint32_t bits, uint32_t count) {
  _mm512_mask_storeu_epi64(out, static_cast<__mmask8>((1u << count) - 1),
                           _mm512_maskz_compress_epi64(static_cast<__mmask8>(bits), eight));
}
inline void store_set(int32_t* out, __m256i eight, uint32_t bits, uint32_t count) {
  _mm256_mask_storeu_epi32(out, static_cast<__mmask8>((1u << count) - 1),
                           _mm256_maskz_compress_epi32(static_cast<__mmask8>(bits), eight));
}
#elif defined(__AVX2__)
// The 8 numbers from `at` on whose bits are set; what is behind them in `out` changes, too.
inline void store_set(int64_t* out, int64_t at, uint32_t bits) {
  const uint8_t* of_byte = kSetBits.bit[bits];
  for (int half = 0; half < 8; half += 4) {
    int four;
    std::memcpy(&four, of_byte + half, sizeof four);
    const __m256i index = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half),
                        _mm256_add_epi64(index, _mm256_set1_epi64x(at)));
  }
}
inline void store_set(int32_t* out, int64_t at, uint32_t bits) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.bit[bits]));
  const __m256i index = _mm256_cvtepu8_epi32(eight);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_add_epi32(index, _mm256_set1_epi32(static_cast<int>(at))));
}
#endif

// Writes `first` plus the index of each of n flags that is 1 and not 0, and returns how many. There
// is `room` for at least as many numbers, all of which may change; what comes behind may be another
// thread's. Some 8 more than needed spare a slow end.
template <typename Index>  // int32_t or int64_t
int64_t set_positions(const uint8_t* __restrict flags, int64_t n, int64_t first,
                      Index* __restrict out, int64_t room) {
  const Index *begin = out, *end = out + room;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < n; i += 64) {
    uint64_t bits = set_bits(flags + i, n - i);
    auto eight = eight_from(first + i, out);
    for (int group = 0; group < 8; ++group, bits >>= 8) {
      const uint32_t here = bits & 0xFF, count = static_cast<uint32_t>(_mm_popcnt_u32(here));
      store_set(out, eight, here, count);
      out += count;
      eight = next_eight(eight);
    }
  }
#elif defined(__AVX2__)
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + i));
    uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7)));
    for (int64_t at = first + i; at < first + i + 32; at += 8, bits >>= 8) {
      if (end - out < 8) {
        for (uint32_t left = bits & 0xFF; left != 0; left &= left - 1) {
          *out++ = static_cast<Index>(at + __builtin_ctz(left));
        }
        continue;
      }
      store_set(out, at, bits & 0xFF);
      out += _mm_popcnt_u32(bits & 0xFF);
    }
  }
#endif
  for (; out < end && i < n; ++i) {  // no branch on the flags
    *out = static_cast<Index>(first + i);
    out += flags[i];
  }
  return out - begin;
}

}  // namespace
}  // namespace nar
