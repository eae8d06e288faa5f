// What the Python modules share: how arguments arrive. Callers have checked dtypes, devices, shapes
// and contiguity (nar_kernels/ops/).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "corrupt/corrupt.h"
#include "unmask/unmask.h"

namespace nar {

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// A tensor of two dimensions whose rows are contiguous.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;  // a row every `stride`
};

// Reads a tuple of Python, item after item. Of torch.Tensor it uses data_ptr, shape and stride.
class Unpacker {
 public:
  Unpacker(const pybind11::tuple& items, size_t count) : items_(items) {
    if (items.size() != count) {
      throw std::invalid_argument("there are " + std::to_string(items.size()) +
                                  " arguments, but this build takes " + std::to_string(count));
    }
  }

  void skip() { next(); }

  int64_t integer() { return as_integer(next()); }

  // Of a tensor, or null for None.
  template <typename T>
  T* address() {
    const pybind11::handle item = next();
    return item.is_none() ? nullptr : address_of<T>(item);
  }

  template <typename T>
  Matrix<T> matrix() {
    const pybind11::handle item = next();
    const pybind11::tuple shape = item.attr("shape");
    return {address_of<T>(item), as_integer(shape[0]), as_integer(shape[1]),
            as_integer(item.attr("stride")(0))};
  }

  // Of a tensor [2, count + 1], or none for None.
  Runs runs() {
    const Matrix<const int64_t> table = optional_matrix<const int64_t>();
    if (!table.data) return {};
    return {table.columns - 1, table.data, table.data + table.stride};
  }

  // Of a tensor [3, batch + 1], or none for None.
  Spans spans() {
    const Matrix<const int64_t> table = optional_matrix<const int64_t>();
    if (!table.data) return {};
    return {table.data, table.data + table.stride, table.data + 2 * table.stride, 0, 0};
  }

  template <typename T>
  T as() {
    return next().cast<T>();
  }

 private:
  template <typename T>
  Matrix<T> optional_matrix() {
    const pybind11::handle item = PyTuple_GET_ITEM(items_.ptr(), index_);
    if (item.is_none()) return ++index_, Matrix<T>{};
    return matrix<T>();
  }

  template <typename T>
  static T* address_of(pybind11::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* result = PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr);
    if (!result) throw pybind11::error_already_set();
    return pointer<T>(as_integer(pybind11::reinterpret_steal<pybind11::object>(result)));
  }

  pybind11::handle next() { return PyTuple_GET_ITEM(items_.ptr(), index_++); }

  static int64_t as_integer(pybind11::handle item) {
    const int64_t value = PyLong_AsLongLong(item.ptr());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  const pybind11::tuple& items_;
  Py_ssize_t index_ = 0;
};

// The tensors of Corrupted; those that are not wanted become null.
inline void unpack_outputs(const pybind11::tuple& outputs, bool labels, bool masked_indices,
                           bool masked_rows, CorruptArgs* a) {
  Unpacker next(outputs, 9);
  a->input_ids = next.address<void>();
  a->labels = next.address<void>();
  a->masked_indices = next.address<uint8_t>();
  a->times = next.address<float>();
  a->loss_weight = next.address<float>();
  a->num_masked = next.address<int64_t>();
  a->num_maskable = next.address<int64_t>();
  a->row_buffer = next.address<void>();
  a->invalid = next.address<int64_t>();
  if (!labels) a->labels = nullptr;
  if (!masked_indices) a->masked_indices = nullptr;
  if (!masked_rows) a->row_buffer = nullptr;
}

// CorruptArgs of nar_kernels/ops/arguments.py: inputs, and which outputs are wanted.
struct CorruptInputs {
  CorruptArgs args;
  bool labels, masked_indices, masked_rows;

  CorruptArgs with(const pybind11::tuple& outputs) const {
    CorruptArgs a = args;
    unpack_outputs(outputs, labels, masked_indices, masked_rows, &a);
    return a;
  }
};

inline CorruptInputs unpack_corrupt(const pybind11::tuple& arguments, int token_type,
                                    int64_t num_corpus_tokens) {
  CorruptInputs inputs = {};
  CorruptArgs& a = inputs.args;
  Unpacker next(arguments, 50);
  a.windows.tokens = next.address<const void>();
  a.windows.runs = next.runs();
  a.windows.token_type = static_cast<TokenType>(token_type);
  const Runs& runs = a.windows.runs;
  a.windows.num_corpus_tokens = runs.count ? runs.begins[runs.count] : num_corpus_tokens;
  a.windows.starts = next.address<const int64_t>();
  a.windows.batch = next.integer();
  a.windows.seq_len = next.integer();
  next.skip(), next.skip();  // shapes
  a.division.block_length = next.integer();
  a.division.num_blocks = next.integer();
  a.division.blocks_per_slot = next.integer();
  a.division.views = next.integer();
  a.division.first_view = next.integer();
  a.division.pairing = static_cast<Pairing>(next.integer());
  a.windows.spans = next.spans();
  a.windows.spans.eos_id = next.integer();
  a.windows.spans.pad_id = next.integer();
  a.windows.num_tokens = next.integer();
  a.windows.mask_id = next.integer();
  a.sample_ids = next.address<const int64_t>();
  a.first_sample = next.integer();
  a.step = next.address<const int64_t>();
  a.order.num_windows = next.integer();
  a.order.phase = next.integer();
  a.order.stride = next.integer();
  a.order.shuffle = next.integer() != 0;
  a.maskable = next.address<const void>();
  a.maskable_bytes = static_cast<int>(next.integer());
  a.loss_mask.flat = next.address<const void>();
  a.loss_mask.runs = next.runs();
  a.prompt_lengths = next.address<const int64_t>();
  a.ratio_table = next.address<const uint32_t>();
  a.weight_table = next.address<const float>();
  a.weights_by_view = next.integer() != 0;
  a.view_times = next.address<const int64_t>();
  a.never_mask = next.address<const uint8_t>();
  a.seed = static_cast<uint64_t>(next.integer());
  a.seed_tensor = next.address<const uint64_t>();
  a.global_batch = next.integer();
  a.exact = next.integer() != 0;
  a.weighs_counts = next.integer() != 0;
  a.stratified = next.integer() != 0;
  a.time_low = next.as<float>();
  a.time_span = next.as<float>();
  a.keep_share = static_cast<uint64_t>(next.integer());
  a.random_share = static_cast<uint64_t>(next.integer());
  a.coin_share = static_cast<uint64_t>(next.integer());
  a.narrow = next.integer() != 0;
  inputs.labels = next.integer() != 0;
  inputs.masked_indices = next.integer() != 0;
  inputs.masked_rows = next.integer() != 0;
  return inputs;
}

inline ConfidenceType confidence_type(const std::string& name) {
  if (name == "probability") return ConfidenceType::kProbability;
  if (name == "margin") return ConfidenceType::kMargin;
  if (name == "entropy") return ConfidenceType::kEntropy;
  throw std::invalid_argument("unknown confidence " + name);
}

// From UnmaskArgs of nar_kernels/ops/arguments.py, and the tensors of Unmasked. `forbidden` holds
// the ids.
inline UnmaskArgs unpack_unmask(const pybind11::tuple& arguments, const pybind11::tuple& outputs,
                                std::vector<int64_t>* forbidden) {
  UnmaskArgs a = {};
  Unpacker next(arguments, 10);
  const Matrix<const void> logits = next.matrix<const void>();
  a.logits = logits.data;
  a.rows = logits.rows, a.vocabulary = logits.columns, a.stride = logits.stride;
  a.noise_slots = next.address<const int64_t>();
  a.given = next.address<const int64_t>();
  *forbidden = next.as<std::vector<int64_t>>();
  a.forbidden = forbidden->data();
  a.num_forbidden = static_cast<int64_t>(forbidden->size());
  a.fallback = next.integer();
  a.seed = static_cast<uint64_t>(next.integer());
  a.top_k = next.integer();
  a.top_p = next.integer();
  a.inverse_temperature = next.as<float>();
  a.confidence_type = confidence_type(next.as<std::string>());

  Unpacker next_output(outputs, 3);
  a.tokens = next_output.address<int64_t>();
  a.log_prob = next_output.address<float>();
  a.confidence = next_output.address<float>();  // null if it is empty
  return a;
}

}  // namespace nar
