// The path of CPUs with AVX2, FMA and F16C.
//
// maddubs adds two products of u8 and s8 into int16, and saturates. int4 codes are at most 15:
// 16 pairs fit, so sums of 32 values of K stay in int16 before they are widened. int8 codes go in as
// |w| <= 128 with the sign moved to x (|x| <= 127): one pair fits, 2 * 128 * 127 < 2^15. Many rows of
// them are multiplied as int16, or as lanes.cpp does.
#if !defined(DFC_AHEAD)
#define DFC_ZEN_AHEAD 6144  // Zen 4 reads fastest from nearer than Zen 2, and into the first cache
#define DFC_ZEN_CACHE 3
#else
#define DFC_ZEN_AHEAD DFC_AHEAD
#define DFC_ZEN_CACHE DFC_CACHE
#endif
#include "avx2.h"
#include "norm.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

namespace dfc {
namespace {

// ---- one row: every weight is read once, so reading is what counts

template <bool ZEN>
inline void ask(const uint8_t* at) {
  if (!ZEN) return fetch(at);
  if (DFC_ZEN_AHEAD > 0) __builtin_prefetch(at, 0, DFC_ZEN_CACHE);
}

// PART: FLUSH, or a group of 16.
template <int PART, bool ZEN, bool HALF, bool ZEROS>
void one_row4(const Job& job, int64_t panel) {
  Layout w = job.w;
  w.half_scales = HALF;
  const uint8_t* base = panel_of(job, panel);
  const uint8_t* codes = base + w.codes_at;
  const int8_t* q = job.x.q;
  const float* xs = job.x.scale;
  const int32_t* xsum = job.x.sum;
  const uint8_t* group_ahead = ahead_of(base, w, ZEN ? DFC_ZEN_AHEAD : AHEAD);
  const __m256i low4 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256i dot[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const uint8_t* ahead = group_ahead;
    group_ahead += w.stride_bytes;
    for (int64_t k = 0; k < w.group; k += PART) {
      __m256i near[2];
      UNROLL for (int step = 0; step < PART / 8; ++step, codes += 64, q += 8) {
        ask<ZEN>(ahead);
        ahead += 64;
        const __m256i x0 = four(q), x1 = four(q + 4);
        __m256i low[2], high[2];
        HALVES {
          const __m256i two = once(load(codes + 32 * h));
          low[h] = _mm256_maddubs_epi16(_mm256_and_si256(two, low4), x0);
          high[h] = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(two, 4), low4), x1);
        }
        HALVES {
          if (step == 0)
            near[h] = low[h];
          else
            add16(near[h], low[h]);
        }
        HALVES add16(near[h], high[h]);
      }
      UNROLL for (int h = 0; h < 2; ++h)
        dot[h] = _mm256_add_epi32(dot[h], _mm256_madd_epi16(near[h], ones));
    }
    ask<ZEN>(ahead);
    __m256i sum = once(_mm256_set1_epi32(xsum[g]));
    if (!ZEROS) sum = _mm256_slli_epi32(sum, 3);
    UNROLL for (int h = 0; h < 2; ++h) {
      const __m256i off = ZEROS ? _mm256_mullo_epi32(zeros(w, base, g, h), sum) : sum;
      dot[h] = _mm256_sub_epi32(dot[h], off);
      total[h] = add_group(dot[h], xs[g], scales(w, base, g, h), total[h]);
    }
  }
  store(job, panel, 0, total[0], total[1]);
}

template <int PART, bool ZEN>
void one_row4(const Job& job, int64_t panel) {
  if (job.w.has_zeros)
    return job.w.half_scales ? one_row4<PART, ZEN, true, true>(job, panel)
                             : one_row4<PART, ZEN, false, true>(job, panel);
  job.w.half_scales ? one_row4<PART, ZEN, true, false>(job, panel)
                    : one_row4<PART, ZEN, false, false>(job, panel);
}

template <bool ZEN>
void one_row4(const Job& job, int64_t panel) {
  job.w.group == 16 ? one_row4<16, ZEN>(job, panel) : one_row4<FLUSH, ZEN>(job, panel);
}

inline __m256i dot8(__m256i weight, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// ONE: one group, and so nothing but codes to be read. The CPU then reads ahead by itself, and is
// slower by a tenth where it is told to.
template <bool ONE, bool ZEN>
void one_row8(const Job& job, int64_t panel) {
  const Layout& w = job.w;
  const uint8_t* base = panel_of(job, panel);
  const uint8_t* group_ahead = ahead_of(base, w, ZEN ? DFC_ZEN_AHEAD : AHEAD);
  const uint8_t* codes = base + w.codes_at;
  const int8_t* q = job.x.q;
  __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256i dot[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const uint8_t* ahead = group_ahead;
    group_ahead += w.stride_bytes;
    constexpr int STEPS = ONE ? 4 : 1;  // groups are multiples of 16
    for (const uint8_t* const end = codes + w.group_bytes; codes < end;) {
      UNROLL for (int step = 0; step < STEPS; ++step, codes += 64, ahead += 64, q += 4) {
        if (!ONE) ask<ZEN>(ahead);
        const __m256i x = four(q);
        HALVES add32(dot[h], dot8(load(codes + 32 * h), x));
      }
    }
    if (!ONE) ask<ZEN>(ahead);
    UNROLL for (int h = 0; h < 2; ++h)
      total[h] = add_group(dot[h], job.x.scale[g], scales(w, base, g, h), total[h]);
  }
  store(job, panel, 0, total[0], total[1]);
}

void one_row(const Job& job, int64_t panel) {
  if (job.w.bits == 8)
    return job.w.groups == 1 ? one_row8<true, false>(job, panel)
                             : one_row8<false, false>(job, panel);
  one_row4<false>(job, panel);
}

// ---- many rows: codes are unpacked once for all rows of a tile

struct Tile {
  const Job& job;
  int64_t row;
  const uint8_t* base;  // of the panel
  Tiling& s;
};

// Dot products of R rows for `parts` times PART values of K, to i32 [parts][R][16].
// codes: u8 [K / 4][16][4], at most 15 each. PART: FLUSH, or a group of 16.
// Why:  a function with nothing else in it: else the compiler keeps more than the 16 registers hold,
//       and the sums go through memory.
template <int R, int PART>
__attribute__((noinline)) void dots4(const uint8_t* codes, const int8_t* q, int64_t stride,
                                     int64_t parts, int32_t* out) {
  for (; parts > 0; --parts, out += R * PANEL) {
    __m256i low[R], high[R];
    ROWS low[i] = high[i] = _mm256_setzero_si256();
    UNROLL for (int k = 0; k < PART; k += 4, codes += 64, q += 4) {
      const __m256i w0 = load(codes), w1 = load(codes + 32);
      ROWS {
        const __m256i x = four(q + i * stride);
        add16(low[i], _mm256_maddubs_epi16(w0, x));
        add16(high[i], _mm256_maddubs_epi16(w1, x));
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    ROWS {
      keep(out + i * PANEL, _mm256_madd_epi16(low[i], ones));
      keep(out + i * PANEL + 8, _mm256_madd_epi16(high[i], ones));
    }
  }
}

// The same for parts of any length, codes: i16 [K / 2][16][2].
template <int R>
__attribute__((noinline)) void dots8(const uint8_t* codes, const int16_t* q, int64_t stride,
                                     int64_t parts, int64_t part, int32_t* out) {
  for (; parts > 0; --parts, out += R * PANEL) {
    __m256i low[R], high[R];
    ROWS low[i] = high[i] = _mm256_setzero_si256();
    const uint8_t* const end = codes + part * PANEL * 2;
    for (; codes < end; codes += 256, q += 8) {  // groups are multiples of 16
      UNROLL for (int k = 0; k < 4; ++k) {
        const __m256i w0 = load(codes + 64 * k), w1 = load(codes + 64 * k + 32);
        ROWS {
          const __m256i x = four(q + 2 * k + i * stride);
          add32(low[i], _mm256_madd_epi16(w0, x));
          add32(high[i], _mm256_madd_epi16(w1, x));
        }
      }
    }
    ROWS {
      keep(out + i * PANEL, low[i]);
      keep(out + i * PANEL + 8, high[i]);
    }
  }
}

// Sums up the parts of each group, `per_group` of them, and adds finished groups to the totals.
// OFFSET of the codes: 0, 8, or -1 for the group's zeros. ONE: a group is one part.
template <int R, int OFFSET, bool ONE>
__attribute__((noinline)) void add_up(const Tile& t, const Stretch& s, int64_t r,
                                      int64_t per_group) {
  const int64_t groups = t.job.w.groups, at = (t.row + r) * groups + s.group, count = s.groups;
  const float* xs = t.job.x.scale + at;
  const int32_t* xsum = t.job.x.sum + at;
  const int32_t* dots = t.s.dots;
  const float* ws = t.s.scales;
  const int32_t* zeros = t.s.zeros;
  float* const total = t.s.total + r * PANEL;
  __m256 sum[R][2];
  ROWS HALVES sum[i][h] = _mm256_load_ps(total + i * PANEL + 8 * h);
  for (int64_t g = 0; g < count; ++g, ws += PANEL, zeros += PANEL, ++xs, ++xsum) {
    const int32_t* const here = dots;
    dots += (ONE ? 1 : per_group) * R * PANEL;
    ROWS {
      __m256i off = _mm256_setzero_si256();
      if (OFFSET) off = _mm256_set1_epi32(xsum[i * groups]);
      if (OFFSET > 0) off = _mm256_slli_epi32(off, 3);
      const __m256 scale = _mm256_set1_ps(xs[i * groups]);
      HALVES {
        const int32_t* from = here + i * PANEL + 8 * h;
        __m256i dot = load(from);
        for (int64_t part = 1; !ONE && part < per_group; ++part)
          dot = _mm256_add_epi32(dot, load(from + part * R * PANEL));
        if (OFFSET > 0) dot = _mm256_sub_epi32(dot, off);
        if (OFFSET < 0) dot = _mm256_sub_epi32(dot, _mm256_mullo_epi32(load(zeros + 8 * h), off));
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale);
        sum[i][h] = _mm256_fmadd_ps(product, _mm256_load_ps(ws + 8 * h), sum[i][h]);
      }
    }
  }
  ROWS HALVES _mm256_store_ps(total + i * PANEL + 8 * h, sum[i][h]);
}

// The parts of a group that is longer than what is unpacked at once: kept until its end.
template <int R>
void add_unfinished(const Tile& t, const Stretch& s, int64_t r, int64_t per_group) {
  int32_t* const unfinished = t.s.unfinished + r * PANEL;
  for (int64_t o = 0; o < R * PANEL; o += 8) {
    __m256i dot = s.first ? _mm256_setzero_si256() : load(unfinished + o);
    for (int64_t part = 0; part < per_group; ++part)
      dot = _mm256_add_epi32(dot, load(t.s.dots + part * R * PANEL + o));
    keep(s.last ? t.s.dots + o : unfinished + o, dot);
  }
}

template <int R, int OFFSET>
void finish(const Tile& t, const Stretch& s, int64_t r, int64_t per_group) {
  if (s.first && s.last && per_group > 1) return add_up<R, OFFSET, false>(t, s, r, per_group);
  if (!s.first || !s.last) add_unfinished<R>(t, s, r, per_group);
  if (s.last) add_up<R, OFFSET, true>(t, s, r, 1);
}

template <int R>
void rows_of(const Tile& t, const Stretch& s, int64_t r) {
  const Layout& w = t.job.w;
  const int64_t stride = t.job.x.stride, from = (t.row + r) * stride + s.begin;
  if (w.bits == 8) {
    dots8<R>(t.s.codes, t.job.x.wide + from, stride, s.groups, s.count, t.s.dots);
    return finish<R, 0>(t, s, r, 1);
  }
  const int64_t part = w.group == 16 ? 16 : FLUSH, per_group = s.count / part;
  const int8_t* q = t.job.x.q + from;
  w.group == 16 ? dots4<R, 16>(t.s.codes, q, stride, s.groups, t.s.dots)
                : dots4<R, FLUSH>(t.s.codes, q, stride, s.groups * per_group, t.s.dots);
  w.has_zeros ? finish<R, -1>(t, s, r, per_group) : finish<R, 8>(t, s, r, per_group);
}

void all_rows(const Tile& t, const Stretch& s, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) rows_of<4>(t, s, r);
  switch (rows - r) {
    case 3: return rows_of<3>(t, s, r);
    case 2: return rows_of<2>(t, s, r);
    case 1: return rows_of<1>(t, s, r);
  }
}

// 64 bytes of int4 codes are 8 values of K: two times 64 bytes of u8.
void unpack4(const uint8_t* codes, int64_t count, uint8_t* to) {
  const __m256i low4 = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < count; k += 8, codes += 64, to += 128) {
    __builtin_prefetch(codes + NEAR_AHEAD);
    UNROLL for (int h = 0; h < 2; ++h) {
      const __m256i two = load(codes + 32 * h);
      __m256i* low = reinterpret_cast<__m256i*>(to + 32 * h);
      _mm256_store_si256(low, _mm256_and_si256(two, low4));
      _mm256_store_si256(low + 2, _mm256_and_si256(_mm256_srli_epi16(two, 4), low4));
    }
  }
}

// 64 bytes of int8 codes are 4 values of K: two times 64 bytes of i16.
void unpack8(const uint8_t* codes, int64_t count, uint8_t* to) {
  for (int64_t k = 0; k < count; k += 4, codes += 64, to += 128) {
    __builtin_prefetch(codes + NEAR_AHEAD);
    UNROLL for (int h = 0; h < 2; ++h) {
      const __m256i eight = load(codes + 32 * h);  // outputs with 4 values each
      const __m256i a = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(eight));
      const __m256i b = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(eight, 1));
      const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
      const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88));
      const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd));
      __m256i* low = reinterpret_cast<__m256i*>(to + 32 * h);
      _mm256_store_si256(low, _mm256_permute4x64_epi64(even, 0xd8));
      _mm256_store_si256(low + 2, _mm256_permute4x64_epi64(odd, 0xd8));
    }
  }
}

// Scales and zeros of the groups of a stretch, as they are multiplied.
void unpack_scales(const Tile& t, const Stretch& s) {
  const Layout& w = t.job.w;
  for (int64_t g = 0; g < s.groups; ++g) {
    UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t at = g * PANEL + 8 * h;
      _mm256_store_ps(t.s.scales + at, scales(w, t.base, s.group + g, h));
      if (w.has_zeros) keep(t.s.zeros + at, zeros(w, t.base, s.group + g, h));
    }
  }
}

void many_rows(const Job& job, int64_t panel, int64_t, int64_t row, int64_t rows,
               Tiling& scratch) {
  if (job.x.columns) return lanes_avx2(job, panel, row, rows, scratch);
  const Layout& w = job.w;
  const Tile t = {job, row, panel_of(job, panel), scratch};
  float* total = scratch.total;
  for (int64_t i = 0; i < rows * PANEL; i += 8) _mm256_store_ps(total + i, _mm256_setzero_ps());
  for (int64_t k = 0; k < w.padded_k;) {
    const int64_t count = next_block(w, k);
    const uint8_t* codes = t.base + w.codes_at + k * PANEL * w.bits / 8;
    const Stretch s = stretch_of(w, k, count);
    w.bits == 4 ? unpack4(codes, count, scratch.codes) : unpack8(codes, count, scratch.codes);
    unpack_scales(t, s);
    all_rows(t, s, rows);
    k += count;
  }
  for (int64_t r = 0; r < rows; ++r)
    store(job, panel, row + r, _mm256_load_ps(total + r * PANEL),
          _mm256_load_ps(total + r * PANEL + 8));
}

}  // namespace

// ---- activations

namespace {

inline uint32_t largest_of(__m256i x) {  // of eight that are not negative
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(m));
}

inline int32_t sum_of(__m256i x) {
  __m128i m = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

}  // namespace

void groups_zen(const Job& job, int64_t panel) {
  job.w.bits == 4 ? one_row4<true>(job, panel) : one_row8<false, true>(job, panel);
}

namespace {

// What divides by a number; quick ones as is_quick says.
template <bool QUICK>
struct Divide {
  __m256 s, minus, inverse;

  explicit Divide(float by)
      : s(_mm256_set1_ps(by)), minus(_mm256_set1_ps(-by)), inverse(_mm256_set1_ps(1.0f / by)) {}

  // Step by step for all four: a CPU looks no further ahead than that.
  void operator()(const float* from, __m256 (&q)[4]) const {
    __m256 x[4], rest[4];
    UNROLL for (int j = 0; j < 4; ++j) {
      x[j] = _mm256_loadu_ps(from + 8 * j);
      q[j] = QUICK ? _mm256_mul_ps(x[j], inverse) : _mm256_div_ps(x[j], s);
    }
    UNROLL for (int i = 0; QUICK && i < 2; ++i) {
      UNROLL for (int j = 0; j < 4; ++j) rest[j] = _mm256_fmadd_ps(q[j], minus, x[j]);
      UNROLL for (int j = 0; j < 4; ++j) q[j] = _mm256_fmadd_ps(rest[j], inverse, q[j]);
    }
  }
};

// A group from `begin` to `end`, of which there are numbers up to `real`; gives the sum of its codes.
template <bool QUICK>
inline int32_t round_group(const float* x, int64_t begin, int64_t end, int64_t real, float s, int add,
                           int8_t* q) {
  const Divide<QUICK> divided(s);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i least_q = _mm256_set1_epi8(-127), ones8 = _mm256_set1_epi8(1);
  const __m256i ones16 = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(char(add));
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = begin; i < end; i += 32) {  // groups are multiples of 16; the other half is dropped
    const int64_t here = least(32, end - i);
    alignas(32) float tail[32];
    const float* from = x + i;
    if (i + 32 > real || here < 32) {
      for (int64_t j = 0; j < 32; ++j) tail[j] = i + j < real ? x[i + j] : 0.0f;
      from = tail;
    }
    __m256 quotients[4];
    __m256i parts32[4];
    divided(from, quotients);
    UNROLL for (int j = 0; j < 4; ++j) parts32[j] = _mm256_cvtps_epi32(quotients[j]);
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(parts32[0], parts32[1]),
                                       _mm256_packs_epi32(parts32[2], parts32[3]));
    bytes = _mm256_max_epi8(_mm256_permutevar8x32_epi32(bytes, in_order), least_q);
    const __m256i stored = _mm256_xor_si256(bytes, flip);
    if (here == 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), stored);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm256_castsi256_si128(stored));
      bytes = _mm256_permute2x128_si256(bytes, bytes, 0x80);  // the upper half is not ours
    }
    total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, bytes), ones16));
  }
  return sum_of(total);
}

}  // namespace

void quantize_avx2(const float* x, const Layout& w, int add, int8_t* q, float* scale, int32_t* sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group, end = begin + w.group, real = least(end, w.k);
    int64_t i = begin;
    __m256i largest8 = _mm256_setzero_si256();  // as bits: a NaN is above all numbers
    for (; i + 8 <= real; i += 8)
      largest8 = _mm256_max_epi32(largest8, _mm256_and_si256(load(x + i), magnitude));
    uint32_t largest = largest_of(largest8);
    for (; i < real; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float absmax;
    __builtin_memcpy(&absmax, &largest, 4);
    float s = absmax / 127.0f;
    if (s == 0.0f) s = 1.0f;
    scale[g] = s;
    sum[g] = is_quick(s) ? round_group<true>(x, begin, end, real, s, add, q)
                         : round_group<false>(x, begin, end, real, s, add, q);
  }
}

namespace {

// Step by step for R times 8 numbers: a CPU looks no further ahead than that.
template <int R>
inline void gelu_of(const float* from, float* to) {
  const __m256 end = _mm256_set1_ps(GELU_END), begin = _mm256_set1_ps(-GELU_END);
  __m256 near[R], u[R], p[R];
  ROWS {
    near[i] = _mm256_max_ps(_mm256_min_ps(_mm256_loadu_ps(from + 8 * i), end), begin);
    u[i] = _mm256_fmadd_ps(_mm256_mul_ps(near[i], near[i]), _mm256_set1_ps(GELU_STRETCH),
                           _mm256_set1_ps(-1.0f));
    p[i] = _mm256_set1_ps(GELU[0]);
  }
  _Pragma("GCC unroll 16") for (int j = 1; j < GELU_COUNT; ++j)
    ROWS p[i] = _mm256_fmadd_ps(p[i], u[i], _mm256_set1_ps(GELU[j]));
  ROWS {
    const __m256 x = _mm256_loadu_ps(from + 8 * i);
    const __m256 share = _mm256_fmadd_ps(near[i], p[i], _mm256_set1_ps(0.5f));
    const __m256 some = _mm256_and_ps(share, _mm256_cmp_ps(x, begin, _CMP_GT_OQ));
    _mm256_storeu_ps(to + 8 * i, _mm256_mul_ps(x, some));
  }
}

}  // namespace

void gelu_avx2(const float* x, int64_t k, float* y) {
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) gelu_of<4>(x + i, y + i);
  for (; i < k; i += 8) {
    float some[8] = {};
    const size_t bytes = size_t(least(8, k - i)) * sizeof(float);
    __builtin_memcpy(some, x + i, bytes);
    gelu_of<1>(some, some);
    __builtin_memcpy(y + i, some, bytes);
  }
}

void norm_avx2(const Norm& job, int64_t row) { norm_row(job, row); }

extern const Path avx2_path = {"avx2", true, 0, 1, 0, 0, nullptr, turn_avx2, quantize_avx2,
                               gelu_avx2, norm_avx2, one_row, many_rows};

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
