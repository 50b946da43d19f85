// Products with int8 panels in whole numbers, for AVX-512 with VNNI.
//
// Over 128 steps of k the numbers of a row share a scale, and each is three digits of
// base 256, of -128 to 127: x = scale (d2 256^2 + d1 256 + d0), off by at most 2^-22 of
// the largest of the 128. That is as near as sums of float32 come, so that only weights
// are rounded to int8; two digits would be 1.3 times as fast, and 200 times as far off.
// An instruction multiplies 64 pairs of bytes; the sums of 128 steps are exact, and all
// sums are the same for one row as for many.

#pragma once

struct Digits;  // of 128 steps of k, one row

// The rows of a product.
struct Rows {
  const void* x;         // [count, K] float32, or bfloat16
  const Digits* digits;  // [count, blocks], or null where the set does not want them
  int64_t count;
};

constexpr int64_t SPAN = 128;  // steps of k that share a scale
constexpr int COUNT = 3;       // digits of a number
constexpr float TOP = 8355000;  // the largest number, a little below that of three digits

struct Digits {
  int8_t of[COUNT][SPAN];  // the last first: those that count 1, 256, 256^2
  int32_t start[COUNT];    // -128 times their sum: bytes of panels are w + 128
  float scale;
};

// Blocks of a row; steps of k behind the last whole four are no part of one.
inline int64_t spans(int64_t depth) { return (depth / 4 * 4 + SPAN - 1) / SPAN; }

#if defined(__x86_64__)
TARGET_BEGIN("avx512f,avx512vnni,avx2,fma")
namespace vnni {
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef float AnyFloats __attribute__((vector_size(64), aligned(4), may_alias));

// One row [K] as digits.
static void turn(const float* x, int64_t depth, Digits* to) {
  for (int64_t left = depth / 4 * 4; left > 0; left -= SPAN, x += SPAN, ++to) {
    constexpr int PARTS = SPAN / 16;
    Floats part[PARTS];
    Integers largest = {};
    for (int i = 0; i < PARTS; ++i) {
      const int64_t some = std::max<int64_t>(0, std::min<int64_t>(left - 16 * i, 16));
      part[i] = _mm512_maskz_loadu_ps((1u << some) - 1, some ? x + 16 * i : x);
      const Integers bits = (Integers)part[i] & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    // bits of what is not a number, or not finite, are larger than all others
    uint32_t most = 0x0d800000;  // 2^-100
    for (int i = 0; i < 16; ++i) most = std::max<uint32_t>(most, largest[i]);
    float top;
    __builtin_memcpy(&top, &most, sizeof top);
    const float times = TOP / top;
    to->scale = top / TOP;
    Integers sums[COUNT] = {};
    for (int i = 0; i < PARTS; ++i) {
      Integers rest = (Integers)_mm512_maskz_cvtps_epi32(0xffff, part[i] * times);
      for (int d = 0; d < COUNT; ++d) {
        const Integers digit = rest << 24 >> 24;
        rest = (rest - digit) >> 8;
        sums[d] += digit;
        _mm_storeu_si128((__m128i*)(to->of[d] + 16 * i),
                         _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)digit));
      }
    }
    for (int d = 0; d < COUNT; ++d) {
      to->start[d] = 0;
      for (int i = 0; i < 16; ++i) to->start[d] -= 128 * sums[d][i];
    }
  }
}

// What to ask the memory for while working: lines of the piece that follows, from four
// places at once, which the memory answers faster than from one.
struct Ahead {
  const char* from;
  int64_t quarter;  // bytes, whole lines
  int64_t line;     // the next one, 0 to the number of lines

  void ask() {
    if (line / 4 * 64 < quarter)
      __builtin_prefetch(from + line % 4 * quarter + line / 4 * 64, 0, 2);
    ++line;
  }
};

// Adds R rows, over so many steps of k, times a panel to sums[R, 32].
template <int R>
static void tile(const Digits* x, int64_t stride, const uint8_t* w, int64_t count,
                 float* sums, Ahead& given, bool twice) {
  constexpr int C = PANEL / 16;
  Ahead ahead = given;
  for (int64_t left = count / 4; left > 0; left -= SPAN / 4, ++x) {
    const int64_t fours = std::min<int64_t>(left, SPAN / 4);
    Integers total[R][COUNT][C];
    for (int r = 0; r < R; ++r)
      for (int d = 0; d < COUNT; ++d)
        for (int j = 0; j < C; ++j) total[r][d][j] = Integers{} + x[r * stride].start[d];
    for (int64_t i = 0; i < fours; ++i, w += 4 * PANEL) {
      ahead.ask();
      if (twice) ahead.ask();
      __m512i weights[C];
      for (int j = 0; j < C; ++j) weights[j] = _mm512_loadu_si512(w + 64 * j);
      for (int r = 0; r < R; ++r)
        for (int d = 0; d < COUNT; ++d) {
          int32_t four;
          __builtin_memcpy(&four, x[r * stride].of[d] + 4 * i, 4);
          const __m512i digits = (__m512i)(Integers{} + four);
          for (int j = 0; j < C; ++j)
            total[r][d][j] = (Integers)_mm512_dpbusd_epi32((__m512i)total[r][d][j],
                                                           weights[j], digits);
        }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) {
        // each sum is below 2^24, and so exact
        Floats sum = __builtin_convertvector(total[r][COUNT - 1][j], Floats);
        for (int d = COUNT - 1; d-- > 0;)
          sum = sum * 256 + __builtin_convertvector(total[r][d][j], Floats);
        *(AnyFloats*)(sums + r * PANEL + 16 * j) += sum * x[r * stride].scale;
      }
  }
  given.line = ahead.line;
}

// See `Panel` in sets.h.
static void panel(const Rows& rows, int64_t depth, const void* weights,
                  const void* following, const float* scale, float* y, int64_t stride,
                  int64_t width) {
  constexpr int64_t MOST = 4;  // rows whose sums over all columns fit into the registers
  constexpr decltype(&tile<1>) TILES[] = {tile<1>, tile<2>, tile<3>, tile<MOST>};
  const auto* x = static_cast<const float*>(rows.x);
  const auto* w = static_cast<const uint8_t*>(weights);
  const int64_t blocks = spans(depth), fours = depth / 4 * 4;
  for (int64_t first = 0; first < rows.count; first += GROUP) {
    const int64_t group = std::min<int64_t>(rows.count - first, GROUP);
    const int64_t passes = (group + MOST - 1) / MOST;
    alignas(64) float sums[GROUP * PANEL] = {};
    for (int64_t k = 0; k < fours; k += LONG) {
      const int64_t count = std::min<int64_t>(fours - k, LONG);
      const bool last = k + LONG >= fours;
      const auto* next = (const char*)(last ? following : w + (k + LONG) * PANEL);
      // later rows find it there
      Ahead ahead{next, first || !next ? 0 : count * PANEL / 256 * 64, 0};
      for (int64_t row = 0, left = passes; left; --left) {
        const int64_t size = (group - row) / left;
        TILES[size - 1](rows.digits + (first + row) * blocks + k / SPAN, blocks,
                        w + k * PANEL, count, sums + row * PANEL, ahead, passes == 1);
        row += size;
      }
    }
    for (int64_t row = 0; row < group; ++row)
      for (int at = 0; at < width; ++at) {
        float sum = sums[row * PANEL + at];
        for (int64_t k = fours; k < depth; ++k)
          sum += x[(first + row) * depth + k] * (float(w[k * PANEL + at]) - 128);
        y[(first + row) * stride + at] = scale ? sum * scale[at] : sum;
      }
  }
}

}  // namespace vnni
TARGET_END
#endif

// One row [K] as digits, where a set has them.
inline void turned(const float* x, int64_t depth, Digits* to) {
#if defined(__x86_64__)
  vnni::turn(x, depth, to);
#endif
}
