// Products of a few rows with packed weight matrices, shared among threads.
//
// A weight matrix [K, N] is packed as panels [ceil(N / 32), K, 32], the last one filled
// up with zeros. Every panel is read once and meets all rows; threads claim panels by a
// counter, so that the caller never waits for a thread that has not begun.

#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "sets.h"
#include "share.h"

namespace collab_jax {

// y[rows, width] = x[rows, K] times the panels of one matrix.
struct Product {
  Rows rows;
  const char* panels;
  const float* scale;  // null: 1
  float* y;
  int64_t width;  // N

  int64_t count() const { return (width + PANEL - 1) / PANEL; }
};

// Products over one K, as a row of panels that threads share.
class Job {
 public:
  Job(Set set, Type weights, Type rows, int64_t depth, std::vector<Product> products)
      : panel_(panel_of(set, weights, rows)),
        depth_(depth),
        bytes_(depth * PANEL * bytes_of(weights)),
        products_(std::move(products)),
        turn_(turn_of(rows)),
        row_(depth * bytes_of(rows)),
        digits_of_row_(digits_of(rows, depth)) {
    for (const Product& product : products_) pieces.total += product.count();
    if (in_digits(set, weights)) turn_later();
  }

  // How many threads have enough to do; sets how many panels one claims at a time: the
  // more rows, the more work is a panel.
  int64_t share(int64_t threads) {
    int64_t rows = 1;
    for (const Product& product : products_) rows = std::max(rows, product.rows.count);
    const int64_t work = std::max<int64_t>(bytes_, 1) * ((rows + 3) / 4);
    const int64_t least = std::max<int64_t>(1, CHUNK / work);
    claim_ = std::max<int64_t>(1, std::min(least, pieces.total / (4 * threads)));
    return std::min(threads, (pieces.total + least - 1) / least);
  }

  // Takes panels until none is left. The next ones are claimed before the last of the
  // present ones, so that it is known what to ask the memory for: what lies behind a
  // claim is the claim of another thread.
  void work() {
    for (int64_t row = turns_.claim(1); row < turns_.total; row = turns_.claim(1)) {
      turn_(turned_[row], depth_, digits_.get() + row * digits_of_row_);
      turns_.done(1);
    }
    turns_.wait();
    for (int64_t begin = pieces.claim(claim_), then; begin < pieces.total; begin = then) {
      const int64_t end = std::min(begin + claim_, pieces.total);
      for (int64_t i = begin; i + 1 < end; ++i) one(i, i + 1);
      then = pieces.claim(claim_);
      one(end - 1, then);
      pieces.done(end - begin);
    }
  }

  Pieces pieces;  // panels

 private:
  // Finds a place for the digits of every row; products of the same rows share them.
  void turn_later() {
    std::map<std::pair<const void*, int64_t>, int64_t> known;
    std::vector<int64_t> places;
    for (const Product& product : products_) {
      const auto [x, rows] = std::pair(product.rows.x, product.rows.count);
      const auto [place, added] = known.emplace(std::pair(x, rows), turned_.size());
      for (int64_t row = 0; added && row < rows; ++row)
        turned_.push_back(static_cast<const char*>(x) + row * row_);
      places.push_back(place->second);
    }
    turns_.total = turned_.size();
    digits_.reset(new char[turned_.size() * digits_of_row_]);
    for (size_t n = 0; n < places.size(); ++n)
      products_[n].rows.digits = digits_.get() + places[n] * digits_of_row_;
  }

  // The product that a panel belongs to, and which of its panels it is.
  std::pair<const Product*, int64_t> find(int64_t i) const {
    const Product* product = products_.data();
    for (; i >= product->count(); ++product) i -= product->count();
    return {product, i};
  }

  void one(int64_t i, int64_t then) const {
    const auto [product, own] = find(i);
    const char* following = nullptr;
    if (then < pieces.total) {
      const auto [next, place] = find(then);
      following = next->panels + place * bytes_;
    }
    const int64_t at = own * PANEL;
    panel_(product->rows, depth_, product->panels + own * bytes_, following,
           product->scale ? product->scale + at : nullptr, product->y + at,
           product->width, std::min<int64_t>(product->width - at, PANEL));
  }

  Panel panel_;
  int64_t depth_, bytes_;
  std::vector<Product> products_;
  int64_t claim_ = 1;

  Pieces turns_;  // rows that become digits, before any panel is read
  Turn turn_;
  int64_t row_, digits_of_row_;  // bytes
  std::vector<const char*> turned_;
  std::unique_ptr<char[]> digits_;
};

}  // namespace collab_jax
