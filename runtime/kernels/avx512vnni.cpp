// The path of CPUs with AVX-512 (F, BW, VL) and VNNI.
//
// dpbusd multiplies u8 by s8, adds four products into int32 and never saturates. Codes are the u8:
// int4 as they are, int8 with 128 added; what that adds is taken away by the sum of the group's x.
#if defined(DFC_SIMDE)
#include "emulated.h"
#elif defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
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

inline __m512i four(const int8_t* q) {  // 4 values of x for each of 16 outputs
  int32_t bits;
  __builtin_memcpy(&bits, q, 4);
  return _mm512_set1_epi32(bits);
}

inline __m512 scales(const Layout& w, const uint8_t* panel, int64_t g) {
  const int64_t at = g * PANEL;
  if (!w.half_scales) return _mm512_loadu_ps(reinterpret_cast<const float*>(panel) + at);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + at * 2));
  return _mm512_cvtph_ps(half);
}

// What to take from the dot products, for the offset of the codes.
inline __m512i offset(const Layout& w, const uint8_t* panel, int64_t g, int32_t xsum) {
  if (!w.has_zeros) return _mm512_set1_epi32((w.bits == 4 ? 8 : 128) * xsum);
  const uint8_t* z = panel + w.zeros_at + g * PANEL;
  const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(z)));
  return _mm512_mullo_epi32(zero, _mm512_set1_epi32(xsum));
}

inline __m512 add_group(__m512i dot, float xs, __m512 ws, __m512 total) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(xs)), ws, total);
}

void store(const Job& job, int64_t panel, int64_t row, __m512 total) {
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

// ---- one row: every weight is read once, so reading is what counts

void one_row4(const Job& job, int64_t panel) {
  const Layout& w = job.w;
  const uint8_t* base = panel_of(job, panel);
  const uint8_t *codes = base + w.codes_at, *ahead = ahead_of(base, w, 0);
  const int8_t* q = job.x.q;
  const __m512i low4 = _mm512_set1_epi8(15);
  __m512 total = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i dot0 = _mm512_setzero_si512(), dot1 = _mm512_setzero_si512();
    for (int64_t step = 0; step < w.group / 8; ++step, codes += 64, q += 8) {
      fetch(ahead);
      ahead += 64;
      const __m512i two = load(codes);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(two, 4), low4);
      dot0 = _mm512_dpbusd_epi32(dot0, _mm512_and_si512(two, low4), four(q));
      dot1 = _mm512_dpbusd_epi32(dot1, high, four(q + 4));
    }
    fetch(ahead);
    ahead = ahead_of(base, w, g + 1);
    const __m512i dot =
        _mm512_sub_epi32(_mm512_add_epi32(dot0, dot1), offset(w, base, g, job.x.sum[g]));
    total = add_group(dot, job.x.scale[g], scales(w, base, g), total);
  }
  store(job, panel, 0, total);
}

void one_row8(const Job& job, int64_t panel) {
  const Layout& w = job.w;
  const uint8_t* base = panel_of(job, panel);
  const uint8_t *codes = base + w.codes_at, *ahead = ahead_of(base, w, 0);
  const int8_t* q = job.x.q;
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512 total = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i dot0 = _mm512_setzero_si512(), dot1 = _mm512_setzero_si512();
    for (int64_t step = 0; step < w.group / 8; ++step, codes += 128, q += 8) {
      fetch(ahead);
      fetch(ahead + 64);
      ahead += 128;
      dot0 = _mm512_dpbusd_epi32(dot0, _mm512_xor_si512(load(codes), flip), four(q));
      dot1 = _mm512_dpbusd_epi32(dot1, _mm512_xor_si512(load(codes + 64), flip), four(q + 4));
    }
    fetch(ahead);
    ahead = ahead_of(base, w, g + 1);
    const __m512i dot =
        _mm512_sub_epi32(_mm512_add_epi32(dot0, dot1), offset(w, base, g, job.x.sum[g]));
    total = add_group(dot, job.x.scale[g], scales(w, base, g), total);
  }
  store(job, panel, 0, total);
}

void one_row(const Job& job, int64_t panel) {
  job.w.bits == 4 ? one_row4(job, panel) : one_row8(job, panel);
}

// ---- many rows: codes are unpacked once for all rows of a tile

// Some whole groups, or a part of one that is longer than what is unpacked at once.
struct Stretch {
  int64_t group, groups;  // which, and how many
  int64_t begin, count;   // values of K: where, and how many of each group
  bool first, last;       // of a group
};

struct Tile {
  const Job& job;
  int64_t row;
  float* total;  // [rows][16]
  int32_t* dot;  // [rows][16], of a group that is not finished
  const uint8_t* base;
};

template <int R>
inline void finish(const Tile& t, int64_t group, int64_t r, const __m512i (&dot)[R]) {
  const Layout& w = t.job.w;
  const __m512 ws = scales(w, t.base, group);
  UNROLL for (int i = 0; i < R; ++i) {
    const int64_t at = (t.row + r + i) * w.groups + group;
    float* total = t.total + (r + i) * PANEL;
    const __m512i d = _mm512_sub_epi32(dot[i], offset(w, t.base, group, t.job.x.sum[at]));
    _mm512_store_ps(total, add_group(d, t.job.x.scale[at], ws, _mm512_load_ps(total)));
  }
}

// codes: u8 [K / 4][16][4].
template <int R>
void rows_of(const Tile& t, const Stretch& s, int64_t r, const uint8_t* codes) {
  const int64_t stride = t.job.x.stride;
  const int8_t* q = t.job.x.q + (t.row + r) * stride + s.begin;
  for (int64_t g = 0; g < s.groups; ++g) {
    __m512i dot[R];
    UNROLL for (int i = 0; i < R; ++i)
      dot[i] = s.first ? _mm512_setzero_si512() : load(t.dot + (r + i) * PANEL);
    for (int64_t k = 0; k < s.count; k += 4, codes += 64, q += 4) {
      const __m512i weight = load(codes);
      UNROLL for (int i = 0; i < R; ++i)
        dot[i] = _mm512_dpbusd_epi32(dot[i], weight, four(q + i * stride));
    }
    if (s.last) {
      finish<R>(t, s.group + g, r, dot);
      continue;
    }
    UNROLL for (int i = 0; i < R; ++i) _mm512_store_si512(t.dot + (r + i) * PANEL, dot[i]);
  }
}

void all_rows(const Tile& t, const Stretch& s, int64_t rows, const uint8_t* codes) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) rows_of<8>(t, s, r, codes);
  for (; r + 4 <= rows; r += 4) rows_of<4>(t, s, r, codes);
  for (; r < rows; ++r) rows_of<1>(t, s, r, codes);
}

// To u8 [count / 4][16][4].
void unpack(int bits, const uint8_t* codes, int64_t count, uint8_t* to) {
  const __m512i low4 = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128);
  const int64_t bytes = count * PANEL * bits / 8;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(codes + i + NEAR_AHEAD);
    const __m512i from = load(codes + i);
    if (bits == 8) {
      _mm512_store_si512(to + i, _mm512_xor_si512(from, flip));
    } else {
      _mm512_store_si512(to + 2 * i, _mm512_and_si512(from, low4));
      _mm512_store_si512(to + 2 * i + 64, _mm512_and_si512(_mm512_srli_epi16(from, 4), low4));
    }
  }
}

// What is unpacked at once, as stretches of whole groups or of parts of one.
void one_block(const Tile& t, int64_t k, int64_t count, int64_t rows, const uint8_t* bytes) {
  const Layout& w = t.job.w;
  const int64_t g = k / w.group;
  if (count >= w.group)
    return all_rows(t, {g, count / w.group, k, w.group, true, true}, rows, bytes);
  const bool last = k + count == (g + 1) * w.group;
  all_rows(t, {g, 1, k, count, k == g * w.group, last}, rows, bytes);
}

void many_rows(const Job& job, int64_t panel, int64_t row, int64_t rows, Tiling& scratch) {
  const Layout& w = job.w;
  float* total = scratch.total;
  const Tile t = {job, row, total, scratch.unfinished, panel_of(job, panel)};
  for (int64_t i = 0; i < rows * PANEL; i += 16) _mm512_store_ps(total + i, _mm512_setzero_ps());
  for (int64_t k = 0; k < w.padded_k;) {
    const int64_t count = next_block(w, k);
    unpack(w.bits, t.base + w.codes_at + k * PANEL * w.bits / 8, count, scratch.codes);
    one_block(t, k, count, rows, scratch.codes);
    k += count;
  }
  for (int64_t r = 0; r < rows; ++r)
    store(job, panel, row + r, _mm512_load_ps(total + r * PANEL));
}

}  // namespace

extern const Path avx512vnni_path = {"avx512vnni", false, nullptr, quantize_avx2, one_row, many_rows};

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
