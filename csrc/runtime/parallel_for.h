// A parallel loop on the OpenMP threads of PyTorch.
#pragma once

#include <cstdint>
#include <functional>

namespace nar {

// Calls work(i, worker) for every i in [0, count), on at most num_threads threads. `worker` in
// [0, num_threads) names the thread, for memory of its own. Work must not throw.
//
// Uses the OpenMP runtime that PyTorch has loaded. Its threads spin for some milliseconds after
// each operation, so a thread pool of our own would compete with them for cores. Without that
// runtime, and in a forked process, where its threads are gone, the caller does all the work.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& work);

}  // namespace nar
