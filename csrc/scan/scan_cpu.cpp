// `scan` on the CPU: threads, and runs cut into blocks.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "levels/kernels.h"
#include "runtime/parallel_for.h"
#include "scan/scan.h"

namespace nar {
namespace {

// A block is read several times, and stays in the first cache with a good part of the counts.
constexpr int64_t kBlockBytes = 16 << 10;

// Large ones, one after the other: the kernel reads ahead of them.
constexpr int64_t kMostBytesPerChunk = 4 << 20, kLeastBytesPerChunk = 64 << 10;

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Zeros, whose pages cost nothing until they are used.
std::unique_ptr<uint32_t[], FreeMemory> zeros(int64_t count) {
  void* memory = std::calloc(count, sizeof(uint32_t));
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<uint32_t[], FreeMemory>(static_cast<uint32_t*>(memory));
}

// Calls visit(address, count, offset) for all that windows cover of [start, stop), piece by piece.
template <typename Visit>
void visit_pieces(const ScanArgs& a, int64_t start, int64_t stop, const Visit& visit) {
  const int64_t itemsize = size_of(a.token_type);
  int64_t run = a.runs.count ? run_of(a.runs, start) : 0;
  while (start < stop) {
    int64_t end = stop;
    if (a.stride > a.seq_len) {
      const int64_t into = (start - a.phase) % a.stride;
      if (into >= a.seq_len) {
        start += a.stride - into;
        continue;
      }
      end = std::min(end, start + a.seq_len - into);
    }
    if (a.runs.count) {
      while (a.runs.begins[run + 1] <= start) ++run;
      end = std::min(end, a.runs.begins[run + 1]);
      visit(address_in(a.runs, run, start, itemsize), end - start, start);
    } else {
      visit(static_cast<const char*>(a.tokens) + start * itemsize, end - start, start);
    }
    start = end;
  }
}

// One thread's share.
class Worker {
 public:
  explicit Worker(const ScanArgs& a)
      : a_(a), aligned_(new int64_t[kBlockBytes / sizeof(int64_t)]), places_(a.max_places) {
    lowest_.reserve(2 * a.max_places);
    if (a.counts) counts_ = zeros(a.num_bins * kHistograms);
    part_.counts = counts_.get();
    part_.places = places_.data();
  }

  void scan(int64_t start, int64_t stop) {
    // No search where all that it can find comes after those that are known.
    const bool is_late = full() && lowest_.back() < start;
    part_.found.num_places = is_late ? a_.max_places : 0;
    visit_pieces(a_, start, stop, [&](const char* address, int64_t count, int64_t offset) {
      scan_piece(address, count, offset);
    });
    if (!is_late) keep_places();
  }

  // To those of the caller.
  void add_counts() const {
    const int64_t last = std::min(part_.found.greatest, a_.num_bins - 1);
    for (int64_t id = 0; id <= last; ++id) {
      const uint32_t* of_id = part_.counts + id * kHistograms;
      for (int64_t k = 0; k < kHistograms; ++k) a_.counts[id] += of_id[k];
    }
  }

  const Scanned& found() const { return part_.found; }
  const std::vector<int64_t>& lowest() const { return lowest_; }

 private:
  void scan_piece(const char* address, int64_t count, int64_t offset) {
    const int64_t itemsize = size_of(a_.token_type), most = kBlockBytes / itemsize;
    const bool is_aligned = reinterpret_cast<uintptr_t>(address) % itemsize == 0;
    for (int64_t first = 0; first < count; first += most) {
      const int64_t length = std::min(most, count - first);
      const void* block = address + first * itemsize;
      if (!is_aligned) block = std::memcpy(aligned_.get(), block, length * itemsize);
      scan_block_(a_, block, length, offset + first, &part_);
    }
  }

  bool full() const {
    return a_.max_places && static_cast<int64_t>(lowest_.size()) == a_.max_places;
  }

  void keep_places() {
    lowest_.insert(lowest_.end(), places_.begin(), places_.begin() + part_.found.num_places);
    std::sort(lowest_.begin(), lowest_.end());
    if (static_cast<int64_t>(lowest_.size()) > a_.max_places) lowest_.resize(a_.max_places);
  }

  const ScanArgs& a_;
  const ScanBlock scan_block_ = kernels().scan_block;
  std::unique_ptr<int64_t[]> aligned_;  // a block of ids that are not
  std::unique_ptr<uint32_t[], FreeMemory> counts_;
  std::vector<int64_t> places_, lowest_;
  ScanPart part_ = {};
};

}  // namespace

Scanned scan_cpu(const ScanArgs& a, int num_threads) {
  const int64_t itemsize = size_of(a.token_type), count = a.stop - a.start;
  const int64_t bytes = std::clamp(count * itemsize / (4 * std::max(num_threads, 1)),
                                   kLeastBytesPerChunk, kMostBytesPerChunk);
  const int64_t chunk = bytes / itemsize, num_chunks = (count + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));
  std::vector<Worker> workers;
  workers.reserve(num_threads);
  for (int i = 0; i < num_threads; ++i) workers.emplace_back(a);

  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    const int64_t start = a.start + c * chunk;
    workers[worker].scan(start, std::min(start + chunk, a.stop));
  });

  Scanned found;
  std::vector<int64_t> places;
  for (const Worker& worker : workers) {
    if (a.counts) worker.add_counts();
    found.merge(worker.found());
    places.insert(places.end(), worker.lowest().begin(), worker.lowest().end());
  }
  std::sort(places.begin(), places.end());
  found.num_places = std::min<int64_t>(places.size(), a.max_places);
  std::copy_n(places.begin(), found.num_places, a.places);
  return found;
}

}  // namespace nar
