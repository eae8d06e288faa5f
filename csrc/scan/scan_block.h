// `scan`, one block of ids that stays in the cache: passes over it that find nothing are cheap.
// Compiled once per instruction set (see levels/kernels.h).
#pragma once

#include <cstdint>
#include <limits>

#include "scan/scan.h"

namespace nar {
namespace {

// Ids from `low` to `high` that are not `mask` are good.
template <typename Token>
struct Vocabulary {
  using Limits = std::numeric_limits<Token>;

  explicit Vocabulary(const ScanArgs& a)
      : high(a.highest < Limits::max() ? static_cast<Token>(a.highest) : Limits::max()),
        has_mask(a.mask_id >= 0 && a.mask_id <= Limits::max()),
        mask(has_mask ? static_cast<Token>(a.mask_id) : 0) {}

  bool is_outside(Token id) const { return (id < low) | (id > high); }
  bool is_bad(Token id) const { return is_outside(id) || (has_mask && id == mask); }

  static constexpr Token low = 0;
  const Token high;
  const bool has_mask;
  const Token mask;
};

template <typename Token>
void count_ids(const ScanArgs& a, const Token* ids, int64_t count, bool all_have_bins,
               ScanPart* part) {
  uint32_t* __restrict counts = part->counts;
  if (all_have_bins) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int64_t k = 0; k < 4; ++k) {
        ++counts[static_cast<uint64_t>(ids[i + k]) * kHistograms + k % kHistograms];
      }
    }
    for (; i < count; ++i) ++counts[static_cast<uint64_t>(ids[i]) * kHistograms];
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = static_cast<int64_t>(ids[i]);
    if (id >= 0 && id < a.num_bins) {
      ++counts[id * kHistograms];
    } else {
      ++part->found.uncounted;
    }
  }
}

template <typename Token>
int64_t count_equal(const Token* ids, int64_t count, Token wanted) {
  Token any = 0;  // as wide as the ids: more lanes than a count
  for (int64_t i = 0; i < count; ++i) any |= ids[i] == wanted;
  if (!any) return 0;
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += ids[i] == wanted;
  return found;
}

template <typename Token>
void scan_ids(const ScanArgs& a, const Token* ids, int64_t count, int64_t offset, ScanPart* part) {
  Token least = ids[0], greatest = ids[0];
  for (int64_t i = 0; i < count; ++i) {
    least = ids[i] < least ? ids[i] : least;
    greatest = ids[i] > greatest ? ids[i] : greatest;
  }
  Scanned found;
  found.least = static_cast<int64_t>(least), found.greatest = static_cast<int64_t>(greatest);

  const Vocabulary<Token> vocabulary(a);
  if (vocabulary.is_outside(least) || vocabulary.is_outside(greatest)) {
    uint32_t outside = 0;
    for (int64_t i = 0; i < count; ++i) outside += vocabulary.is_outside(ids[i]);
    found.outside = outside;
  }
  if (vocabulary.has_mask && least <= vocabulary.mask && vocabulary.mask <= greatest) {
    found.masked = count_equal(ids, count, vocabulary.mask);
  }
  if (found.outside + found.masked) {
    for (int64_t i = 0; i < count && part->found.num_places < a.max_places; ++i) {
      if (vocabulary.is_bad(ids[i])) part->places[part->found.num_places++] = offset + i;
    }
  }
  part->found.merge(found);
  if (a.counts) {
    count_ids(a, ids, count, found.least >= 0 && found.greatest < a.num_bins, part);
  }
}

void scan_block(const ScanArgs& a, const void* ids, int64_t count, int64_t offset, ScanPart* part) {
  visit_tokens(ids, a.token_type,
               [&](const auto* typed) { scan_ids(a, typed, count, offset, part); });
}

}  // namespace
}  // namespace nar
