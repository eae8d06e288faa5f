// `corrupt`: windows, validation, masks and labels. Arguments, and the rules of a row that the CPU
// and the GPU share.
#pragma once

#include <cstdint>

#include "corrupt/division.h"
#include "corrupt/token_windows.h"
#include "rng/philox.h"

namespace nar {

constexpr int64_t kIgnoreIndex = -100;
constexpr uint64_t kProbabilityOne = uint64_t{1} << 31;  // of shares

// Length of `invalid`: how many ids were bad, the lowest offset of one, its value; how many windows
// reached outside the corpus; how many sample slots were negative.
constexpr int64_t kNumInvalid = 5;

// The window of a slot, in place of starts: slot g is position g % num_windows of epoch
// g / num_windows, and with `shuffle` each epoch has an order of its own.
struct WindowOrder {
  int64_t num_windows;  // 0: starts tell
  int64_t phase, stride;
  bool shuffle;

  NAR_HOST_DEVICE int64_t start(uint64_t index) const {
    return phase + static_cast<int64_t>(index) * stride;
  }
};

// Sizes: `batch` samples, `num_positions` of them in one view, `draws`: a batch of blocks in each
// view. Outputs have all views one after the other.
struct CorruptArgs {
  // Inputs.
  Windows windows;
  Division division;
  WindowOrder order;
  const int64_t* sample_ids;  // [batch], or null: first_sample, first_sample + 1, ...
  int64_t first_sample;
  const int64_t* step;   // [1], adds step * global_batch to first_sample; or null
  const void* maskable;  // [num_positions] or null
  int maskable_bytes;    // 1: flags; 4, 8: labels, of which kIgnoreIndex may not be masked
  Flags loss_mask;       // beside the corpus: 0 may not be masked; neither flat nor runs: 1
  const int64_t* prompt_lengths;  // [batch] or null
  const uint32_t* ratio_table;    // [65536], 0.32 fixed point
  const float* weight_table;      // [65536], or of each view
  bool weights_by_view;
  const int64_t* view_times;  // [views], 16-bit times in place of drawn ones, or null
  const uint8_t* never_mask;  // [num_tokens] or null
  uint64_t seed;
  const uint64_t* seed_tensor;  // [1], in place of seed, or null
  int64_t global_batch;
  bool exact, weighs_counts, stratified;
  float time_low, time_span;
  uint64_t keep_share, random_share, coin_share;  // kProbabilityOne stands for 1

  // Outputs. Ids, labels and row indices are int32 if `narrow`, else int64; null is not wanted.
  bool narrow;
  void* input_ids;          // [views * num_positions]
  void* labels;             // [views * num_positions] or null
  uint8_t* masked_indices;  // [views * num_positions] or null
  float* times;             // [draws]
  float* loss_weight;       // [draws]
  int64_t* num_masked;      // [draws]
  int64_t* num_maskable;    // [draws]
  void* row_buffer;         // [views * num_positions] or null
  int64_t* invalid;         // [kNumInvalid]

  NAR_HOST_DEVICE bool has_loss_mask() const { return loss_mask.flat || loss_mask.runs.count; }

  NAR_HOST_DEVICE int64_t num_draws() const { return division.num_draws(windows.batch); }

  // The slot of a sample, and the one that a block of it is drawn from.
  NAR_HOST_DEVICE uint64_t slot(int64_t row) const {
    if (sample_ids) return static_cast<uint64_t>(sample_ids[row]);
    return static_cast<uint64_t>(first_sample + (step ? *step * global_batch : 0) + row);
  }
  NAR_HOST_DEVICE uint64_t slot(const Draw& draw) const {
    return slot(draw.row) * static_cast<uint64_t>(division.blocks_per_slot) +
           static_cast<uint64_t>(draw.block);
  }

  // Of how many slots each has a stratum of time.
  NAR_HOST_DEVICE uint64_t num_strata() const {
    return static_cast<uint64_t>(global_batch * division.blocks_per_slot);
  }
};

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// The 16-bit time of a sample slot whose word is given: its upper half, within a stratum.
NAR_HOST_DEVICE inline uint32_t stratified_time(uint64_t stratum, uint32_t word,
                                                uint64_t global_batch) {
  return static_cast<uint32_t>(((stratum << 16) + (word >> 16)) / global_batch);
}

// Whether some positions may not be masked, for all that is known of the arguments.
NAR_HOST_DEVICE inline bool is_restricted(const CorruptArgs& a) {
  return a.maskable || a.has_loss_mask() || a.prompt_lengths || a.never_mask;
}

// Whether a view masks a number of positions that is known, not those below the ratio.
NAR_HOST_DEVICE inline bool is_exact(const CorruptArgs& a, const View& view) {
  return a.exact || view.is_all;
}

// The ratio of a view, in units of 2^-32.
NAR_HOST_DEVICE inline uint64_t view_ratio(const CorruptArgs& a, const View& view, uint32_t t16) {
  const uint64_t ratio = a.ratio_table[t16];
  return view.is_rest ? (uint64_t{1} << 32) - ratio : ratio;
}

// How many of n maskable positions an exact draw masks at a ratio m: ceil(m n), at least one.
NAR_HOST_DEVICE inline int32_t exact_count(uint32_t ratio, int32_t n) {
  const int32_t k =
      static_cast<int32_t>((uint64_t{ratio} * static_cast<uint64_t>(n) + 0xFFFFFFFF) >> 32);
  return k > n ? n : k < 1 && n > 0 ? 1 : k;
}

// The same of a view.
NAR_HOST_DEVICE inline int32_t exact_count(const CorruptArgs& a, const View& view, uint32_t t16,
                                           int32_t n) {
  if (view.is_all) return n;
  const int32_t k = exact_count(a.ratio_table[t16], n);
  return view.is_rest ? n - k : k;
}

// Shares of the masked positions that keep their token, or keep it or get a random one, and the
// word that rounds their counts.
struct CorruptionShares {
  uint64_t keep, replace, rounding;

  NAR_HOST_DEVICE int32_t of_count(uint64_t share, int32_t k) const {
    return static_cast<int32_t>((static_cast<uint64_t>(k) * share + rounding) >> 31);
  }
};

NAR_HOST_DEVICE inline CorruptionShares corruption_shares(const CorruptArgs& a, uint64_t seed,
                                                          const View& view, uint64_t slot) {
  if (a.keep_share == 0 && a.random_share == 0) return {};
  const Words4 coin = random_block(seed, view.stream(kCorruption), slot, 0);
  const uint64_t keep = coin.word[0] >> 1 < a.coin_share ? a.keep_share : 0;
  const uint64_t random = coin.word[1] >> 1 < a.coin_share ? a.random_share : 0;
  return {keep, keep + random, coin.word[2] >> 1};
}

// Uniform over the vocabulary without mask_id.
NAR_HOST_DEVICE inline int32_t random_token(uint32_t word, int32_t num_tokens, int32_t mask_id) {
  const uint64_t range = static_cast<uint32_t>(num_tokens - 1);
  const int32_t token = static_cast<int32_t>(word * range >> 32);
  return token + (token >= mask_id);
}

NAR_HOST_DEVICE inline const float* weights_of_view(const CorruptArgs& a, int64_t view) {
  return a.weight_table + (a.weights_by_view ? view << 16 : 0);
}

// Whether a view counts twice what it masks all of: a pair has the counts k and n - k, and where
// that leaves nothing, n would count half of what it is in an integral over ratios.
NAR_HOST_DEVICE inline bool doubles_all(const CorruptArgs& a, int64_t view) {
  return a.division.pairing == Pairing::kComplement && view == 0;
}

// The weight of a draw that masks k of its n maskable positions, given that of its time.
NAR_HOST_DEVICE inline float count_weight(float weight, int32_t n, int32_t k, bool doubles_all) {
  weight = weight * static_cast<float>(n) / static_cast<float>(k > 0 ? k : 1);
  return k == 0 ? 0.0f : doubles_all && k == n ? 2.0f * weight : weight;
}

NAR_HOST_DEVICE inline float time_of(float low, float span, uint32_t t16) {
  return low + span * ((static_cast<float>(t16) + 0.5f) / 65536.0f);
}

// What is known of a draw, by its number and the index of its view, once k of its n maskable
// positions are masked.
template <bool kDivided>
NAR_HOST_DEVICE void write_scalars(const CorruptArgs& a, int64_t draw, int64_t view, uint32_t t16,
                                   int32_t n, int32_t k) {
  float weight = weights_of_view(a, view)[t16];
  if (a.weighs_counts) weight = count_weight(weight, n, k, kDivided && doubles_all(a, view));
  a.times[draw] = time_of(a.time_low, a.time_span, t16);
  a.loss_weight[draw] = weight;
  a.num_masked[draw] = k;
  a.num_maskable[draw] = n;
}

}  // namespace
}  // namespace nar
