#include "packing/pack.h"

#include <algorithm>
#include <vector>

namespace nar {
namespace {

// How much room each row has; a tree of maxima finds the first row with enough.
class Rooms {
 public:
  // All rows are there from the beginning, empty: the first with room may be a new one.
  Rooms(int64_t most_rows, int32_t capacity) {
    while (leaves_ < most_rows) leaves_ *= 2;
    most_.assign(2 * leaves_, capacity);
  }

  // The lowest row with this much room, which some row has.
  int64_t first_with(int32_t length) const {
    int64_t node = 1;
    while (node < leaves_) node = 2 * node + (most_[2 * node] < length);
    return node - leaves_;
  }

  // Returns the room that was there before.
  int32_t take(int64_t row, int32_t length) {
    int64_t node = leaves_ + row;
    const int32_t before = most_[node];
    most_[node] -= length;
    while (node > 1) {
      node /= 2;
      const int32_t most = std::max(most_[2 * node], most_[2 * node + 1]);
      if (most == most_[node]) break;
      most_[node] = most;
    }
    return before;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<int32_t>
      most_;  // node i has the children 2 i and 2 i + 1; the last half are the rows
};

// At most one row of first fit is at most half full: what it holds would be in another such.
int64_t most_rows(const PackArgs& a) {
  uint64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += static_cast<uint64_t>(a.lengths[i]);
  const uint64_t rows = 2 * total / static_cast<uint64_t>(a.capacity) + 1;
  return static_cast<int64_t>(std::min<uint64_t>(rows, static_cast<uint64_t>(a.count)));
}

int64_t first_fit_decreasing(const PackArgs& a) {
  // Of a document, what is missing to the capacity and its index, as one number to sort by.
  std::vector<uint64_t> order(a.count);
  for (int64_t i = 0; i < a.count; ++i) {
    order[i] = static_cast<uint64_t>(a.capacity - a.lengths[i]) << 32 | static_cast<uint64_t>(i);
  }
  std::sort(order.begin(), order.end());
  const int32_t capacity = static_cast<int32_t>(a.capacity);
  Rooms rooms(most_rows(a), capacity);
  int64_t num_rows = 0;
  for (const uint64_t key : order) {
    const int64_t document = static_cast<int64_t>(key & 0xFFFFFFFFu);
    const int32_t length = static_cast<int32_t>(a.lengths[document]);
    const int64_t row = rooms.first_with(length);
    a.rows[document] = row;
    a.offsets[document] = capacity - rooms.take(row, length);
    num_rows = std::max(num_rows, row + 1);
  }
  return num_rows;
}

int64_t in_order(const PackArgs& a) {
  int64_t row = -1, used = a.capacity;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.lengths[i] > a.capacity - used) ++row, used = 0;
    a.rows[i] = row;
    a.offsets[i] = used;
    used += a.lengths[i];
  }
  return row + 1;
}

}  // namespace

int64_t pack(const PackArgs& args) {
  return args.method == PackMethod::kInOrder ? in_order(args) : first_fit_decreasing(args);
}

}  // namespace nar
