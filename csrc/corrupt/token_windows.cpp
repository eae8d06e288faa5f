#include "corrupt/token_windows.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/parallel_for.h"

namespace nar {

int64_t run_of(const Runs& runs, int64_t token) {
  return std::upper_bound(runs.begins, runs.begins + runs.count + 1, token) - runs.begins - 1;
}

const char* address_in(const Runs& runs, int64_t run, int64_t token, int64_t itemsize) {
  return reinterpret_cast<const char*>(static_cast<uintptr_t>(runs.addresses[run])) +
         (token - runs.begins[run]) * itemsize;
}

namespace {

// What there is of each token of a corpus: its id, or a flag.
struct Items {
  const Runs& runs;
  const void* flat;  // without runs
  int64_t itemsize;
};

Items tokens_of(const Windows& w) { return {w.runs, w.tokens, size_of(w.token_type)}; }

// Calls visit(address, count) with each part of a window, from first to last.
template <typename Visit>
void visit_parts(const Items& items, int64_t start, int64_t length, const Visit& visit) {
  const Runs& runs = items.runs;
  if (!runs.count) {
    return visit(static_cast<const char*>(items.flat) + start * items.itemsize, length);
  }
  int64_t run = run_of(runs, start);
  for (const int64_t end = start + length; start < end; ++run) {
    const int64_t stop = std::min(runs.begins[run + 1], end);
    visit(address_in(runs, run, start, items.itemsize), stop - start);
    start = stop;
  }
}

void copy_window(const Items& items, int64_t start, int64_t length, void* out) {
  char* to = static_cast<char*>(out);
  visit_parts(items, start, length, [&](const char* from, int64_t count) {
    std::memcpy(to, from, count * items.itemsize);
    to += count * items.itemsize;
  });
}

const void* locate(const Items& items, int64_t start, int64_t length, void* scratch) {
  const Runs& runs = items.runs;
  if (!runs.count) return static_cast<const char*>(items.flat) + start * items.itemsize;
  const int64_t run = run_of(runs, start);
  if (run < runs.count && start + length <= runs.begins[run + 1]) {
    const char* window = address_in(runs, run, start, items.itemsize);
    if (reinterpret_cast<uintptr_t>(window) % items.itemsize == 0) return window;
  }
  copy_window(items, start, length, scratch);
  return scratch;
}

}  // namespace

void write_record(const InvalidTokens& found, int64_t* record) {
  record[0] = found.count;
  record[1] = found.count ? found.offset : 0;
  record[2] = found.count ? found.token : 0;
}

void check_windows(const Windows& w) {
  for (int64_t b = 0; b < w.batch; ++b) {
    const int64_t length = w.span(b).stored;
    if (w.start(b) < 0 || w.start(b) > w.num_corpus_tokens - length) {
      throw std::out_of_range("window start " + std::to_string(w.start(b)) + " with " +
                              (w.spans.begins ? "length " : "seq_len ") + std::to_string(length) +
                              " reaches outside the corpus of " +
                              std::to_string(w.num_corpus_tokens) + " tokens");
    }
  }
}

const void* locate_window(const Windows& w, int64_t b, void* scratch) {
  return locate(tokens_of(w), w.start(b), w.span(b).stored, scratch);
}

const uint8_t* locate_flags(const Windows& w, const Flags& flags, int64_t b, void* scratch) {
  const Items items = {flags.runs, flags.flat, 1};
  return static_cast<const uint8_t*>(locate(items, w.start(b), w.span(b).stored, scratch));
}

InvalidTokens copy_windows(const Windows& w, int64_t* out) {
  check_windows(w);
  const std::unique_ptr<int64_t[]> scratch(new int64_t[w.runs.count ? w.seq_len : 0]);
  InvalidTokens invalid;
  for (int64_t b = 0; b < w.batch; ++b) {
    load_row(w, b, out + b * w.seq_len, scratch.get(), &invalid);
  }
  return invalid;
}

void gather_windows(const Windows& w, void* out, int num_threads) {
  check_windows(w);
  constexpr int64_t kBytesPerChunk = 1 << 15;
  const Items tokens = tokens_of(w);
  const int64_t bytes = std::max<int64_t>(w.num_positions() * tokens.itemsize, 1);
  const int64_t chunk = std::max<int64_t>(kBytesPerChunk * w.batch / bytes, 1);
  parallel_for((w.batch + chunk - 1) / chunk, num_threads, [&](int64_t c, int) {
    for (int64_t b = c * chunk; b < std::min((c + 1) * chunk, w.batch); ++b) {
      const Span span = w.span(b);
      char* to = static_cast<char*>(out) + span.begin * tokens.itemsize;
      copy_window(tokens, w.start(b), span.stored, to);
    }
  });
}

void read_ahead(const Windows& w) {
#if defined(__unix__) || defined(__APPLE__)
  check_windows(w);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // of pages, from first to last
  for (int64_t b = 0; b < w.batch; ++b) {
    const Items tokens = tokens_of(w);
    visit_parts(tokens, w.start(b), w.seq_len, [&](const char* from, int64_t length) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
      const uintptr_t end = begin + length * tokens.itemsize;
      ranges.emplace_back(begin / page * page, (end + page - 1) / page * page);
    });
  }
  std::sort(ranges.begin(), ranges.end());
  // A hint: what the system makes of it does not matter here.
  for (const auto& [begin, end] : ranges) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
  }
#endif
}

}  // namespace nar
