// What AVX-512 does to a row before it is multiplied: GELU, and rounding to int8.
#include "avx512.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

namespace dfc {
namespace {

#define FOUR UNROLL for (int i = 0; i < 4; ++i)

// All steps of all four side by side: a CPU looks no further ahead than that.
inline void gelu_of_64(const float* from, float* to) {
  const __m512 end = _mm512_set1_ps(GELU_END), begin = _mm512_set1_ps(-GELU_END);
  __m512 near[4], u[4], p[4];
  FOUR {
    near[i] = _mm512_max_ps(_mm512_min_ps(_mm512_loadu_ps(from + 16 * i), end), begin);
    u[i] = _mm512_fmadd_ps(_mm512_mul_ps(near[i], near[i]), _mm512_set1_ps(GELU_STRETCH),
                           _mm512_set1_ps(-1.0f));
    p[i] = _mm512_set1_ps(GELU[0]);
  }
  UNROLL for (int j = 1; j < GELU_COUNT; ++j)
    FOUR p[i] = _mm512_fmadd_ps(p[i], u[i], _mm512_set1_ps(GELU[j]));
  FOUR {
    const __m512 x = _mm512_loadu_ps(from + 16 * i);
    const __m512 share = _mm512_fmadd_ps(near[i], p[i], _mm512_set1_ps(0.5f));
    const auto above = _mm512_cmp_ps_mask(x, begin, _CMP_GT_OQ);
    _mm512_storeu_ps(to + 16 * i, _mm512_mul_ps(x, _mm512_maskz_mov_ps(above, share)));
  }
}

template <bool QUICK>
inline void divide_64(const float* from, float s, __m512 (&q)[4]) {
  const __m512 minus = _mm512_set1_ps(-s), inverse = _mm512_set1_ps(1.0f / s);
  __m512 x[4], rest[4];
  FOUR {
    x[i] = _mm512_loadu_ps(from + 16 * i);
    q[i] = QUICK ? _mm512_mul_ps(x[i], inverse) : _mm512_div_ps(x[i], _mm512_set1_ps(s));
  }
  UNROLL for (int again = 0; QUICK && again < 2; ++again) {
    FOUR rest[i] = _mm512_fmadd_ps(q[i], minus, x[i]);
    FOUR q[i] = _mm512_fmadd_ps(rest[i], inverse, q[i]);
  }
}

// Codes of `count` numbers, and 0 up to `padded` or a little more; gives their sum.
template <bool QUICK>
int32_t round_row(const float* x, int64_t count, int64_t padded, float s, int add, int8_t* q) {
  const __m512i in_order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i least_q = _mm512_set1_epi8(-127), flip = _mm512_set1_epi8(char(add));
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = 0; k < padded; k += 64) {
    alignas(64) float tail[64];
    const float* from = x + k;
    if (k + 64 > count) {
      for (int64_t j = 0; j < 64; ++j) tail[j] = k + j < count ? x[k + j] : 0.0f;
      from = tail;
    }
    __m512 quotient[4];
    __m512i part[4];
    divide_64<QUICK>(from, s, quotient);
    FOUR part[i] = _mm512_cvtps_epi32(quotient[i]);
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(part[0], part[1]),
                                       _mm512_packs_epi32(part[2], part[3]));
    codes = _mm512_max_epi8(_mm512_permutexvar_epi32(in_order, codes), least_q);
    _mm512_storeu_si512(q + k, _mm512_xor_si512(codes, flip));
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), codes);
  }
  alignas(64) int32_t sums[16];
  _mm512_store_si512(sums, total);
  int32_t sum = 0;
  for (int32_t part : sums) sum += part;
  return sum;
}

inline __m512i magnitude(const float* x) {
  return _mm512_and_si512(load(x), _mm512_set1_epi32(0x7fffffff));
}

// The largest magnitude as bits: a NaN is above all numbers.
float largest_of(const float* x, int64_t count) {
  __m512i most[4];
  FOUR most[i] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= count; k += 64)
    FOUR most[i] = _mm512_max_epi32(most[i], magnitude(x + k + 16 * i));
  alignas(64) float tail[64] = {};
  __builtin_memcpy(tail, x + k, size_t(count - k) * sizeof(float));
  FOUR most[i] = _mm512_max_epi32(most[i], magnitude(tail + 16 * i));
  const __m512i all =
      _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, all);
  int32_t found = 0;
  for (int32_t lane : lanes) found = lane > found ? lane : found;
  float largest;
  __builtin_memcpy(&largest, &found, 4);
  return largest;
}

}  // namespace

void gelu_avx512(const float* x, int64_t k, float* y) {
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) gelu_of_64(x + i, y + i);
  if (i == k) return;
  alignas(64) float some[64] = {};
  const size_t bytes = size_t(k - i) * sizeof(float);
  __builtin_memcpy(some, x + i, bytes);
  gelu_of_64(some, some);
  __builtin_memcpy(y + i, some, bytes);
}

void quantize_avx512(const float* x, const Layout& w, int add, int8_t* q, float* scale,
                     int32_t* sum) {
  if (w.groups > 1) return quantize_avx2(x, w, add, q, scale, sum);  // short ones fill no 64
  float s = largest_of(x, w.k) / 127.0f;
  if (s == 0.0f) s = 1.0f;
  *scale = s;
  const auto round = is_quick(s) ? round_row<true> : round_row<false>;
  *sum = round(x, w.k, w.padded_k, s, add, q);
}

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
