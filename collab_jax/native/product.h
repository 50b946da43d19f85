// Products of a few rows with packed weight matrices, shared among threads.
//
// A weight matrix [K, N] is packed as panels [ceil(N / 32), K, 32], the last one filled
// up with zeros. Every panel is read once and meets all rows; threads claim panels by a
// counter, so that the caller never waits for a thread that has not begun.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define TARGET_BEGIN(set) \
  _Pragma(TEXT(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(set) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(set)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
#define TEXT(x) #x

namespace collab_jax {

enum class Type { float32, bfloat16, int8 };
enum class Set { best, generic, avx2, avx512, neon };

constexpr int PANEL = 32;        // columns of a panel
constexpr int PIECE = 256;       // steps of k that many rows read from the near cache
constexpr int LONG = 2048;       // and few rows
constexpr int GROUP = 48;        // rows between two readings of a panel
constexpr int64_t CHUNK = 1 << 18;  // bytes that a thread claims at least

// x, its rows, K, a panel, what will be read after it or null, its scales or null, y, the
// row stride of y, columns to write
using Panel = void (*)(const float*, int64_t, int64_t, const void*, const void*,
                       const float*, float*, int64_t, int64_t);

namespace generic {
typedef int32_t Wide __attribute__((vector_size(16)));
static INLINE Wide widen(const int8_t* p) { return Wide{p[0], p[1], p[2], p[3]}; }
#define LANES 4
#define FEW 1
#define WIDEN(p) widen(p)
#include "panel.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace generic

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma")
namespace avx2 {
#define LANES 8
#define FEW 3
#define WIDEN(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p)))
#include "panel.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx512f,avx2,fma")
namespace avx512 {
#define LANES 16
#define FEW 8
#define WIDEN(p) _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)(p)))
#include "panel.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace avx512
TARGET_END
#endif

#if defined(__aarch64__)
namespace neon {
static INLINE int32x4_t widen(const int8_t* p) {
  return int32x4_t{p[0], p[1], p[2], p[3]};
}
#define LANES 4
#define FEW 3
#define WIDEN(p) widen(p)
#include "panel.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace neon
#endif

// Whether this processor has a set; `best` is always there.
inline bool supports(Set set) {
  switch (set) {
    case Set::best:
    case Set::generic: return true;
#if defined(__x86_64__)
    case Set::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Set::avx512: return supports(Set::avx2) && __builtin_cpu_supports("avx512f");
#elif defined(__aarch64__)
    case Set::neon: return true;
#endif
    default: return false;
  }
}

inline Panel panel_of(Set set, Type type) {
  if (set == Set::best)
    for (Set better : {Set::avx512, Set::avx2, Set::neon, Set::generic})
      if (supports(better)) return panel_of(better, type);
  switch (set) {
#if defined(__x86_64__)
    case Set::avx2: return avx2::panel_of(type);
    case Set::avx512: return avx512::panel_of(type);
#elif defined(__aarch64__)
    case Set::neon: return neon::panel_of(type);
#endif
    default: return generic::panel_of(type);
  }
}

inline int64_t bytes_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 1;
}

// y[rows, width] = x[rows, K] times the panels of one matrix.
struct Product {
  const float* x;
  int64_t rows;
  const char* panels;
  const float* scale;  // null: 1
  float* y;
  int64_t width;  // N

  int64_t count() const { return (width + PANEL - 1) / PANEL; }
};

// Products over one K, as a row of panels that threads share.
class Job {
 public:
  Job(Set set, Type type, int64_t depth, std::vector<Product> products)
      : panel_(panel_of(set, type)),
        depth_(depth),
        bytes_(depth * PANEL * bytes_of(type)),
        products_(std::move(products)) {
    for (const Product& product : products_) total_ += product.count();
  }

  // How many threads have enough to do; sets how many panels one claims at a time.
  int64_t share(int64_t threads) {
    const int64_t least = std::max<int64_t>(1, CHUNK / std::max<int64_t>(bytes_, 1));
    claim_ = std::max<int64_t>(1, std::min(least, total_ / (4 * threads)));
    return std::min(threads, (total_ + least - 1) / least);
  }

  // Takes panels until none is left. The next ones are claimed before the last of the
  // present ones, so that it is known what to ask the memory for: what lies behind a
  // claim is the claim of another thread.
  void work() {
    for (int64_t begin = claim(), then; begin < total_; begin = then) {
      const int64_t end = std::min(begin + claim_, total_);
      for (int64_t i = begin; i + 1 < end; ++i) one(i, i + 1);
      then = claim();
      one(end - 1, then);
      done_.fetch_add(end - begin, std::memory_order_release);
    }
  }

  // Returns when the panels that other threads took are done.
  void wait() const {
    for (int turn = 0; done_.load(std::memory_order_acquire) < total_; ++turn)
      if (turn > 1000) std::this_thread::yield();
  }

 private:
  int64_t claim() { return next_.fetch_add(claim_, std::memory_order_relaxed); }

  // The product that a panel belongs to, and which of its panels it is.
  std::pair<const Product*, int64_t> find(int64_t i) const {
    const Product* product = products_.data();
    for (; i >= product->count(); ++product) i -= product->count();
    return {product, i};
  }

  void one(int64_t i, int64_t then) const {
    const auto [product, own] = find(i);
    const char* following = nullptr;
    if (then < total_) {
      const auto [next, place] = find(then);
      following = next->panels + place * bytes_;
    }
    const int64_t at = own * PANEL;
    panel_(product->x, product->rows, depth_, product->panels + own * bytes_, following,
           product->scale ? product->scale + at : nullptr, product->y + at,
           product->width, std::min<int64_t>(product->width - at, PANEL));
  }

  Panel panel_;
  int64_t depth_, bytes_;
  std::vector<Product> products_;
  int64_t total_ = 0, claim_ = 1;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Computes products; `schedule(f)` runs f in some thread, now or later.
template <typename Schedule>
void compute(Set set, Type type, int64_t depth, std::vector<Product> products,
             int64_t threads, Schedule schedule) {
  // shared: a thread that comes late finds nothing to do, but it finds the counter
  auto job = std::make_shared<Job>(set, type, depth, std::move(products));
  for (int64_t n = job->share(std::max<int64_t>(threads, 1)); n > 1; --n)
    schedule([job] { job->work(); });
  job->work();
  job->wait();
}

}  // namespace collab_jax
