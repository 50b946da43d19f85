// Attention of new tokens over the slots of a cache, shared among threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "sets.h"
#include "share.h"

namespace collab_jax {

constexpr int64_t LEAST = 1 << 17;  // products that are worth a second thread

// One row of a batch: tokens that read the slots `first` to `last - 1`.
struct Reading {
  const float* queries;      // [tokens, heads * group, size], scaled
  const char *keys, *values; // [heads, slots, size]
  const bool* mask;          // [tokens, slots]
  int64_t first, last;
  float* results;            // [tokens, heads * group, size]
};

struct Sizes {
  int64_t tokens, heads, group, slots, size;
  float cap;  // 0: none
};

// Readings, cut to pieces of a few queries of one head, which threads claim.
class Readings {
 public:
  Readings(Set set, Type type, Sizes sizes, std::vector<Reading> rows)
      : read_(read_of(set, type)),
        sizes_(sizes),
        bytes_(sizes.slots * sizes.size * bytes_of(type)),
        rows_(std::move(rows)) {}

  // How many threads have enough to do; sets how large the pieces are.
  int64_t share(int64_t threads) {
    int64_t slots = 0;
    for (const Reading& row : rows_) slots += std::max<int64_t>(row.last - row.first, 0);
    const int64_t each = sizes_.tokens * sizes_.group, heads = rows_.size() * sizes_.heads;
    const int64_t work = slots * each * sizes_.heads * sizes_.size * 2;
    threads = std::max<int64_t>(1, std::min(threads, work / LEAST));
    while (piece_ > 1 && heads * of_a_head() < 4 * threads && threads > 1) --piece_;
    pieces.total = heads * of_a_head();
    return std::min(threads, std::max<int64_t>(pieces.total, 1));
  }

  void work() {
    for (int64_t i; (i = pieces.claim(1)) < pieces.total;) {
      one(i);
      pieces.done(1);
    }
  }

  Pieces pieces;

 private:
  int64_t of_a_head() const {  // pieces
    return (sizes_.tokens * sizes_.group + piece_ - 1) / piece_;
  }

  void one(int64_t i) const {
    const int64_t own = i % of_a_head(), head = i / of_a_head() % sizes_.heads;
    const Reading& row = rows_[i / of_a_head() / sizes_.heads];
    const int64_t begin = own * piece_;
    const int64_t count = std::min(piece_, sizes_.tokens * sizes_.group - begin);
    const float* queries[TOGETHER];
    const bool* masks[TOGETHER];
    float* results[TOGETHER];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t token = (begin + n) / sizes_.group;
      const int64_t query = head * sizes_.group + (begin + n) % sizes_.group;
      const int64_t at = (token * sizes_.heads * sizes_.group + query) * sizes_.size;
      queries[n] = row.queries + at;
      results[n] = row.results + at;
      masks[n] = row.mask + token * sizes_.slots;
    }
    // of a long text, the first tokens read little
    const auto seen = [&](int64_t slot) {
      return std::any_of(masks, masks + count, [&](const bool* m) { return m[slot]; });
    };
    int64_t first = row.first, last = row.last;
    while (first < last && !seen(first)) ++first;
    while (first < last && !seen(last - 1)) --last;
    const Head from{row.keys + head * bytes_, row.values + head * bytes_, sizes_.size,
                    first, last, sizes_.cap};
    read_(from, count, queries, masks, results);
  }

  Read read_;
  Sizes sizes_;
  int64_t bytes_;  // of the keys of one head
  std::vector<Reading> rows_;
  int64_t piece_ = TOGETHER;  // queries
};

}  // namespace collab_jax
