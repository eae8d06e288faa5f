// The nucleus of a row of logits: the fewest most probable candidates whose probabilities add up to
// a share of those of all.
#pragma once

#include <algorithm>
#include <vector>

#include "unmask/candidates.h"
#include "unmask/unmask.h"

namespace nar {
namespace {

// What probabilities are computed from: exp(gap), where gap = (logit - largest) / temperature.
struct Gaps {
  float largest, scale;

  Floats of(Floats logits) const { return (logits - largest) * scale; }
};

// exp of what is below is 0 in units of 1 / kWhole.
constexpr float kLowestGap = -22.0f;

int64_t sum_of_exp(const Candidates& c, const Gaps& gaps) {
  constexpr int64_t kMost = LaneSums::kMost * kFloats;
  int64_t sum = 0;
  for (int64_t first = 0; first < c.count; first += kMost) {
    const int64_t end = std::min(c.count, first + kMost);
    LaneSums sums;
    for (int64_t i = first; i < end; i += kManyFloats) {
      Floats e[kManyVectors];
      for (int j = 0; j < kManyVectors; ++j)
        e[j] = gaps.of(load<Floats>(c.logits + i + j * kFloats));
      exp_of_negative(e);
      for (int j = 0; j < kManyVectors; ++j) sums.add(units(e[j]));
    }
    sum += sums.total();
  }
  return sum;
}

// Drops candidates that cannot be in the nucleus, as all of their terms together are not so large
// as what it may leave out.
void drop_improbable(int64_t left_out, const Gaps& gaps, int32_t* ids, Candidates* c) {
  // Half of what each of them may have, as rounding may put a larger logit below a smaller one.
  const int64_t least = left_out / (2 * c->count);
  float lowest = kLowestGap;
  if (least > 1) lowest = log_of_positive(spread(static_cast<float>(least) / kWhole))[0];
  keep_if([&](Floats x, Ints) { return gaps.of(x) >= lowest; }, ids, c);
}

// A candidate and its term, in the order of falling logits; of equal ones, the first comes first.
// (A type local to this file: see levels/kernels.h.)
struct Term {
  uint64_t order;
  int64_t index;
  int32_t units;
  bool operator<(const Term& other) const { return order < other.order; }
};

// Terms in bins, in the order of falling logits.
struct Bins {
  static constexpr float kPerGap = 32;  // a power of two, so that bins are in the order of gaps
  static constexpr int kCount = 1 - static_cast<int>(kLowestGap * kPerGap);

  static Ints of(Floats gap) {
    return __builtin_convertvector(smaller(gap * -kPerGap, spread(kCount - 1)), Ints);
  }
};

std::vector<Term> terms_of_bin(int64_t bin, const Candidates& c, const Gaps& gaps) {
  std::vector<Term> terms;
  for (int64_t i = 0; i < c.count; i += kFloats) {
    const Floats gap = gaps.of(load<Floats>(c.logits + i));
    const Ints is_inside = Bins::of(gap) == static_cast<int32_t>(bin);
    if (!any(is_inside)) continue;
    const Ints term = units(exp_of_negative(gap));
    for (int j = 0; j < kFloats; ++j) {
      if (is_inside[j]) terms.push_back({order_of(c.logits[i + j], i + j), i + j, term[j]});
    }
  }
  return terms;
}

// The index of the candidate up to which terms add up to `wanted`, at most the sum of all.
int64_t find_last(int64_t wanted, const Candidates& c, const Gaps& gaps) {
  int64_t sums[Bins::kCount] = {}, bin = 0;
  for (int64_t i = 0; i < c.count; i += kFloats) {
    const Floats gap = gaps.of(load<Floats>(c.logits + i));
    const Ints bins = Bins::of(gap), term = units(exp_of_negative(gap));
    for (int j = 0; j < kFloats; ++j) sums[bins[j]] += term[j];
  }
  while (sums[bin] < wanted) wanted -= sums[bin++];
  std::vector<Term> terms = terms_of_bin(bin, c, gaps);
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

// `ids`: memory for those of all candidates, which may have them.
void keep_top_p(int64_t top_p, const Gaps& gaps, int32_t* ids, Candidates* c) {
  const int64_t total = sum_of_exp(*c, gaps), wanted = share_of(total, top_p);
  drop_improbable(total - wanted, gaps, ids, c);
  const int64_t last = find_last(wanted, *c, gaps);
  keep_up_to(c->logits[last], c->id(last), ids, c);
}

}  // namespace
}  // namespace nar
