// What the paths of CPUs with AVX-512 share. Included first: it says which instructions the functions
// that follow may use. Everything is local to the file that includes it.
#pragma once

#if defined(DFC_SIMDE)
#include "emulated.h"
#if defined(DFC_TILES)
#include "emulated_tiles.h"
#endif
#elif defined(__x86_64__)
#if defined(__clang__) && defined(DFC_TILES)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#elif defined(DFC_TILES)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

#define UNROLL _Pragma("GCC unroll 16")

namespace dfc {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

inline __m512i four(const void* q) {  // 4 values of x for each of 16 outputs
  int32_t bits;
  __builtin_memcpy(&bits, q, 4);
  return _mm512_set1_epi32(bits);
}

template <bool HALF>
inline __m512 scales(const uint8_t* panel, int64_t g) {
  const int64_t at = g * PANEL;
  if (!HALF) return _mm512_loadu_ps(reinterpret_cast<const float*>(panel) + at);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + at * 2));
  return _mm512_cvtph_ps(half);
}

inline __m512i zeros(const Layout& w, const uint8_t* panel, int64_t g) {
  const uint8_t* z = panel + w.zeros_at + g * PANEL;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(z)));
}

inline __m512 add_group(__m512i dot, float xs, __m512 ws, __m512 total) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(xs)), ws, total);
}

inline void store(const Job& job, int64_t panel, int64_t row, __m512 total) {
  const int64_t first = panel * PANEL, count = least(PANEL, job.w.n - first);
  float* y = job.y + row * job.w.n + first;
  alignas(64) float out[PANEL];
  if (count == PANEL) {
    if (job.bias) total = _mm512_add_ps(total, _mm512_loadu_ps(job.bias + first));
    return _mm512_storeu_ps(y, total);
  }
  _mm512_store_ps(out, total);
  for (int64_t o = 0; o < count; ++o) y[o] = job.bias ? out[o] + job.bias[first + o] : out[o];
}

}  // namespace
}  // namespace dfc

#endif
