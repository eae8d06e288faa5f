// Work shared with a few helper threads, if and when they get to run.
#pragma once

#include <cstdint>
#include <functional>

namespace nar {

// Calls work(i, seat) for every i in [0, count), on this thread and on at most num_threads - 1
// helpers. `seat` in [0, num_threads) names the thread, for memory of its own. Work must not throw.
//
// The caller takes items as the helpers do and waits only for those that a helper has begun. So a
// helper that finds no free core (PyTorch's own threads spin for a while after each operation)
// costs nothing, where a fixed division of the work would wait for it. After a fork, and while
// another thread uses the helpers, the caller does all the work.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t, int)>& work);

}  // namespace nar
