#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace nar {
namespace {

// How long a helper looks out for the next job before it sleeps: the second pass of an operation,
// or a caller that comes again at once, then need not wake it, which takes longer than a small
// batch.
constexpr auto kLookout = std::chrono::microseconds(100);

struct Job {
  Job(int64_t count, int seats, const std::function<void(int64_t, int)>& work)
      : count(count), seats(seats), work(work), next(seats) {
    for (int s = 0; s < seats; ++s) next[s] = begin(s);
  }

  // The part of each seat. Two passes over the same items find what the first wrote in the cache.
  int64_t begin(int seat) const { return count * seat / seats; }

  // A part of its own first, then what others have left.
  void take_part(int seat) {
    for (int turn = 0; turn < seats; ++turn) {
      const int part = (seat + turn) % seats;
      const int64_t end = begin(part + 1);
      for (int64_t i; (i = next[part].fetch_add(1)) < end;) {
        work(i, seat);
        num_done.fetch_add(1, std::memory_order_release);
      }
    }
  }

  const int64_t count;
  const int seats;
  const std::function<void(int64_t, int)>& work;  // gone once num_done is count
  std::vector<std::atomic<int64_t>> next;         // of each part
  std::atomic<int64_t> num_done{0};
  std::atomic<int> next_seat{1};  // 0 is the caller's
};

// Never destroyed: its threads may sleep in it while the process exits.
class ThreadPool {
 public:
  static ThreadPool& get() {
    static ThreadPool* pool = new ThreadPool;
    return *pool;
  }

  // Whether the helpers are there and nobody else uses them; if so, they now are in use.
  bool try_enter() { return getpid() == process_ && in_use_.try_lock(); }
  void leave() { in_use_.unlock(); }

  void run(const std::shared_ptr<Job>& job) {
    start_helpers(job->seats - 1);
    bool asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      num_jobs_.fetch_add(1);
      asleep = num_asleep_ > 0;
    }
    if (asleep) wake_.notify_all();
    job->take_part(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    while (job->num_done.load(std::memory_order_acquire) < job->count) std::this_thread::yield();
  }

 private:
  void start_helpers(int wanted) {
    try {
      for (; num_helpers_ < wanted; ++num_helpers_) {
        std::thread([this] { help(); }).detach();
      }
    } catch (const std::system_error&) {
      // No more threads to be had: those that there are will do.
    }
  }

  void help() {
    for (uint64_t seen = 0;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++num_asleep_;
        wake_.wait(lock, [&] { return num_jobs_ != seen; });
        --num_asleep_;
        seen = num_jobs_;
        job = job_;
      }
      if (!job) continue;  // over already
      const int seat = job->next_seat.fetch_add(1);
      if (seat < job->seats) job->take_part(seat);
      job.reset();
      const auto until = std::chrono::steady_clock::now() + kLookout;
      while (num_jobs_ == seen && std::chrono::steady_clock::now() < until) {
        std::this_thread::yield();
      }
    }
  }

  const pid_t process_ = getpid();
  std::mutex in_use_;
  int num_helpers_ = 0;  // changes under in_use_
  std::mutex mutex_;     // guards the rest
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  int num_asleep_ = 0;
  std::atomic<uint64_t> num_jobs_{0};  // read without the mutex on the lookout
};

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& work) {
  const int seats = static_cast<int>(std::min<int64_t>(count, num_threads));
  if (seats <= 1 || !ThreadPool::get().try_enter()) {
    for (int64_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
  ThreadPool::get().run(std::make_shared<Job>(count, seats, work));
  ThreadPool::get().leave();
}

}  // namespace nar
