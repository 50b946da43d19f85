// Instruction sets, and what is compiled once for each of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

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

// of weights, and of the rows that meet them: float32, or bfloat16 where `takes` says so
enum class Type { float32, bfloat16, int8 };
// those of x86 each have all that stand between them and avx2
enum class Set { best, generic, neon, avx2, avx512, vnni, bf16 };

constexpr int PANEL = 32;        // columns of a panel
constexpr int PIECE = 256;       // steps of k that many rows read from the near cache
constexpr int LONG = 2048;       // and few rows
constexpr int GROUP = 48;        // rows between two readings of a panel
constexpr int ROWS = 144;        // rows that meet all panels before the next ones do
constexpr int64_t CHUNK = 1 << 18;  // bytes that a thread claims at least

// One key-value head, the slots of it that are read, and what caps its scores (0: none).
struct Head {
  const void *keys, *values;  // [slots, size]
  int64_t size, first, last;
  float cap;
};

constexpr int64_t LARGEST = 512;  // size of a head
constexpr int TOGETHER = 16;      // queries that read a head together
constexpr int SLOTS = 64;         // slots whose keys and values stay in the near cache

// A head, how many queries, and of each: itself, which slots it may read, its result.
using Read = void (*)(const Head&, int64_t, const float* const*, const bool* const*,
                      float* const*);

#include "digits.h"

// x, K, a panel, what will be read after it or null, its scales or null, y, the row
// stride of y, columns to write
using Panel = void (*)(const Rows&, int64_t, const void*, const void*, const float*,
                       float*, int64_t, int64_t);

namespace generic {
typedef int32_t Wide __attribute__((vector_size(16)));
static INLINE Wide widen(const int8_t* p) { return Wide{p[0], p[1], p[2], p[3]}; }
#define LANES 4
#define FEW 1
#define WIDEN(p) widen(p)
#include "panel.inc"
#include "heads.inc"
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
#include "heads.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx512f,avx2,fma")
namespace avx512 {
#define LANES 16
#define FEW 14
#define WIDEN(p) _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)(p)))
#include "panel.inc"
#include "heads.inc"
#undef LANES
#undef FEW
#undef WIDEN
}  // namespace avx512
TARGET_END

TARGET_BEGIN("avx512f,avx512bf16,avx2,fma")
namespace bf16 {
#define LANES 16
#define FEW 14
#define HALVES
#include "panel.inc"
#undef LANES
#undef FEW
#undef HALVES
}  // namespace bf16
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
#include "heads.inc"
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
    case Set::vnni:
      return supports(Set::avx512) && __builtin_cpu_supports("avx512vnni");
    case Set::bf16:
      return supports(Set::vnni) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case Set::neon: return true;
#endif
    default: return false;
  }
}

// The set itself, or in place of `best` the best that this processor supports.
inline Set resolved(Set set) {
  if (set != Set::best) return set;
  for (Set better : {Set::bf16, Set::vnni, Set::avx512, Set::avx2, Set::neon})
    if (supports(better)) return better;
  return Set::generic;
}

// Whether products of a type are those of digits.h, whose rows are turned first.
inline bool in_digits(Set set, Type weights) {
  return resolved(set) >= Set::vnni && weights == Type::int8;
}

// Whether rows of a type meet weights of a type.
inline bool takes(Set set, Type weights, Type rows) {
  if (rows == Type::float32) return true;
  return rows == Type::bfloat16 &&
         (in_digits(set, weights) ||
          (weights == Type::bfloat16 && resolved(set) == Set::bf16));
}

// What a set has: `f` is one of the functions of its namespace.
#if defined(__x86_64__)
#define OF_SET(set, f, type)                  \
  ((set) >= Set::avx512 ? avx512::f(type)     \
   : (set) == Set::avx2 ? avx2::f(type)       \
                        : generic::f(type))
#elif defined(__aarch64__)
#define OF_SET(set, f, type) ((set) == Set::neon ? neon::f(type) : generic::f(type))
#else
#define OF_SET(set, f, type) generic::f(type)
#endif

inline Panel panel_of(Set set, Type weights, Type rows) {
#if defined(__x86_64__)
  const bool halves = rows == Type::bfloat16;
  if (in_digits(set, weights)) return halves ? vnni::panel<uint16_t> : vnni::panel<float>;
  if (halves) return bf16::panel<bf16::Halves>;
#endif
  return OF_SET(resolved(set), panel_of, weights);
}

inline Read read_of(Set set, Type type) { return OF_SET(resolved(set), read_of, type); }

inline int64_t bytes_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::int8 ? 1 : 2;
}

}  // namespace collab_jax
