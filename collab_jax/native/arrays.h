// The arrays of a call of XLA, with the axes that vmap put in front of them.

#pragma once

#include <algorithm>
#include <string>

#include "share.h"
#include "xla/ffi/api/ffi.h"

namespace collab_jax {

namespace ffi = xla::ffi;
using Dimensions = ffi::AnyBuffer::Dimensions;

inline ffi::Error wrong(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "collab_jax: " + what);
}

// Does a job with the threads of XLA.
template <typename Job>
ffi::Error run(ffi::ThreadPool pool, std::shared_ptr<Job> job) {
  compute(job, pool.num_threads(), [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

// An array `[*lead, *own]`: an axis that vmap put in front has its size, or 1 where the
// array is shared.
struct Led {
  Dimensions dims;
  size_t lead;

  bool shared() const {
    return std::all_of(dims.begin(), dims.begin() + lead, [](int64_t d) { return d == 1; });
  }

  int64_t own(size_t axis) const { return dims[lead + axis]; }

  // Elements before the part of one member of `all`.
  int64_t offset(int64_t member, Dimensions all) const {
    int64_t size = 1, found = 0;
    for (size_t axis = lead; axis < dims.size(); ++axis) size *= dims[axis];
    for (size_t axis = lead; axis-- > 0;) {
      if (dims[axis] > 1) found += member % all[axis] * size;
      member /= all[axis];
      size *= dims[axis];
    }
    return found;
  }
};

}  // namespace collab_jax
