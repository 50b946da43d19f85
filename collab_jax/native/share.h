// Work that threads share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace collab_jax {

// Does the work of a job; `schedule(f)` runs f in some thread, now or later. A job says
// how many threads it is worth, and its pieces are claimed, so that the caller never
// waits for a thread that has not begun.
template <typename Job, typename Schedule>
void compute(std::shared_ptr<Job> job, int64_t threads, Schedule schedule) {
  // shared: a thread that comes late finds nothing to do, but it finds the counter
  for (int64_t n = job->share(std::max<int64_t>(threads, 1)); n > 1; --n)
    schedule([job] { job->work(); });
  job->work();
  job->wait();
}

}  // namespace collab_jax
