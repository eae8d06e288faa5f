// One row of `corrupt`, top to bottom. Compiled once per instruction set (see levels/kernels.h):
// most loops are plain C++ that compilers vectorise; steps where they do badly have intrinsics, in
// headers of their own.
#pragma once

#include <algorithm>

#include "corrupt/corrupt_cpu.h"
#include "corrupt/write_row.h"
#include "rng/philox_simd.h"
#include "select/key_bounds.h"
#include "select/set_positions.h"
#include "select/short_bounds.h"

namespace nar {
namespace {

template <typename T>
void differ_from(const void* values, T given, int64_t first, int64_t length, uint8_t* can_mask) {
  const T* of_row = static_cast<const T*>(values) + first;
  for (int64_t i = 0; i < length; ++i) can_mask[i] = of_row[i] != given;
}

// Which positions of a row may be masked, whatever their ids. The loss mask of a corpus says
// nothing of ends of sequence that are added, which may.
void find_maskable(const CorruptArgs& a, const Row& row, void* scratch, uint8_t* can_mask) {
  const int64_t length = row.span.length, first = row.given;
  switch (a.maskable ? a.maskable_bytes : 0) {
    case 0: std::fill(can_mask, can_mask + length, uint8_t{1}); break;
    case 1: differ_from<uint8_t>(a.maskable, 0, first, length, can_mask); break;
    case 4: differ_from<int32_t>(a.maskable, kIgnoreIndex, first, length, can_mask); break;
    default: differ_from<int64_t>(a.maskable, kIgnoreIndex, first, length, can_mask);
  }
  if (a.has_loss_mask()) {
    const uint8_t* flags = locate_flags(a.windows, a.loss_mask, row.sample, scratch);
    for (int64_t i = 0; i < row.span.stored; ++i) can_mask[i] &= flags[i] != 0;
  }
  if (!a.prompt_lengths) return;
  const int64_t prompt = std::min(std::max(a.prompt_lengths[row.sample], int64_t{0}), length);
  std::fill(can_mask, can_mask + prompt, uint8_t{0});
}

// Finds the maskable positions. The keys of the others become the largest, so that no bound selects
// them.
void exclude_keys(const CorruptArgs& a, const Row& row, const RowScratch& scratch) {
  const int64_t length = row.span.length;
  const int32_t* clean = scratch.clean;
  uint8_t* can_mask = scratch.can_mask;
  uint32_t* keys = scratch.keys;
  find_maskable(a, row, scratch.window, can_mask);
  for (int64_t i = 0; a.never_mask && i < length; ++i) can_mask[i] &= !a.never_mask[clean[i]];
  for (int64_t i = 0; i < length; ++i) keys[i] |= can_mask[i] - 1u;
}

// The words of a block begin at a group of four.
int64_t groups_of_block(const Division& d) { return (d.block_length + 3) / 4; }

void count_blocks(const Division& d, int64_t num_groups, uint64_t* counter, uint64_t* block) {
  const int64_t of_block = groups_of_block(d);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t at = group_order(g);
    counter[at] = static_cast<uint64_t>(g % of_block);
    block[at] = static_cast<uint64_t>(g / of_block);
  }
}

// The keys of a row, of blocks from `slot` on.
void fill_keys(const CorruptArgs& a, const Row& row, uint64_t slot, const BlockCounters& counters,
               const RowScratch& scratch) {
  const int64_t length = row.span.length, of_block = a.division.block_length;
  uint32_t* keys = scratch.keys;
  const uint32_t stream = row.view.stream(kMaskKey);
  if (counters.num_groups == 0) {
    fill_words(keys, length, a.seed, stream, slot);
  } else {
    uint32_t* words = of_block % 4 == 0 ? keys : scratch.words;
    const int64_t padded = (of_block + 3) / 4 * 4;
    const int64_t num_words = length / of_block * padded + length % of_block;
    fill_groups(words, (num_words + 3) / 4, a.seed, stream, counters.counter, counters.block, slot);
    for (int64_t to = 0; words != keys && to < length; to += of_block, words += padded) {
      std::copy(words, words + std::min(of_block, length - to), keys + to);
    }
  }
  for (int64_t i = 0; row.view.is_rest && i < length; ++i) keys[i] = ~keys[i];
}

// Key bounds of a block: the kept are below the first, the kept or random below the second, the
// masked below the third.
struct BlockBounds {
  KeyBound keep, replace, mask;

  bool is_any_tied() const { return is_tied(keep) || is_tied(replace) || is_tied(mask); }
};

struct Block {
  int64_t first, length;  // in the row
  uint64_t slot;
  uint32_t t16;
  int32_t num_maskable, num_masked;  // the latter of an exact draw, else 0
};

int64_t length_of_block(const CorruptArgs& a, const Row& row, int64_t j) {
  const int64_t of_block = a.division.block_length;
  return std::min(std::max(row.span.length - j * of_block, int64_t{0}), of_block);
}

// Up to kBlocksAtOnce blocks of a row from number j on. Counts are in arrays of their own, so that
// the lookups of all blocks, in a table that the first-level cache does not hold, wait together.
struct Blocks {
  int64_t j;
  int count;
  const uint32_t* t16;
  int32_t num_maskable[kBlocksAtOnce], num_masked[kBlocksAtOnce];  // as of Block

  Blocks(const CorruptArgs& a, const Row& row, int64_t first, const uint32_t* t16_of_row,
         const uint8_t* can_mask)
      : j(first),
        count(static_cast<int>(std::min<int64_t>(a.division.num_blocks - j, kBlocksAtOnce))),
        t16(t16_of_row + j) {
    for (int u = 0; u < count; ++u) {
      const int64_t length = length_of_block(a, row, j + u);
      const int64_t at = (j + u) * a.division.block_length;
      num_maskable[u] = static_cast<int32_t>(can_mask ? count_set(can_mask + at, length) : length);
    }
    if (is_exact(a, row.view)) {
      count_exact(a.ratio_table, row.view);
    } else {
      std::fill(num_masked, num_masked + count, 0);
    }
  }

  Block operator()(const CorruptArgs& a, const Row& row, uint64_t slot, int u) const {
    return {(j + u) * a.division.block_length,
            length_of_block(a, row, j + u),
            slot + static_cast<uint64_t>(j + u),
            t16[u],
            num_maskable[u],
            num_masked[u]};
  }

 private:
  // As exact_count of a view.
  void count_exact(const uint32_t* ratios, const View& view) {
    for (int u = 0; u < count; ++u) num_masked[u] = exact_count(ratios[t16[u]], num_maskable[u]);
    for (int u = 0; view.is_rest && u < count; ++u) num_masked[u] = num_maskable[u] - num_masked[u];
    for (int u = 0; view.is_all && u < count; ++u) num_masked[u] = num_maskable[u];
  }
};

bool has_corruption(const CorruptArgs& a) { return a.keep_share || a.random_share; }

BlockBounds drawn_bounds(const CorruptArgs& a, const View& view, const Block& block) {
  const CorruptionShares shares = corruption_shares(a, a.seed, view, block.slot);
  const uint64_t ratio = view_ratio(a, view, block.t16);
  return {(ratio * shares.keep >> 31) << 32, (ratio * shares.replace >> 31) << 32, ratio << 32};
}

// How many keys are below the bounds of an exact draw.
struct Ranks {
  int32_t keep, replace, mask;
};

Ranks exact_ranks(const CorruptArgs& a, const View& view, const Block& block) {
  const CorruptionShares shares = corruption_shares(a, a.seed, view, block.slot);
  const int32_t k = block.num_masked;
  return {shares.of_count(shares.keep, k), shares.of_count(shares.replace, k), k};
}

BlockBounds exact_bounds(const CorruptArgs& a, const View& view, const Block& block,
                         const RowScratch& scratch, const uint8_t* can_mask) {
  const auto [keep, replace, mask] = exact_ranks(a, view, block);
  const int32_t ranks[kNumRanks] = {keep, replace, mask};
  KeyBound bounds[kNumRanks];
  key_bounds(scratch.keys + block.first, can_mask ? can_mask + block.first : nullptr, block.length,
             block.num_maskable, ranks, scratch.upper, bounds, view.order(0));
  return {bounds[0], bounds[1], bounds[2]};
}

// The same of up to kBlocksAtOnce blocks of a row whose upper halves are there.
void short_exact_bounds(const CorruptArgs& a, const Row& row, uint64_t slot, const Blocks& blocks,
                        const RowScratch& scratch, const uint8_t* can_mask, BlockBounds* bounds) {
  const int64_t first = blocks.j * a.division.block_length;
  const int count = blocks.count;
  const ShortBlocks of_keys = {scratch.keys + first,
                               scratch.upper + first,
                               can_mask ? can_mask + first : nullptr,
                               a.division.block_length,
                               count,
                               row.span.length - first};
  Lanes ranks[kNumRanks] = {};
  for (int u = 0; u < count; ++u) ranks[2][u] = static_cast<int16_t>(blocks.num_masked[u]);
  for (int u = 0; has_corruption(a) && u < count; ++u) {
    const Ranks of_block = exact_ranks(a, row.view, blocks(a, row, slot, u));
    ranks[0][u] = static_cast<int16_t>(of_block.keep);
    ranks[1][u] = static_cast<int16_t>(of_block.replace);
  }
  const Transposed upper(of_keys);
  KeyBound found[kNumRanks][kBlocksAtOnce] = {};
  for (int j = has_corruption(a) ? 0 : kNumRanks - 1; j < kNumRanks; ++j) {
    short_bounds(of_keys, upper, ranks[j], row.view.order(0), found[j]);
  }
  for (int u = 0; u < count; ++u) bounds[u] = {found[0][u], found[1][u], found[2][u]};
}

// In place of keys, whose bounds differ from block to block, what becomes of a position: these have
// the same bounds throughout.
constexpr uint32_t kRandom = 1, kMasked = 2, kLeft = 3;  // 0: masked, but kept
constexpr BlockBounds kFateBounds = {KeyBound{kRandom} << 32, KeyBound{kMasked} << 32,
                                     KeyBound{kLeft} << 32};

void decide(const BlockBounds& bounds, const View& view, const uint8_t* can_mask, int64_t length,
            uint32_t* keys) {
  if (bounds.is_any_tied()) {  // rare: position decides between equal keys
    for (int64_t i = 0; i < length; ++i) {
      const KeyBound key = KeyBound{keys[i]} << 32 | view.order(i);
      const bool can = !can_mask || can_mask[i];
      keys[i] = can ? (key >= bounds.keep) + (key >= bounds.replace) + (key >= bounds.mask) : kLeft;
    }
    return;
  }
  const uint32_t keep = bounds.keep >> 32, replace = bounds.replace >> 32;
  const uint32_t mask = bounds.mask >> 32;
  if (replace == 0) {
    for (int64_t i = 0; i < length; ++i) keys[i] = keys[i] < mask ? kMasked : kLeft;
    return;
  }
  for (int64_t i = 0; i < length; ++i) {
    keys[i] = (keys[i] >= keep) + (keys[i] >= replace) + (keys[i] >= mask);
  }
}

// A second pass over the few positions that get a random token, so that only they draw words.
template <typename Id>
void randomise_row(const CorruptArgs& a, const Row& row, const BlockBounds& bounds, uint64_t slot,
                   const uint32_t* __restrict keys, Id* __restrict input_ids) {
  constexpr int64_t kBlock = 512;
  uint8_t chosen[kBlock];
  int64_t positions[kBlock + kWordsAtPadding], places[kBlock + kWordsAtPadding];
  int64_t slots[kBlock + kWordsAtPadding];
  uint32_t words[kBlock + kWordsAtPadding];
  const uint32_t keep = bounds.keep >> 32, width = (bounds.replace >> 32) - keep;
  const uint32_t stream = row.view.stream(kRandomToken);
  const int64_t end = row.span.length, of_block = a.division.block_length;
  int64_t begin = 0;  // of the block that a position is in
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t length = std::min(kBlock, end - first);
    for (int64_t i = 0; i < length; ++i) chosen[i] = keys[first + i] - keep < width;
    const int64_t count = set_positions(chosen, length, first, positions, kBlock + kWordsAtPadding);
    if (a.division.num_blocks == 1) {
      words_at(words, positions, count, a.seed, stream, slot);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        for (; positions[j] - begin >= of_block; begin += of_block) ++slot;
        places[j] = positions[j] - begin, slots[j] = static_cast<int64_t>(slot);
      }
      words_at(words, places, slots, count, a.seed, stream);
    }
    for (int64_t j = 0; j < count; ++j) {
      input_ids[positions[j]] = random_token(words[j], a.windows.num_tokens, a.windows.mask_id);
    }
  }
}

template <typename Id>
RowOutput<Id> outputs_of(const CorruptArgs& a, int64_t at, const RowScratch& scratch) {
  return {static_cast<Id*>(a.input_ids) + at,
          a.labels ? static_cast<Id*>(a.labels) + at : static_cast<Id*>(scratch.labels),
          a.masked_indices ? a.masked_indices + at : scratch.masked};
}

// Behind the end of a sample.
template <typename Id>
void write_padding(const CorruptArgs& a, const Span& span, RowOutput<Id> out) {
  std::fill(out.input_ids + span.length, out.input_ids + span.space, a.windows.spans.pad_id);
  std::fill(out.labels + span.length, out.labels + span.space, static_cast<Id>(kIgnoreIndex));
  std::fill(out.masked + span.length, out.masked + span.space, uint8_t{0});
}

// How many keys of a block are below its ratio.
int64_t count_drawn(const CorruptArgs& a, const View& view, const Block& block) {
  constexpr int64_t kBlock = 1024;
  uint32_t keys[kBlock];
  const uint64_t bound = view_ratio(a, view, block.t16);
  int64_t count = 0;
  for (int64_t first = 0; first < block.length; first += kBlock) {
    const int64_t length = std::min(kBlock, block.length - first);
    fill_words(keys, length, a.seed, view.stream(kMaskKey), block.slot, first);
    int32_t below = 0;
    for (int64_t i = 0; i < length; ++i) below += view.key(keys[i]) < bound;
    count += below;
  }
  return count;
}

// What is known of each draw, by the number of the first.
void write_scalars(const CorruptArgs& a, int64_t draw, int64_t view, const Blocks& blocks) {
  float* times = a.times + draw;
  float* loss_weight = a.loss_weight + draw;
  const float* weights = weights_of_view(a, view);
  const float low = a.time_low, span = a.time_span;
  const bool doubles = doubles_all(a, view), weighs_counts = a.weighs_counts;
  const int32_t *n = blocks.num_maskable, *k = blocks.num_masked;
  const int count = blocks.count;
  float weight[kBlocksAtOnce];
  for (int u = 0; u < count; ++u) times[u] = time_of(low, span, blocks.t16[u]);
  for (int u = 0; u < count; ++u) weight[u] = weights[blocks.t16[u]];
  for (int u = 0; weighs_counts && u < count; ++u) {
    weight[u] = count_weight(weight[u], n[u], k[u], doubles);
  }
  int64_t *num_masked = a.num_masked + draw, *num_maskable = a.num_maskable + draw;
  for (int u = 0; u < count; ++u) {
    loss_weight[u] = weight[u], num_masked[u] = k[u], num_maskable[u] = n[u];
  }
}

// Returns where the masks of the row are.
template <typename Id>
const uint8_t* write_outputs(const CorruptArgs& a, const Row& row, uint64_t slot,
                             const RowScratch& scratch, const BlockBounds& bounds) {
  const RowOutput<Id> out = outputs_of<Id>(a, row.span.begin, scratch);
  write_row(bounds.keep >> 32, bounds.mask >> 32, row.span.length, a.windows.mask_id, scratch.keys,
            scratch.clean, out);
  if (bounds.replace != bounds.keep && a.random_share) {
    randomise_row(a, row, bounds, slot, scratch.keys, out.input_ids);
  }
  write_padding(a, row.span, out);
  return out.masked;
}

// The keys of a row of several blocks become what they decide.
void decide_blocks(const CorruptArgs& a, const Row& row, uint64_t slot, const uint32_t* t16,
                   const RowScratch& scratch, const uint8_t* can_mask) {
  const View& view = row.view;
  const bool exact = is_exact(a, view);
  const bool is_short = pays_side_by_side(a.division.block_length, a.division.num_blocks);
  if (exact && is_short) upper_halves(scratch.keys, row.span.length, scratch.upper);
  BlockBounds bounds[kBlocksAtOnce];
  for (int64_t first = 0; first < a.division.num_blocks; first += kBlocksAtOnce) {
    const Blocks blocks(a, row, first, t16, can_mask);
    const float* weights = weights_of_view(a, row.view_index);
    for (int u = 0; u < blocks.count; ++u) __builtin_prefetch(weights + blocks.t16[u]);
    if (exact && is_short) {
      short_exact_bounds(a, row, slot, blocks, scratch, can_mask, bounds);
    } else {
      for (int u = 0; u < blocks.count; ++u) {
        const Block block = blocks(a, row, slot, u);
        bounds[u] =
            exact ? exact_bounds(a, view, block, scratch, can_mask) : drawn_bounds(a, view, block);
      }
    }
    for (int u = 0; u < blocks.count; ++u) {
      const int64_t at = (first + u) * a.division.block_length;
      decide(bounds[u], view, can_mask ? can_mask + at : nullptr,
             length_of_block(a, row, first + u), scratch.keys + at);
    }
  }
}

void corrupt_row(const CorruptArgs& a, int64_t index, const uint32_t* t16,
                 const BlockCounters& counters, const RowScratch& scratch, InvalidTokens* invalid) {
  const Row row(a, index);
  const View& view = row.view;
  const int64_t length = row.span.length, num_blocks = a.division.num_blocks;
  load_row(a.windows, row.sample, scratch.clean, scratch.window, invalid);
  std::fill(scratch.clean + row.span.stored, scratch.clean + length, a.windows.spans.eos_id);
  const uint64_t slot = a.slot(Draw{row.sample, 0, row.view_index});
  fill_keys(a, row, slot, counters, scratch);
  const bool all_maskable = !is_restricted(a), exact = is_exact(a, view);
  const uint8_t* can_mask = all_maskable ? nullptr : scratch.can_mask;
  if (!all_maskable) exclude_keys(a, row, scratch);

  BlockBounds bounds = kFateBounds;
  if (num_blocks > 1) {
    decide_blocks(a, row, slot, t16, scratch, can_mask);
  } else {
    const Block block = Blocks(a, row, 0, t16, can_mask)(a, row, slot, 0);
    const BlockBounds own =
        exact ? exact_bounds(a, view, block, scratch, can_mask) : drawn_bounds(a, view, block);
    if (own.is_any_tied()) {
      decide(own, view, can_mask, length, scratch.keys);
    } else {
      bounds = own;
    }
  }
  const uint8_t* masked = a.narrow ? write_outputs<int32_t>(a, row, slot, scratch, bounds)
                                   : write_outputs<int64_t>(a, row, slot, scratch, bounds);
  for (int64_t first = 0; first < num_blocks; first += kBlocksAtOnce) {
    Blocks blocks(a, row, first, t16, can_mask);
    for (int u = 0; !exact && u < blocks.count; ++u) {
      const int64_t at = (first + u) * a.division.block_length;
      blocks.num_masked[u] =
          static_cast<int32_t>(count_set(masked + at, length_of_block(a, row, first + u)));
    }
    write_scalars(a, index * num_blocks + first, row.view_index, blocks);
  }
}

int64_t count_row(const CorruptArgs& a, int64_t index, const uint32_t* t16) {
  const Row row(a, index);
  const uint64_t slot = a.slot(Draw{row.sample, 0, row.view_index});
  const bool exact = is_exact(a, row.view);
  int64_t count = 0;
  for (int64_t first = 0; first < a.division.num_blocks; first += kBlocksAtOnce) {
    const Blocks blocks(a, row, first, t16, nullptr);
    for (int u = 0; u < blocks.count; ++u) {
      count += exact ? blocks.num_masked[u] : count_drawn(a, row.view, blocks(a, row, slot, u));
    }
  }
  return count;
}

void write_rows(const CorruptArgs& a, int64_t index, const uint8_t* masked, int64_t first,
                int64_t room) {
  const Span span = Row(a, index).span;
  const int64_t length = span.length, base = span.begin;
  if (a.narrow) {
    set_positions(masked, length, base, static_cast<int32_t*>(a.row_buffer) + first, room);
  } else {
    set_positions(masked, length, base, static_cast<int64_t*>(a.row_buffer) + first, room);
  }
}

}  // namespace
}  // namespace nar
