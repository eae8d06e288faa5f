// Windows of a flat corpus of token ids of any integer type, and the record of bad ids.
#pragma once

#include <cstdint>

#include "rng/philox.h"
#include "runtime/blocks.h"

namespace nar {

// The order is that of TOKEN_DTYPES in nar_kernels/ops/tokens.py.
enum class TokenType { kUint8, kInt8, kUint16, kInt16, kUint32, kInt32, kInt64 };

inline int64_t size_of(TokenType type) {
  switch (type) {
    case TokenType::kUint8:
    case TokenType::kInt8: return 1;
    case TokenType::kUint16:
    case TokenType::kInt16: return 2;
    case TokenType::kUint32:
    case TokenType::kInt32: return 4;
    case TokenType::kInt64: break;
  }
  return 8;
}

// A corpus that lies in several places of host memory, such as the maps of many files. Run r has
// the tokens from begins[r] to begins[r + 1]; it may be empty, and need not be aligned.
struct Runs {
  int64_t count;             // 0: the corpus lies in one place
  const int64_t* begins;     // [count + 1]
  const int64_t* addresses;  // [count]
};

// The run that holds a token, and where the token is in it.
int64_t run_of(const Runs& runs, int64_t token);
const char* address_in(const Runs& runs, int64_t run, int64_t token, int64_t itemsize);

// A byte for each token of the corpus.
struct Flags {
  const void* flat;  // [num_corpus_tokens], if there are no runs
  Runs runs;
};

// A sample: where it begins in the outputs; how many of its ids are in the corpus; of how many
// positions it is, the others being ends of sequence; and those with the padding behind them.
struct Span {
  int64_t begin, stored, length, space;
};

// Samples of different lengths.
struct Spans {
  const int64_t* begins;   // [batch + 1], or null: seq_len ids each, one after the other
  const int64_t* stored;   // [batch]
  const int64_t* lengths;  // [batch]
  int64_t eos_id, pad_id;
};

struct Windows {
  const void* tokens;  // [num_corpus_tokens], if there are no runs
  Runs runs;
  TokenType token_type;
  int64_t num_corpus_tokens;
  const int64_t* starts;   // [batch], or null: one window after the other
  int64_t batch, seq_len;  // of the longest, with spans
  Spans spans;
  int64_t num_tokens;  // valid ids are [0, num_tokens), below 2**31, without mask_id
  int64_t mask_id;

  NAR_HOST_DEVICE int64_t start(int64_t b) const { return starts ? starts[b] : b * seq_len; }
  NAR_HOST_DEVICE Span span(int64_t b) const {
    if (!spans.begins) return {b * seq_len, seq_len, seq_len, seq_len};
    const int64_t begin = spans.begins[b];
    return {begin, spans.stored[b], spans.lengths[b], spans.begins[b + 1] - begin};
  }
  NAR_HOST_DEVICE int64_t num_positions() const {
    return spans.begins ? spans.begins[batch] : batch * seq_len;
  }
  NAR_HOST_DEVICE int64_t safe_id() const {
    return mask_id == 0 ? 1 : 0;
  }  // takes the place of a bad one
};

// Bad ids: how many, and the one at the lowest corpus offset.
struct InvalidTokens {
  int64_t count = 0;
  int64_t offset = INT64_MAX;
  int64_t token = 0;

  void merge(const InvalidTokens& other) {
    count += other.count;
    if (other.offset < offset) offset = other.offset, token = other.token;
  }
};

// As {count, offset, token}, all 0 where there are none.
void write_record(const InvalidTokens& found, int64_t* record);

// Throws std::out_of_range for a window outside the corpus.
void check_windows(const Windows& windows);

// Where the tokens of window b are, aligned. Gathered in scratch [seq_len] if they are not so.
const void* locate_window(const Windows& windows, int64_t b, void* scratch);

// The same for flags.
const uint8_t* locate_flags(const Windows& windows, const Flags& flags, int64_t b, void* scratch);

// The windows as int64 [batch, seq_len], bad ids replaced.
InvalidTokens copy_windows(const Windows& windows, int64_t* out);

// The windows as they are, of the corpus's type, where their spans begin: [batch, seq_len] without.
void gather_windows(const Windows& windows, void* out, int num_threads);

// Asks the system to read the pages of the windows from their files, in the order of addresses.
void read_ahead(const Windows& windows);

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// Calls visit with tokens as a pointer of their type.
template <typename Visit>
NAR_HOST_DEVICE void visit_tokens(const void* tokens, TokenType type, const Visit& visit) {
  switch (type) {
    case TokenType::kUint8: return visit(static_cast<const uint8_t*>(tokens));
    case TokenType::kInt8: return visit(static_cast<const int8_t*>(tokens));
    case TokenType::kUint16: return visit(static_cast<const uint16_t*>(tokens));
    case TokenType::kInt16: return visit(static_cast<const int16_t*>(tokens));
    case TokenType::kUint32: return visit(static_cast<const uint32_t*>(tokens));
    case TokenType::kInt32: return visit(static_cast<const int32_t*>(tokens));
    case TokenType::kInt64: return visit(static_cast<const int64_t*>(tokens));
  }
}

// Negative ids wrap to large ones. Narrow types are compared in 32 bits: more lanes.
template <typename Token>
NAR_HOST_DEVICE inline bool outside_vocabulary(Token id, uint32_t num_tokens) {
  if constexpr (sizeof(Token) == 8) {
    return static_cast<uint64_t>(id) >= num_tokens;
  } else {
    return static_cast<uint32_t>(id) >= num_tokens;
  }
}

// Ids as Id (int32 or int64). Returns whether one was bad.
template <typename Id, typename Token>
inline uint32_t load_ids(const Windows& w, int64_t length, const Token* __restrict window,
                         Id* __restrict clean) {
  const Id mask_id = static_cast<Id>(w.mask_id);
  const uint32_t num_tokens = static_cast<uint32_t>(w.num_tokens);
  uint32_t any_bad = 0;
  for (int64_t i = 0; i < length; ++i) {
    const Id id = static_cast<Id>(window[i]);
    any_bad |= outside_vocabulary(window[i], num_tokens) | (id == mask_id);
    clean[i] = id;
  }
  return any_bad;
}

template <typename Id, typename Token>
bool load_window(const Windows& w, int64_t length, const Token* window, Id* clean) {
  uint32_t any_bad = 0;
  in_blocks<64>(length, [&](int64_t first, int64_t count) {
    any_bad |= load_ids(w, count, window + first, clean + first);
  });
  return any_bad != 0;
}

// Rare: replaces the bad ids of row b, and reports them.
template <typename Id, typename Token>
InvalidTokens replace_invalid(const Windows& w, int64_t b, const Token* window, Id* clean) {
  InvalidTokens found;
  const int64_t length = w.span(b).stored;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t id = static_cast<int64_t>(window[i]);
    if (id >= 0 && id < w.num_tokens && id != w.mask_id) continue;
    clean[i] = static_cast<Id>(w.safe_id());
    found.merge({1, w.start(b) + i, id});
  }
  return found;
}

// Scratch: as of locate_window.
template <typename Id>
void load_row(const Windows& w, int64_t b, Id* clean, void* scratch, InvalidTokens* invalid) {
  visit_tokens(locate_window(w, b, scratch), w.token_type, [&](const auto* window) {
    if (load_window(w, w.span(b).stored, window, clean)) {
      invalid->merge(replace_invalid(w, b, window, clean));
    }
  });
}

}  // namespace
}  // namespace nar
