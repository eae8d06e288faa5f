// The nucleus of a row of logits: the fewest most probable candidates whose probabilities add up to
// a share of those of all.
#pragma once

#include <algorithm>
#include <vector>

#include "unmask/candidates.h"
#include "unmask/unmask.h"

namespace nar {
namespace {

// A candidate and its term of the sum, in the order of falling logits; of equal ones, the first
// comes first. (A type local to this file: see levels/kernels.h.)
struct Term {
  uint64_t order;
  int64_t index;
  int32_t units;
  bool operator<(const Term& other) const { return order < other.order; }
};

// The terms of the sum of probabilities, exp(gap) in units of 1 / kWhole, where gap = (logit -
// largest) / temperature, in bins of falling gaps. Those of the last bin are 0.
class TermBins {
 public:
  TermBins(const Candidates& candidates, float largest, float scale)
      : c_(candidates), largest_(largest), scale_(scale) {
    for (int64_t i = 0; i < c_.count; i += kManyFloats) {
      Floats e[kManyVectors];
      Ints bin[kManyVectors];
      for (int j = 0; j < kManyVectors; ++j) {
        e[j] = gap(i + j * kFloats);
        bin[j] = bin_of(e[j]);
      }
      exp_of_negative(e);
      for (int j = 0; j < kManyVectors; ++j) {
        const Ints term = units(e[j]);
        if (!any(term > 0)) continue;
        for (int lane = 0; lane < kFloats; ++lane) sums_[bin[j][lane]] += term[lane];
      }
    }
  }

  // The last candidate that is kept, where so much of the sum is: an index.
  int64_t last_of(int64_t top_p) const {
    int64_t total = 0, bin = 0;
    for (const int64_t sum : sums_) total += sum;
    int64_t wanted = share_of(total, top_p);
    while (sums_[bin] < wanted) wanted -= sums_[bin++];
    std::vector<Term> terms = terms_of(static_cast<int32_t>(bin));
    auto first = terms.begin(), end = terms.end();
    while (end - first > 1) {
      const auto middle = first + (end - first) / 2;
      std::nth_element(first, middle, end);
      int64_t sum = 0;
      for (auto term = first; term != middle; ++term) sum += term->units;
      if (sum < wanted) {
        wanted -= sum;
        first = middle;
      } else {
        end = middle;
      }
    }
    return first->index;
  }

 private:
  static constexpr float kPerGap = 32;  // a power of two: bins are in the order of the gaps
  static constexpr int kBins = 22 * static_cast<int>(kPerGap);  // exp(-21.5) is below half a unit

  Floats gap(int64_t i) const { return (load<Floats>(c_.logits + i) - largest_) * scale_; }

  static Ints bin_of(Floats gap) {
    return __builtin_convertvector(smaller(gap * -kPerGap, spread(kBins - 1)), Ints);
  }

  std::vector<Term> terms_of(int32_t bin) const {
    std::vector<Term> terms;
    for (int64_t i = 0; i < c_.count; i += kFloats) {
      const Floats x = gap(i);
      const Ints is_in = bin_of(x) == bin;
      if (!any(is_in)) continue;
      const Ints term = units(exp_of_negative(x));
      for (int lane = 0; lane < kFloats; ++lane) {
        if (is_in[lane])
          terms.push_back({order_of(c_.logits[i + lane], i + lane), i + lane, term[lane]});
      }
    }
    return terms;
  }

  const Candidates& c_;
  const float largest_, scale_;
  int64_t sums_[kBins] = {};
};

// `ids`: memory for those of all candidates, which may have them.
void keep_top_p(int64_t top_p, float largest, float scale, int32_t* ids, Candidates* c) {
  const int64_t last = TermBins(*c, largest, scale).last_of(top_p);
  keep_up_to(c->logits[last], c->id(last), ids, c);
}

}  // namespace
}  // namespace nar
