// Work that threads share.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace collab_jax {

// The pieces 0 to total - 1 of a job: which are claimed, and how many are done.
struct Pieces {
  int64_t total = 0;
  std::atomic<int64_t> next{0}, finished{0};

  // The first of so many that are now the caller's; from `total` on there is none.
  int64_t claim(int64_t count) { return next.fetch_add(count, std::memory_order_relaxed); }

  void done(int64_t count) { finished.fetch_add(count, std::memory_order_release); }

  // Returns when what other threads claimed is done.
  void wait() const {
    for (int turn = 0; finished.load(std::memory_order_acquire) < total; ++turn)
      if (turn > 1000) std::this_thread::yield();
  }
};

// Does the work of a job; `schedule(f)` runs f in some thread, now or later. A job says
// how many threads it is worth, and its pieces are claimed, so that the caller never
// waits for a thread that has not begun.
template <typename Job, typename Schedule>
void compute(std::shared_ptr<Job> job, int64_t threads, Schedule schedule) {
  // shared: a thread that comes late finds nothing to do, but it finds the counter
  for (int64_t n = job->share(std::max<int64_t>(threads, 1)); n > 1; --n)
    schedule([job] { job->work(); });
  job->work();
  job->pieces.wait();
}

}  // namespace collab_jax
