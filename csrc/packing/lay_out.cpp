#include "packing/lay_out.h"

#include <algorithm>

namespace nar {

bool lay_out(const LayOutArgs& a, Extent* extent) {
  int64_t *begins = a.table, *stored = begins + a.count + 1;
  int64_t *lengths = stored + a.count + 1, *slots = lengths + a.count + 1;
  int64_t end = 0, rows_begun = 0;  // of the documents so far
  *extent = {0, 1, 0, false};
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t eos = a.eos_lengths ? a.eos_lengths[i] : 0;
    slots[i] = a.sample_ids ? a.sample_ids[i] : a.first_sample + i * a.sample_step;
    stored[i] = a.lengths[i];
    if (stored[i] < 0 || stored[i] >= kMostPositions) return false;
    if (eos < 0 || eos >= kMostPositions || slots[i] < 0) return false;
    lengths[i] = stored[i] + eos;
    begins[i] = a.places ? a.places[i] : a.row_length ? i * a.row_length : end;
    if (begins[i] < end) return false;
    if (a.row_length) {
      const int64_t row = begins[i] / a.row_length, column = begins[i] % a.row_length;
      rows_begun += column == 0 && row == rows_begun;
      if (row >= std::min(rows_begun, a.num_rows)) return false;
      if (column + lengths[i] > a.row_length) return false;
    }
    end = begins[i] + lengths[i];
    if (end >= kMostPositions) return false;
    if (i > 0) extent->longest = std::max(extent->longest, begins[i] - begins[i - 1]);
    extent->longest_stored = std::max(extent->longest_stored, stored[i]);
    extent->has_ends |= eos > 0;
  }
  if (a.row_length) {
    if (rows_begun != a.num_rows) return false;
    end = a.num_rows * a.row_length;
  }
  if (a.count) extent->longest = std::max(extent->longest, end - begins[a.count - 1]);
  extent->num_positions = begins[a.count] = end;
  stored[a.count] = lengths[a.count] = slots[a.count] = 0;
  return true;
}

}  // namespace nar
