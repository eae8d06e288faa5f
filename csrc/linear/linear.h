// A small GEMM: hidden states times the LM head. Each logit is one chain of fused multiply-adds, so
// it does not depend on the batch size, nor on the number of threads.
#pragma once

#include <cstdint>

namespace nar {

struct LinearArgs {
  float* logits;  // [rows, vocabulary], a row every `stride`
  int64_t stride;
  const float* hidden;  // [rows, depth], a row every `hidden_stride`
  int64_t rows, depth, hidden_stride;
  const float* weight;  // [vocabulary, depth], a row every `weight_stride`
  int64_t vocabulary, weight_stride;
  const float* bias;  // [vocabulary], or null
};

// Rows are multiplied in panels of `panel_rows`; the last may be smaller.
struct LinearKernel {
  int panel_rows;
  // Packs the panel's hidden states, transposed.
  void (*pack)(const LinearArgs&, int64_t panel, float* packed);
  // Computes the panel's logits of the ids in [first, end).
  void (*multiply)(const LinearArgs&, int64_t panel, const float* packed, int64_t first,
                   int64_t end);
};

// Whether there is a kernel for this CPU: one that can fuse multiply-adds.
bool has_linear();

void linear_cpu(const LinearArgs& args, int num_threads);

}  // namespace nar
