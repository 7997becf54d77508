// What the files of the path of CPUs with AVX2, FMA and F16C share. Included first: it says which
// instructions the functions that follow may use. Everything is local to the file that includes it.
#pragma once

#if defined(DFC_SIMDE)
#include "emulated.h"
#elif defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

#define UNROLL _Pragma("GCC unroll 8")
#define ROWS _Pragma("GCC unroll 4") for (int i = 0; i < R; ++i)
#define HALVES _Pragma("GCC unroll 2") for (int h = 0; h < 2; ++h)

namespace dfc {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i four(const void* q) {  // the same 4 bytes of x for each of 8 outputs
  int32_t bits;
  __builtin_memcpy(&bits, q, 4);
  return _mm256_set1_epi32(bits);
}

inline __m256 scales(const Layout& w, const uint8_t* panel, int64_t g, int half) {
  const int64_t at = g * PANEL + half * 8;
  if (w.half_scales)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + at * 2)));
  return _mm256_loadu_ps(reinterpret_cast<const float*>(panel) + at);
}

inline __m256i zeros(const Layout& w, const uint8_t* panel, int64_t g, int half) {
  const uint8_t* z = panel + w.zeros_at + g * PANEL + half * 8;
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(z)));
}

inline __m256 add_group(__m256i dot, float xs, __m256 ws, __m256 total) {
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(xs)), ws, total);
}

inline void store(const Job& job, int64_t panel, int64_t row, __m256 low, __m256 high) {
  const int64_t first = panel * PANEL, count = least(PANEL, job.w.n - first);
  float* y = job.y + row * job.w.n + first;
  alignas(32) float out[PANEL];
  if (count == PANEL) {
    if (job.bias) {
      low = _mm256_add_ps(low, _mm256_loadu_ps(job.bias + first));
      high = _mm256_add_ps(high, _mm256_loadu_ps(job.bias + first + 8));
    }
    _mm256_storeu_ps(y, low);
    _mm256_storeu_ps(y + 8, high);
    return;
  }
  _mm256_store_ps(out, low);
  _mm256_store_ps(out + 8, high);
  for (int64_t o = 0; o < count; ++o) y[o] = job.bias ? out[o] + job.bias[first + o] : out[o];
}

// A value that stays in a register. The compiler would rather read it twice.
inline __m256i once(__m256i x) {
#if !defined(DFC_SIMDE)
  __asm__("" : "+x"(x));
#endif
  return x;
}

// Sums that stay in their registers. Left alone, the compiler turns a row of sums into a tree, or
// copies them around: both take registers that are not there, and then sums go through memory.
inline void add16(__m256i& sum, __m256i x) {
#if defined(DFC_SIMDE)
  sum = _mm256_add_epi16(sum, x);
#else
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
#endif
}

inline void add32(__m256i& sum, __m256i x) {
#if defined(DFC_SIMDE)
  sum = _mm256_add_epi32(sum, x);
#else
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
#endif
}

inline void keep(int32_t* to, __m256i dot) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), dot);
}

}  // namespace
}  // namespace dfc

#endif
