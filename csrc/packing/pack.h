// `pack`: which row of limited length each of a list of documents goes into.
#pragma once

#include <cstdint>

namespace nar {

enum class PackMethod {
  kFirstFitDecreasing,  // longest first, ties by lower index; each into the first row with room
  kInOrder,             // next fit: a document that does not fit begins a row
};

struct PackArgs {
  const int64_t* lengths;  // [count], in [1, capacity]
  int64_t count;           // below 2**32
  int64_t capacity;        // of a row, below 2**31
  PackMethod method;

  int64_t* rows;     // [count]: the row of each document
  int64_t* offsets;  // [count]: where in its row it begins
};

// Returns the number of rows.
int64_t pack(const PackArgs& args);

}  // namespace nar
