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

// ---- many rows: of one panel or two, whose codes are unpacked once for all rows of a tile

constexpr int64_t WIDE = PANEL * TILE_PANELS;  // from row to row of totals and dot products

struct Tile {
  const Job& job;
  int64_t panel, panels, row, rows;
  Tiling& s;
};

// Codes s8 [K / 4][16][4] without offsets; those of a second panel are `apart` bytes further on.
struct Codes {
  const uint8_t* at;
  int64_t apart;
};

// int4 codes of a stretch, to s8.
inline void unpack4(const Layout& w, const uint8_t* panel, const Stretch& s, uint8_t* to) {
  const __m512i low4 = _mm512_set1_epi8(15), each_byte = _mm512_set1_epi32(0x01010101);
  const uint8_t* codes = panel + w.codes_at + s.begin * PANEL / 2;
  for (int64_t g = 0; g < s.groups; ++g) {
    __m512i zero = _mm512_set1_epi8(8);
    if (w.has_zeros) zero = _mm512_mullo_epi32(zeros(w, panel, s.group + g), each_byte);
    for (int64_t k = 0; k < s.count; k += 8, codes += 64, to += 128) {
      __builtin_prefetch(codes + NEAR_AHEAD);
      const __m512i two = load(codes);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(two, 4), low4);
      _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(two, low4), zero));
      _mm512_store_si512(to + 64, _mm512_sub_epi8(high, zero));
    }
  }
}

// The codes of a stretch: int8 is what it should be where it lies.
inline Codes codes_of(const Tile& t, const Stretch& s) {
  const Layout& w = t.job.w;
  if (w.bits == 8) return {panel_of(t.job, t.panel) + w.codes_at + s.begin * PANEL, w.panel_bytes};
  constexpr int64_t apart = TILE_K * PANEL;
  for (int64_t p = 0; p < t.panels; ++p)
    unpack4(w, panel_of(t.job, t.panel + p), s, t.s.codes + p * apart);
  return {t.s.codes, apart};
}

// The scales of a stretch: f32 [groups][2][16].
inline void take_scales(const Tile& t, const Stretch& s) {
  for (int64_t p = 0; p < t.panels; ++p) {
    const uint8_t* panel = panel_of(t.job, t.panel + p);
    float* to = t.s.scales + p * PANEL;
    for (int64_t g = s.group; g < s.group + s.groups; ++g, to += WIDE)
      _mm512_store_ps(to, t.job.w.half_scales ? scales<true>(panel, g) : scales<false>(panel, g));
  }
}

inline void store_totals(const Tile& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t p = 0; p < t.panels; ++p)
      store(t.job, t.panel + p, t.row + r, _mm512_load_ps(t.s.total + r * WIDE + p * PANEL));
}

}  // namespace
}  // namespace dfc

#endif
