#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace nar {
namespace {

struct Job {
  Job(int64_t count, int seats, const std::function<void(int64_t, int)>& work)
      : count(count), seats(seats), work(work) {}

  void take_part(int seat) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      work(i, seat);
      num_done.fetch_add(1, std::memory_order_release);
    }
  }

  const int64_t count;
  const int seats;
  const std::function<void(int64_t, int)>& work;  // gone once num_done is count
  std::atomic<int64_t> next{0}, num_done{0};
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
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
    }
    wake_.notify_all();
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
    std::shared_ptr<Job> last;
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return job_ && job_ != last; });
        job = last = job_;
      }
      const int seat = job->next_seat.fetch_add(1);
      if (seat < job->seats) job->take_part(seat);
    }
  }

  const pid_t process_ = getpid();
  std::mutex in_use_;
  int num_helpers_ = 0;  // changes under in_use_
  std::mutex mutex_;     // guards job_
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
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
