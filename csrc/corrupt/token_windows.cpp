#include "corrupt/token_windows.h"

#include <stdexcept>
#include <string>

namespace nar {

void write_record(const InvalidTokens& found, int64_t* record) {
  record[0] = found.count;
  record[1] = found.count ? found.offset : 0;
  record[2] = found.count ? found.token : 0;
}

void check_windows(const Windows& w) {
  for (int64_t b = 0; b < w.batch; ++b) {
    if (w.start(b) < 0 || w.start(b) > w.num_corpus_tokens - w.seq_len) {
      throw std::out_of_range("window start " + std::to_string(w.start(b)) + " with seq_len " +
                              std::to_string(w.seq_len) + " reaches outside the corpus of " +
                              std::to_string(w.num_corpus_tokens) + " tokens");
    }
  }
}

InvalidTokens copy_windows(const Windows& w, int64_t* out) {
  check_windows(w);
  InvalidTokens invalid;
  for (int64_t b = 0; b < w.batch; ++b) load_row(w, b, out + b * w.seq_len, &invalid);
  return invalid;
}

}  // namespace nar
