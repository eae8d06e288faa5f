// `choose` on the CPU: threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "choose/choose.h"
#include "levels/kernels.h"
#include "runtime/parallel_for.h"

namespace nar {
namespace {

// Minimum work per chunk, some 10 microseconds.
constexpr int64_t kCandidatesPerChunk = 2048;

template <typename T>
std::unique_ptr<T[]> uninitialized(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// Of one thread.
struct Memory {
  explicit Memory(int64_t size)
      : positions(uninitialized<int64_t>(size)),
        scores(uninitialized<float>(size)),
        words(uninitialized<uint32_t>(size)),
        keys(uninitialized<uint32_t>(size)),
        upper(uninitialized<int16_t>(size)) {}

  ChooseScratch scratch() const {
    return {positions.get(), scores.get(), words.get(), keys.get(), upper.get()};
  }

  std::unique_ptr<int64_t[]> positions;
  std::unique_ptr<float[]> scores;
  std::unique_ptr<uint32_t[]> words, keys;
  std::unique_ptr<int16_t[]> upper;
};

}  // namespace

void choose_cpu(const ChooseArgs& a, int num_threads) {
  const ChooseRow row = kernels().choose_row;
  const int64_t candidates = a.bounds[a.sequences];
  if (candidates == 0) return;
  const int64_t per_sequence = (candidates + a.sequences - 1) / a.sequences;
  const int64_t chunk = (kCandidatesPerChunk + per_sequence - 1) / per_sequence;
  const int64_t num_chunks = (a.sequences + chunk - 1) / chunk;
  num_threads = static_cast<int>(std::clamp<int64_t>(num_threads, 1, num_chunks));
  std::vector<Memory> memory;
  for (int i = 0; i < num_threads; ++i) memory.emplace_back(a.length + kChoosePadding);
  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    const ChooseScratch scratch = memory[worker].scratch();
    const int64_t end = std::min((c + 1) * chunk, a.sequences);
    for (int64_t b = c * chunk; b < end; ++b) row(a, b, scratch);
  });
}

}  // namespace nar
