// Random products and attentions through every instruction set of this processor,
// compared with sums in double; for the sanitizers. Every array ends where its memory
// ends.
//
// `fuzz N SEED` runs N of each; status 1 where one is wrong. With a third argument the
// expected sums are spoilt, and every result has to be found wrong.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "attention.h"
#include "product.h"

using namespace collab_jax;

// What avx512 does, in vectors that this processor need not have.
namespace collab_jax {
namespace wide {
typedef int32_t Wide __attribute__((vector_size(64)));
static INLINE Wide widen(const int8_t* p) {
  Wide found;
  for (int i = 0; i < 16; ++i) found[i] = p[i];
  return found;
}
#define LANES 16
#define FEW 8
#define WIDEN(p) widen(p)
#include "panel.inc"
#include "heads.inc"
}  // namespace wide
}  // namespace collab_jax

namespace {

// Memory of exactly so many bytes, anywhere that the type may lie.
template <typename T>
struct Exact {
  explicit Exact(int64_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
  Exact(const Exact&) = delete;
  ~Exact() { std::free(data); }
  T* data;
};

float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Fuzz {
  std::mt19937 random;
  bool spoilt;

  int64_t upto(int64_t most) { return random() % (most + 1); }
  float normal() { return std::normal_distribution<float>()(random); }

  // One product of random sizes; whether it is right.
  bool one(Set set, Type type, Type own_type, int64_t threads, Panel other) {
    const int64_t rows = upto(upto(8) ? 18 : 120), depth = upto(upto(4) ? 70 : 600);
    const int64_t width = upto(upto(4) ? 100 : 700), panels = (width + PANEL - 1) / PANEL;
    const int64_t size = panels * depth * PANEL;
    Exact<char> x(rows * depth * bytes_of(own_type));
    Exact<float> scale(width), y(rows * width);
    Exact<uint8_t> w(size * bytes_of(type));
    std::vector<double> row(rows * depth), value(size);
    for (int64_t i = 0; i < rows * depth; ++i)
      row[i] = number(own_type, x.data + i * bytes_of(own_type));
    for (int64_t i = 0; i < width; ++i) scale.data[i] = 0.5f + upto(8);
    for (int64_t i = 0; i < rows * width; ++i) y.data[i] = NAN;
    // [K / steps, 32, steps], and the last steps one by one
    const int64_t steps = 4 / bytes_of(type), whole = depth / steps * steps * PANEL;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t own = i % (depth * PANEL), word = own % (steps * PANEL);
      const int64_t k = own / (steps * PANEL) * steps + word % steps;
      const int64_t place = own < whole ? k * PANEL + word / steps : own;
      value[i - own + place] = number(type, w.data + i * bytes_of(type));
    }
    const bool scaled = type == Type::int8;
    if (other) {
      for (int64_t p = 0; p < panels; ++p)
        other({x.data, nullptr, rows}, depth,
              w.data + p * depth * PANEL * bytes_of(type), nullptr,
              scaled ? scale.data + p * PANEL : nullptr, y.data + p * PANEL, width,
              std::min<int64_t>(width - p * PANEL, PANEL));
    } else {
      std::vector<std::thread> helpers;
      std::vector<Product> products{
          {{x.data, nullptr, rows}, reinterpret_cast<const char*>(w.data),
           scaled ? scale.data : nullptr, y.data, width}};
      compute(std::make_shared<Job>(set, type, own_type, depth, std::move(products)),
              threads, [&](auto task) { helpers.emplace_back(std::move(task)); });
      for (std::thread& helper : helpers) helper.join();
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < width; ++n) {
        double sum = spoilt ? 1 : 0, size_of_sum = 0, largest = 0;
        for (int64_t k = 0; k < depth; ++k) {
          const double weight = value[(n / PANEL * depth + k) * PANEL + n % PANEL];
          const double term = row[r * depth + k] * weight;
          sum += term;
          size_of_sum += std::fabs(term);
          if (!in_digits(set, type) || other) continue;
          if (k % SPAN == 0) largest = 0;
          for (int64_t i = k; k % SPAN == 0 && i < std::min(k + SPAN, depth); ++i)
            largest = std::max(largest, std::fabs(row[r * depth + i]));
          // 3e-6 of it are 2^-22, or half of one of 32,630 steps
          const double digit = own_type == Type::float32 ? 1 / 12. : 5.15;
          size_of_sum += largest * std::fabs(weight) * digit;
        }
        const double factor = scaled ? scale.data[n] : 1;
        const double gap = std::fabs(y.data[r * width + n] - sum * factor);
        if (!(gap <= 3e-6 * size_of_sum * factor)) {
          if (!spoilt)
            std::printf("set %d, types %d, %d, %ld x %ld x %ld: [%ld, %ld] is %g, not %g\n",
                        int(set), int(own_type), int(type), long(rows), long(depth),
                        long(width), long(r), long(n), y.data[r * width + n],
                        sum * factor);
          return false;
        }
      }
    return rows * width == 0 ? !spoilt : true;
  }

  // One attention of random sizes; whether it is right.
  bool attention(Set set, Type type, int64_t threads, Read other) {
    const int64_t batch = 1 + upto(2), tokens = 1 + upto(5), heads = 1 + upto(2);
    const int64_t group = 1 + upto(4), slots = 1 + upto(upto(3) ? 80 : 400);
    const int64_t size = 1 + upto(upto(3) ? 70 : LARGEST - 1), bytes = bytes_of(type);
    const int64_t each = tokens * heads * group * size, held = heads * slots * size;
    const float cap = upto(1) ? 0 : 5;
    Exact<float> q(batch * each), y(batch * each);
    Exact<char> k(batch * held * bytes), v(batch * held * bytes);
    Exact<bool> mask(batch * tokens * slots);
    std::vector<double> keys(batch * held), values(batch * held);
    for (int64_t i = 0; i < batch * each; ++i) q.data[i] = normal() / std::sqrt(size);
    for (int64_t i = 0; i < batch * held; ++i) {
      keys[i] = number(type, k.data + i * bytes);
      values[i] = number(type, v.data + i * bytes);
    }
    for (int64_t i = 0; i < batch * tokens * slots; ++i) mask.data[i] = upto(1);
    std::vector<Reading> rows;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t first = upto(slots - 1), last = first + 1 + upto(slots - first - 1);
      for (int64_t t = 0; t < tokens; ++t)
        mask.data[(b * tokens + t) * slots + first + upto(last - first - 1)] = true;
      rows.push_back({q.data + b * each, k.data + b * held * bytes,
                      v.data + b * held * bytes, mask.data + b * tokens * slots, first,
                      last, y.data + b * each});
    }
    if (other) {  // query by query
      for (const Reading& row : rows)
        for (int64_t i = 0; i < tokens * heads * group; ++i) {
          const int64_t at = i % (heads * group) / group * slots * size * bytes;
          const float* query = row.queries + i * size;
          const bool* seen = row.mask + i / (heads * group) * slots;
          float* result = row.results + i * size;
          other({row.keys + at, row.values + at, size, row.first, row.last, cap}, 1,
                &query, &seen, &result);
        }
    } else {
      std::vector<std::thread> helpers;
      const Sizes sizes{tokens, heads, group, slots, size, cap};
      compute(std::make_shared<Readings>(set, type, sizes, rows), threads,
              [&](auto task) { helpers.emplace_back(std::move(task)); });
      for (std::thread& helper : helpers) helper.join();
    }
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < tokens * heads * group; ++i) {
        const double* key = keys.data() + b * held + i % (heads * group) / group * slots * size;
        const double* value = values.data() + (key - keys.data());
        const bool* seen = rows[b].mask + i / (heads * group) * slots;
        std::vector<double> mean(size);
        double total = spoilt ? 0.5 : 0;
        for (int64_t j = rows[b].first; j < rows[b].last; ++j) {
          if (!seen[j]) continue;
          double score = 0;
          for (int64_t d = 0; d < size; ++d)
            score += rows[b].queries[i * size + d] * key[j * size + d];
          const double weight = std::exp(cap ? cap * std::tanh(score / cap) : score);
          total += weight;
          for (int64_t d = 0; d < size; ++d) mean[d] += weight * value[j * size + d];
        }
        for (int64_t d = 0; d < size; ++d) {
          const float found = rows[b].results[i * size + d];
          if (std::fabs(found - mean[d] / total) <= 2e-5) continue;
          if (!spoilt)
            std::printf("attention, set %d, type %d, size %ld: %g, not %g\n", int(set),
                        int(type), long(size), found, mean[d] / total);
          return false;
        }
      }
    return true;
  }

  // Writes a random number of a type; returns what was written.
  double number(Type type, void* to) {
    if (type == Type::int8) {  // a byte is w + 128
      *(uint8_t*)to = uint8_t(upto(255));
      return *(uint8_t*)to - 128;
    }
    const float draw = normal();
    uint32_t bits;
    std::memcpy(&bits, &draw, 4);
    const uint16_t half = bits >> 16;
    std::memcpy(to, type == Type::float32 ? (const void*)&draw : &half, bytes_of(type));
    return type == Type::float32 ? draw : widened(half);
  }
};

}  // namespace

int main(int given, char** arguments) {
  const int runs = given > 1 ? std::atoi(arguments[1]) : 100;
  Fuzz fuzz{std::mt19937(given > 2 ? std::atoi(arguments[2]) : 0), given > 3};
  int wrong = 0, total = 0;
  const auto count = [&](bool right) { wrong += !right, ++total; };
  for (int run = 0; run < runs; ++run)
    for (Type type : {Type::float32, Type::bfloat16, Type::int8}) {
      const bool cached = type != Type::int8;
      for (Set set : {Set::best, Set::generic, Set::avx2, Set::avx512, Set::vnni, Set::neon,
                      Set::bf16}) {
        if (!supports(set)) continue;
        for (Type rows : {Type::float32, Type::bfloat16})
          if (takes(set, type, rows))
            count(fuzz.one(set, type, rows, 1 + fuzz.upto(3), nullptr));
        if (cached) count(fuzz.attention(set, type, 1 + fuzz.upto(3), nullptr));
      }
      count(fuzz.one(Set::best, type, Type::float32, 1, wide::panel_of(type)));
      if (cached) count(fuzz.attention(Set::best, type, 1, wide::read_of(type)));
    }
  std::printf("%d of %d results are wrong\n", wrong, total);
  return wrong == (fuzz.spoilt ? total : 0) ? 0 : 1;
}
