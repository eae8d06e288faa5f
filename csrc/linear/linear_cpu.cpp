// `linear` on the CPU: threads, and blocks that fit caches.
#include <algorithm>
#include <memory>

#include "levels/kernels.h"
#include "linear/linear.h"
#include "runtime/parallel_for.h"

namespace nar {
namespace {

// Blocking for L2: weights, then panels of hidden states, of a work item.
constexpr int64_t kWeights = 16384, kPanels = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool has_linear() { return kernels().linear.multiply; }

void linear_cpu(const LinearArgs& a, int num_threads) {
  if (a.rows == 0 || a.vocabulary == 0) return;
  const LinearKernel& kernel = kernels().linear;
  const int64_t panels = ceil_div(a.rows, kernel.panel_rows);
  const int64_t panel_size = kernel.panel_rows * a.depth;
  const std::unique_ptr<float[]> packed(new float[panels * panel_size]);
  parallel_for(panels, num_threads,
               [&](int64_t panel, int) { kernel.pack(a, panel, &packed[panel * panel_size]); });

  // Equal blocks of ids, multiples of 16: no two threads write to one cache line of logits.
  const int64_t most = std::max<int64_t>(kWeights / std::max<int64_t>(a.depth, 1), 16);
  const int64_t ids = ceil_div(ceil_div(a.vocabulary, ceil_div(a.vocabulary, most)), 16) * 16;
  const int64_t blocks = ceil_div(a.vocabulary, ids), groups = ceil_div(panels, kPanels);
  parallel_for(blocks * groups, num_threads, [&](int64_t item, int) {
    const int64_t first = item / groups * ids, end = std::min(first + ids, a.vocabulary);
    const int64_t group = item % groups * kPanels;
    for (int64_t panel = group; panel < std::min(group + kPanels, panels); ++panel) {
      kernel.multiply(a, panel, &packed[panel * panel_size], first, end);
    }
  });
}

}  // namespace nar
