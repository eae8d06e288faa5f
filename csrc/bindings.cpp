// The Python module nar_kernels._cpp: raw addresses in, kernels below, no torch. Callers have
// checked dtypes, devices, shapes and contiguity (nar_kernels/ops/).
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "choose/choose.h"
#include "corrupt/corrupt_cpu.h"
#include "linear/linear.h"
#include "mask_tokens/mask_tokens.h"
#include "nll/nll.h"
#include "packing/lay_out.h"
#include "packing/pack.h"
#include "rng/permutation_cpu.h"
#include "runtime/cpu_features.h"
#include "scan/scan.h"
#include "select/key_bounds.h"
#include "unmask/unmask.h"

namespace py = pybind11;
using nar::pointer;

namespace {

// A table of runs at an address, or none.
nar::Runs runs_of(int64_t runs, int64_t num_runs) {
  if (!num_runs) return {};
  const int64_t* begins = pointer<const int64_t>(runs);
  return {num_runs, begins, begins + num_runs + 1};
}

// A table of spans at an address, or none.
nar::Spans spans_of(int64_t spans, int64_t batch) {
  if (!spans) return {};
  const int64_t* begins = pointer<const int64_t>(spans);
  return {begins, begins + batch + 1, begins + 2 * (batch + 1), 0, 0};
}

nar::Windows windows_of(int64_t tokens, int token_type, int64_t num_corpus_tokens, int64_t runs,
                        int64_t num_runs, int64_t starts, int64_t batch, int64_t seq_len) {
  nar::Windows w = {};
  w.tokens = pointer<const void>(tokens);
  w.token_type = static_cast<nar::TokenType>(token_type);
  w.runs = runs_of(runs, num_runs);
  w.num_corpus_tokens = num_runs ? w.runs.begins[num_runs] : num_corpus_tokens;
  w.starts = pointer<const int64_t>(starts);
  w.batch = batch, w.seq_len = seq_len;
  return w;
}

void windows(int64_t tokens, int token_type, int64_t num_corpus_tokens, int64_t runs,
             int64_t num_runs, int64_t starts, int64_t batch, int64_t seq_len, int64_t num_tokens,
             int64_t mask_id, int64_t out, int64_t record) {
  nar::Windows w =
      windows_of(tokens, token_type, num_corpus_tokens, runs, num_runs, starts, batch, seq_len);
  w.num_tokens = num_tokens, w.mask_id = mask_id;
  nar::write_record(nar::copy_windows(w, pointer<int64_t>(out)), pointer<int64_t>(record));
}

void gather(int64_t tokens, int token_type, int64_t num_corpus_tokens, int64_t runs,
            int64_t num_runs, int64_t starts, int64_t batch, int64_t seq_len, int64_t spans,
            int64_t out, int num_threads) {
  nar::Windows w =
      windows_of(tokens, token_type, num_corpus_tokens, runs, num_runs, starts, batch, seq_len);
  w.spans = spans_of(spans, batch);
  nar::gather_windows(w, pointer<void>(out), num_threads);
}

// Returns {least, greatest, outside, masked, uncounted, places found}.
std::array<int64_t, 6> scan(int64_t tokens, int token_type, int64_t runs, int64_t num_runs,
                            int64_t start, int64_t stop, int64_t phase, int64_t stride,
                            int64_t seq_len, int64_t highest, int64_t mask_id, int64_t num_bins,
                            int64_t counts, int64_t max_places, int64_t places, int num_threads) {
  nar::ScanArgs a = {};
  a.tokens = pointer<const void>(tokens);
  a.runs = runs_of(runs, num_runs);
  a.token_type = static_cast<nar::TokenType>(token_type);
  a.start = start, a.stop = stop;
  a.phase = phase, a.stride = stride, a.seq_len = seq_len;
  a.highest = highest, a.mask_id = mask_id;
  a.num_bins = num_bins, a.counts = pointer<int64_t>(counts);
  a.max_places = max_places, a.places = pointer<int64_t>(places);
  const nar::Scanned s = nar::scan_cpu(a, num_threads);
  return {s.least, s.greatest, s.outside, s.masked, s.uncounted, s.num_places};
}

void permute(int64_t index, int64_t count, int64_t n, int64_t seed, int stream, int64_t round,
             int64_t out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = pointer<const int64_t>(index)[i];
    if (from < 0 || from >= n) {
      throw std::out_of_range("index " + std::to_string(from) +
                              " is outside the permutation of [0, " + std::to_string(n) + ")");
    }
    pointer<int64_t>(out)[i] = from;
  }
  const nar::Permutation permutation(static_cast<uint64_t>(seed), stream,
                                     static_cast<uint64_t>(round), n);
  permutation.apply(pointer<int64_t>(out), count);
}

int64_t pack(int64_t lengths, int64_t count, int64_t capacity, bool in_order, int64_t rows,
             int64_t offsets) {
  nar::PackArgs a = {};
  a.lengths = pointer<const int64_t>(lengths);
  a.count = count, a.capacity = capacity;
  a.method = in_order ? nar::PackMethod::kInOrder : nar::PackMethod::kFirstFitDecreasing;
  a.rows = pointer<int64_t>(rows), a.offsets = pointer<int64_t>(offsets);
  return nar::pack(a);
}

// Returns the fields of Extent, or None for arguments that are not right.
std::optional<std::tuple<int64_t, int64_t, int64_t, bool>> lay_out(
    int64_t lengths, int64_t eos_lengths, int64_t places, int64_t sample_ids, int64_t first_sample,
    int64_t sample_step, int64_t count, int64_t row_length, int64_t num_rows, int64_t table) {
  nar::LayOutArgs a = {};
  a.lengths = pointer<const int64_t>(lengths);
  a.eos_lengths = pointer<const int64_t>(eos_lengths);
  a.places = pointer<const int64_t>(places);
  a.sample_ids = pointer<const int64_t>(sample_ids);
  a.first_sample = first_sample, a.sample_step = sample_step;
  a.count = count, a.row_length = row_length, a.num_rows = num_rows;
  a.table = pointer<int64_t>(table);
  nar::Extent e;
  if (!nar::lay_out(a, &e)) return std::nullopt;
  return std::make_tuple(e.num_positions, e.longest, e.longest_stored, e.has_ends);
}

void read_ahead(int64_t tokens, int token_type, int64_t num_corpus_tokens, int64_t runs,
                int64_t num_runs, int64_t starts, int64_t batch, int64_t seq_len) {
  nar::read_ahead(
      windows_of(tokens, token_type, num_corpus_tokens, runs, num_runs, starts, batch, seq_len));
}

// A tensor without memory, such as one on the device "meta", is never written to.
void check_memory(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (!address) throw std::invalid_argument("a tensor has no memory");
  }
}

void run_corrupt(const nar::CorruptArgs& args, int num_threads) {
  check_memory({args.ratio_table, args.weight_table, args.invalid});
  if (args.windows.batch > 0) {
    check_memory({args.times, args.loss_weight, args.num_masked, args.num_maskable});
    if (args.windows.num_positions()) check_memory({args.input_ids});
    const bool has_tokens = args.windows.num_corpus_tokens > 0;
    if (has_tokens && !args.windows.runs.count) check_memory({args.windows.tokens});
  }
  const py::gil_scoped_release release;
  nar::corrupt_cpu(args, num_threads);
}

void corrupt(const py::tuple& arguments, const py::tuple& outputs, int token_type,
             int64_t num_corpus_tokens, int num_threads) {
  run_corrupt(nar::unpack_corrupt(arguments, token_type, num_corpus_tokens).with(outputs),
              num_threads);
}

// `corrupt` of step after step: arguments that stay the same are unpacked once.
class CorruptPlan {
 public:
  CorruptPlan(const py::tuple& arguments, int token_type, int64_t num_corpus_tokens)
      : inputs_(nar::unpack_corrupt(arguments, token_type, num_corpus_tokens)) {}

  void operator()(int64_t first_sample, int64_t starts, const py::tuple& outputs,
                  int num_threads) const {
    nar::CorruptArgs args = inputs_.with(outputs);
    args.first_sample = first_sample;
    args.windows.starts = pointer<const int64_t>(starts);
    run_corrupt(args, num_threads);
  }

 private:
  nar::CorruptInputs inputs_;
};

void count_masked(int64_t batch, int64_t seq_len, int64_t block_length, int64_t num_blocks,
                  int64_t blocks_per_slot, int64_t views, int64_t first_view, int pairing,
                  int64_t spans, int64_t sample_ids, int64_t first_sample, int64_t global_batch,
                  bool exact, bool stratified, int64_t seed, int64_t ratio_table, int64_t counts,
                  int num_threads) {
  nar::CorruptArgs args = {};
  args.windows.batch = batch, args.windows.seq_len = seq_len;
  args.windows.spans = spans_of(spans, batch);
  args.division = {block_length, num_blocks, blocks_per_slot,
                   views,        first_view, static_cast<nar::Pairing>(pairing)};
  args.sample_ids = pointer<const int64_t>(sample_ids), args.first_sample = first_sample;
  args.global_batch = global_batch;
  args.exact = exact, args.stratified = stratified;
  args.seed = static_cast<uint64_t>(seed);
  args.ratio_table = pointer<const uint32_t>(ratio_table);
  nar::count_masked(args, pointer<int64_t>(counts), num_threads);
}

// From NllArgs of nar_kernels/ops/arguments.py, and the tensor of losses.
nar::NllArgs unpack_nll(const py::tuple& arguments, const py::tuple& outputs, int logit_type) {
  nar::NllArgs a;
  nar::Unpacker next(arguments, 5);
  const nar::Matrix<void> logits = next.matrix<void>();
  a.logits = logits.data;
  a.logit_type = static_cast<nar::LogitType>(logit_type);
  a.rows = logits.rows, a.vocabulary = logits.columns, a.stride = logits.stride;
  a.labels = next.address<const int64_t>();
  a.bias = next.address<const float>();
  a.weight = next.address<const float>();
  a.gradient = next.as<bool>();

  nar::Unpacker next_output(outputs, 1);
  a.nll = next_output.address<float>();
  return a;
}

void nll(const py::tuple& arguments, const py::tuple& outputs, int logit_type, int num_threads) {
  const nar::NllArgs args = unpack_nll(arguments, outputs, logit_type);
  const py::gil_scoped_release release;
  nar::nll_cpu(args, num_threads);
}

void unmask(const py::tuple& arguments, const py::tuple& outputs, int logit_type, int num_threads) {
  std::vector<int64_t> forbidden;
  nar::UnmaskArgs args = nar::unpack_unmask(arguments, outputs, &forbidden);
  args.logit_type = static_cast<nar::LogitType>(logit_type);
  const py::gil_scoped_release release;
  nar::unmask_cpu(args, num_threads);
}

// From ChooseArgs of nar_kernels/ops/arguments.py, and its two tensors of rows.
nar::ChooseArgs unpack_choose(const py::tuple& arguments, const py::tuple& outputs,
                              int64_t sequences) {
  nar::ChooseArgs a;
  a.sequences = sequences;
  nar::Unpacker next(arguments, 13);
  a.score = next.address<const float>();
  a.by_position = next.as<bool>();
  a.lowest_first = next.as<bool>();
  a.noise_scale = next.as<float>();
  a.rows = next.address<const int64_t>();
  a.bounds = next.address<const int64_t>();
  a.left_bounds = next.address<const int64_t>();
  next.integer();  // the number that are left
  a.length = next.integer();
  a.seed = static_cast<uint64_t>(next.integer());
  a.first_slot = static_cast<uint64_t>(next.integer());
  a.slot_stride = static_cast<uint64_t>(next.integer());
  a.slots = next.address<const int64_t>();

  nar::Unpacker next_output(outputs, 2);
  a.kept = next_output.address<int64_t>();
  a.left = next_output.address<int64_t>();
  return a;
}

void choose(const py::tuple& arguments, const py::tuple& outputs, int64_t sequences,
            int num_threads) {
  const nar::ChooseArgs args = unpack_choose(arguments, outputs, sequences);
  const py::gil_scoped_release release;
  nar::choose_cpu(args, num_threads);
}

// From MaskTokensArgs of nar_kernels/ops/arguments.py, the ids and the mask.
nar::MaskTokensArgs unpack_mask_tokens(const py::tuple& arguments, const py::tuple& outputs,
                                       bool narrow) {
  nar::MaskTokensArgs a;
  nar::Unpacker next(arguments, 6);
  const nar::Matrix<const void> tokens = next.matrix<const void>();
  a.tokens = tokens.data, a.batch = tokens.rows, a.length = tokens.columns;
  a.narrow = narrow;
  a.mask_id = next.integer();
  const nar::Matrix<const int64_t> bounds = next.matrix<const int64_t>();
  a.bounds = bounds.data, a.row_stride = bounds.stride, a.stride = bounds.columns > 1;
  a.sample_ids = next.address<const int64_t>();
  a.seed = static_cast<uint64_t>(next.integer());
  a.stream = static_cast<uint32_t>(next.integer());

  nar::Unpacker next_output(outputs, 2);
  a.ids = next_output.address<void>();
  a.mask = next_output.address<uint8_t>();
  return a;
}

void mask_tokens(const py::tuple& arguments, const py::tuple& outputs, bool narrow,
                 int num_threads) {
  const nar::MaskTokensArgs args = unpack_mask_tokens(arguments, outputs, narrow);
  const py::gil_scoped_release release;
  nar::mask_tokens_cpu(args, num_threads);
}

// From LinearArgs of nar_kernels/ops/arguments.py.
nar::LinearArgs unpack_linear(const py::tuple& arguments) {
  nar::LinearArgs a;
  nar::Unpacker next(arguments, 4);
  const nar::Matrix<float> logits = next.matrix<float>();
  a.logits = logits.data, a.stride = logits.stride;
  const nar::Matrix<const float> hidden = next.matrix<const float>();
  a.hidden = hidden.data, a.hidden_stride = hidden.stride;
  a.rows = hidden.rows, a.depth = hidden.columns;
  const nar::Matrix<const float> weight = next.matrix<const float>();
  a.weight = weight.data, a.weight_stride = weight.stride;
  a.vocabulary = weight.rows;
  a.bias = next.address<const float>();
  return a;
}

void linear(const py::tuple& arguments, int num_threads) {
  const nar::LinearArgs args = unpack_linear(arguments);
  const py::gil_scoped_release release;
  nar::linear_cpu(args, num_threads);
}

// For tests: the selection on keys of their choice, three ranks at a time.
std::vector<uint64_t> key_bounds(int64_t keys, int64_t can_take, int64_t length, int32_t num_keys,
                                 const std::vector<int32_t>& ranks) {
  if (ranks.size() != nar::kNumRanks) throw std::invalid_argument("three ranks are needed");
  std::vector<uint64_t> bounds(nar::kNumRanks);
  std::vector<int16_t> upper(length + nar::kUpperPadding);
  nar::key_bounds(pointer<const uint32_t>(keys), pointer<const uint8_t>(can_take), length, num_keys,
                  ranks.data(), upper.data(), bounds.data());
  return bounds;
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.def("corrupt", &corrupt);
  py::class_<CorruptPlan>(m, "CorruptPlan")
      .def(py::init<const py::tuple&, int, int64_t>())
      .def("__call__", &CorruptPlan::operator());
  m.def("count_masked", &count_masked);
  m.def("nll", &nll);
  m.def("unmask", &unmask);
  m.def("choose", &choose);
  m.def("mask_tokens", &mask_tokens);
  m.def("linear", &linear);
  m.def("has_linear", &nar::has_linear);
  m.def("windows", &windows, release_gil());
  m.def("gather", &gather, release_gil());
  m.def("read_ahead", &read_ahead, release_gil());
  m.def("permute", &permute, release_gil());
  m.def("pack", &pack, release_gil());
  m.def("lay_out", &lay_out);
  m.def("scan", &scan, release_gil());
  m.def("limit_simd", [](int level) { nar::limit_simd(static_cast<nar::SimdLevel>(level)); });
  m.def("simd_level", [] { return static_cast<int>(nar::simd_level()); });
  m.def("key_bounds", &key_bounds);
}
