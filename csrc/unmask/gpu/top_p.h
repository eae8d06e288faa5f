// The nucleus of a row on a GPU: how many of the largest logits it has, which then are a top k.
#pragma once

#include <cuda_runtime.h>

#include "unmask/gpu/sums.h"
#include "unmask/gpu/top_k.h"

namespace nar {
namespace {

// The key of the last logit of the nucleus is searched by the sum of the probabilities that reach a
// pivot. Any pivots are correct: rounding here cannot change a result.
template <typename Row>
class NucleusSearch {
 public:
  using L = typename Row::L;

  // `filter`: null if all logits are kept. `scale`: of the logits.
  __device__ NucleusSearch(const Row& row, typename Row::Warps& team, const Filter<L>* filter,
                           float largest, float scale)
      : row_(row), team_(team), filter_(filter), largest_(largest), scale_(scale) {}

  // How many logits, of equal ones the first, have `top_p` of the sum of all.
  __device__ uint32_t size(int64_t top_p) {
    // The term of what is further below the largest is 0.
    low_ = L::key_near(largest_ - 22.0f / scale_);
    high_ = L::key(largest_) + 1;
    above_ = {0, 0};
    Reach reach[2];
    const uint32_t all[2] = {low_, low_};
    measure(all, reach);
    uint32_t reach_low = reach[0].count;
    const uint64_t wanted =
        static_cast<uint64_t>(share_of(static_cast<int64_t>(reach[0].sum), top_p));
    for (uint32_t turn = 0; high_ - low_ > 1 && reach_low - above_.count > 1; ++turn) {
      uint32_t pivots[2];
      propose(turn, pivots);
      measure(pivots, reach);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (reach[j].sum >= wanted) {
          if (pivots[j] > low_) low_ = pivots[j], reach_low = reach[j].count;
        } else if (pivots[j] < high_) {
          high_ = pivots[j], above_ = reach[j];
        }
      }
    }
    if (reach_low - above_.count == 1) return reach_low;
    // All that are left are equal.
    const uint32_t term = term_of(L::value(low_));
    return above_.count + static_cast<uint32_t>((wanted - above_.sum + term - 1) / term);
  }

 private:
  struct Reach {
    uint64_t sum;
    uint32_t count;
  };

  __device__ uint32_t term_of(float logit) const {
    return units(exp_of_small_negative(fminf(fmaxf((logit - largest_) * scale_, -88.0f), 0.0f)));
  }

  // Thirds of the bracket: of its values, as probabilities are smooth in those, and in every third
  // turn of its keys, which bounds the number of turns.
  __device__ void propose(uint32_t turn, uint32_t* pivots) const {
    const uint32_t third = (high_ - low_ + 1) / 3;
    uint32_t first = low_ + third, second = high_ - third;
    if (turn % 3 != 2) {
      const float from = L::value(low_), width = L::value(high_ - 1) - from;
      first = L::key_near(from + width * (1.0f / 3)),
      second = L::key_near(from + width * (2.0f / 3));
    }
    pivots[0] = min(max(first, low_ + 1), high_ - 1);
    pivots[1] = min(max(second, pivots[0]), high_ - 1);
  }

  // What reaches each of two pivots in the bracket.
  __device__ void measure(const uint32_t* pivots, Reach* reach) {
    const typename L::Pivot low = L::pivot(pivots[0]), high = L::pivot(high_);
    uint64_t sums[2] = {};
    uint32_t counts[2] = {};
    uint32_t column = row_.column(0);
#pragma unroll 1
    for (uint32_t i = 0; i < row_.num_tiles(); ++i, column += Row::kTile) {
      Chunk c = row_.chunk(i, column);
      if (filter_) c = filter_->kept(column, c);
      if (!__any_sync(kAllLanes, L::any_between(c, low, high))) continue;
#pragma unroll
      for (int j = 0; j < L::kItems; ++j) {
        const uint32_t key = L::key_at(c, j);
        if (key < pivots[0] || key >= high_) continue;
        const uint32_t term = term_of(L::item(c, j)), is_second = key >= pivots[1];
        sums[0] += term, ++counts[0];
        sums[1] += is_second ? term : 0, counts[1] += is_second;
      }
    }
    team_.sum(counts);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      reach[j] = {above_.sum + team_.sum(sums[j]), above_.count + counts[j]};
    }
  }

  const Row& row_;
  typename Row::Warps& team_;
  const Filter<L>* const filter_;
  const float largest_, scale_;
  uint32_t low_, high_;  // keys
  Reach above_;          // what reaches `high_`
};

}  // namespace
}  // namespace nar
