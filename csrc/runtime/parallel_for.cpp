#include "runtime/parallel_for.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace nar {
namespace {

// The process that loaded this library. Its threads are not in those forked from it.
const pid_t home = getpid();

// The entry points that GCC compiles `#pragma omp parallel` to; LLVM's runtime has them, too.
// Looked up rather than linked, since the runtime must be the very one that PyTorch brought.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*thread_num)();

  static const OpenMp& get() {
    static const OpenMp found = {
        reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
    };
    return found;
  }

  bool is_there() const { return parallel && thread_num; }
};

struct Job {
  Job(int64_t count, int workers, const std::function<void(int64_t, int)>& work)
      : count(count), workers(workers), work(work), next(workers) {
    for (int s = 0; s < workers; ++s) next[s] = begin(s);
  }

  // Static partition: in a second pass over the same items a worker finds its own in the cache.
  int64_t begin(int worker) const { return count * worker / workers; }

  // Its own part first, then work stealing: OpenMP may give fewer threads than asked for, or late.
  void take_part(int worker) {
    for (int turn = 0; turn < workers; ++turn) {
      const int part = (worker + turn) % workers;
      const int64_t end = begin(part + 1);
      for (int64_t i; (i = next[part].fetch_add(1)) < end;) work(i, worker);
    }
  }

  const int64_t count;
  const int workers;
  const std::function<void(int64_t, int)>& work;
  std::vector<std::atomic<int64_t>> next;  // of each part
};

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& work) {
  const OpenMp& openmp = OpenMp::get();
  const int workers = static_cast<int>(std::min<int64_t>(count, num_threads));
  if (workers <= 1 || !openmp.is_there() || getpid() != home) {
    for (int64_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
  Job job(count, workers, work);
  openmp.parallel(
      [](void* data) { static_cast<Job*>(data)->take_part(OpenMp::get().thread_num()); }, &job,
      static_cast<unsigned>(workers), 0);
}

}  // namespace nar
