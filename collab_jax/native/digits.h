// Products with int8 panels in whole numbers, for AVX-512 with VNNI.
//
// Over 128 steps of k the numbers of a row share a scale, and each is so many digits of
// base 256, of -128 to 127: x = scale (d2 256^2 + d1 256 + d0). Numbers of float32 are
// three digits, off by at most 2^-22 of the largest of the 128: as near as sums of float32
// come, so that only weights are rounded to int8. Numbers of bfloat16 are two, off by at
// most 2^-15 of the largest, which is itself off by up to 2^-9 of what was rounded to it.
// An instruction multiplies 64 pairs of bytes; the sums of 128 steps are exact, and all
// sums are the same for one row as for many.

#pragma once

// The rows of a product.
struct Rows {
  const void* x;       // [count, K] float32, or bfloat16
  const void* digits;  // [count, blocks], or null where the set does not want them
  int64_t count;
};

constexpr int64_t SPAN = 128;  // steps of k that share a scale

// Of one row, 128 steps of k whose numbers are float, or bfloat16 as uint16_t.
template <class Number>
struct Digits {
  static constexpr int count = sizeof(Number) == 4 ? 3 : 2;  // of a number
  // the largest whole number, a little below that of so many digits
  static constexpr float top = count == 3 ? 8355000 : 32630;

  int8_t of[count][SPAN];  // the last first: those that count 1, 256, 256^2
  int32_t start[count];    // -128 times their sum: bytes of panels are w + 128
  float scale;
};

// Makes the digits of one row [K]: from the row, K, to.
using Turn = void (*)(const void*, int64_t, void*);

// Blocks of a row; steps of k behind the last whole four are no part of one.
inline int64_t spans(int64_t depth) { return (depth / 4 * 4 + SPAN - 1) / SPAN; }

#if defined(__x86_64__)
TARGET_BEGIN("avx512f,avx512vnni,avx2,fma")
namespace vnni {
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef float AnyFloats __attribute__((vector_size(64), aligned(4), may_alias));

// The first numbers at x, up to 16, and zeros.
static INLINE Floats some(const float* x, int64_t count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, x);
}

static INLINE Floats some(const uint16_t* x, int64_t count) {
  uint16_t near[16] = {};
  if (count < 16) x = std::copy_n(x, count, near) - count;
  const __m256i sixteen = _mm256_loadu_si256((const __m256i*)x);
  return (Floats)((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, sixteen) << 16);
}

// See `Turn`.
template <class Number>
static void turn(const void* row, int64_t depth, void* digits) {
  constexpr int COUNT = Digits<Number>::count;
  constexpr float TOP = Digits<Number>::top;
  const auto* x = static_cast<const Number*>(row);
  auto* to = static_cast<Digits<Number>*>(digits);
  for (int64_t left = depth / 4 * 4; left > 0; left -= SPAN, x += SPAN, ++to) {
    constexpr int PARTS = SPAN / 16;
    Floats part[PARTS];
    Integers largest = {};
    for (int i = 0; i < PARTS; ++i) {
      const int64_t own = std::max<int64_t>(0, std::min<int64_t>(left - 16 * i, 16));
      part[i] = some(own ? x + 16 * i : x, own);
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
template <class Number, int R>
static void tile(const Digits<Number>* x, int64_t stride, const uint8_t* w, int64_t count,
                 float* sums, Ahead& given, bool twice) {
  constexpr int C = PANEL / 16, COUNT = Digits<Number>::count;
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
template <class Number>
static void panel(const Rows& rows, int64_t depth, const void* weights,
                  const void* following, const float* scale, float* y, int64_t stride,
                  int64_t width) {
  // rows whose sums over all columns fit into the registers
  constexpr int64_t MOST = Digits<Number>::count == 3 ? 4 : 6;
  constexpr decltype(&tile<Number, 1>) TILES[] = {
      tile<Number, 1>, tile<Number, 2>, tile<Number, 3>,
      tile<Number, 4>, tile<Number, 5>, tile<Number, 6>};
  const auto* x = static_cast<const Number*>(rows.x);
  const auto* digits = static_cast<const Digits<Number>*>(rows.digits);
  const auto* w = static_cast<const uint8_t*>(weights);
  const int64_t blocks = spans(depth), fours = depth / 4 * 4;
  for (int64_t first = 0; first < rows.count; first += GROUP) {
    const int64_t group = std::min<int64_t>(rows.count - first, GROUP);
    const int64_t passes = (group + MOST - 1) / MOST;
    alignas(64) float sums[GROUP * PANEL];
    std::fill(sums, sums + group * PANEL, 0.0f);
    for (int64_t k = 0; k < fours; k += LONG) {
      const int64_t count = std::min<int64_t>(fours - k, LONG);
      const bool last = k + LONG >= fours;
      const auto* next = (const char*)(last ? following : w + (k + LONG) * PANEL);
      // later rows find it there
      Ahead ahead{next, first || !next ? 0 : count * PANEL / 256 * 64, 0};
      for (int64_t row = 0, left = passes; left; --left) {
        const int64_t size = (group - row) / left;
        TILES[size - 1](digits + (first + row) * blocks + k / SPAN, blocks,
                        w + k * PANEL, count, sums + row * PANEL, ahead, passes == 1);
        row += size;
      }
    }
    for (int64_t row = 0; row < group; ++row) {
      float* sum = sums + row * PANEL;
      for (int64_t k = fours; k < depth; ++k) {
        const float left = some(x + (first + row) * depth + k, 1)[0];
        for (int at = 0; at < PANEL; ++at)
          sum[at] += left * (float(w[k * PANEL + at]) - 128);
      }
      float* to = y + (first + row) * stride;
      for (int64_t at = 0; at < width; ++at) to[at] = sum[at] * scale[at];
    }
  }
}

}  // namespace vnni
TARGET_END
#endif

// How a row of numbers of a type becomes digits.
inline Turn turn_of(Type rows) {
#if defined(__x86_64__)
  return rows == Type::float32 ? vnni::turn<float> : vnni::turn<uint16_t>;
#else
  return nullptr;  // no set has them
#endif
}

// Bytes of the digits of a row [K].
inline int64_t digits_of(Type rows, int64_t depth) {
  const bool wide = rows == Type::float32;
  return spans(depth) * (wide ? sizeof(Digits<float>) : sizeof(Digits<uint16_t>));
}
