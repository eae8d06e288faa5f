// Contiguous ranges of work on a few threads.
#pragma once

#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace nar {

// Calls work(begin, end, part) on `parts` ranges that cover [0, count), one a thread, the first on
// the caller's. Threads live for this call only: nothing survives that a fork could break, and
// starting one costs tens of microseconds, so callers ask for parts worth more than that.
template <typename Work>
void parallel_ranges(int64_t count, int parts, const Work& work) {
  const auto edge = [=](int part) { return count * part / parts; };
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  int started = 1;
  for (; started < parts; ++started) {
    try {
      threads.emplace_back(work, edge(started), edge(started + 1), started);
    } catch (const std::exception&) {  // no more threads to be had: do the rest here
      break;
    }
  }
  work(edge(0), edge(1), 0);
  for (int part = started; part < parts; ++part) work(edge(part), edge(part + 1), part);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace nar
