// Work shared by the threads that PyTorch's own operations run on.
#pragma once

#include <cstdint>
#include <functional>

namespace nar {

// Calls work(i, worker) for every i in [0, count), on at most num_threads threads. `worker` in
// [0, num_threads) names the thread, for memory of its own. Work must not throw.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded. After each operation they
// spin for some milliseconds: threads of our own would find the cores taken just when a training
// step asks for its next batch. Without such a runtime, and in a forked process, where its threads
// are gone, the caller does all the work.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& work);

}  // namespace nar
