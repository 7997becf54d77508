// The path of CPUs with AVX-512 (F, BW, VL) and VNNI.
//
// dpbusd multiplies u8 by s8, adds four products into int32 and never saturates. For one row, codes
// are the u8: int4 as they are, int8 with 128 added, and what that adds is taken away by the sum of
// the group's x. For many, x + 128 is the u8: what that adds is the same for all rows, and sums
// begin with it.
#if !defined(DFC_AHEAD)  // measured on Zen 4: nearer than on AVX2, and to the first cache
#define DFC_AHEAD 4096
#define DFC_CACHE 3
#endif
#include "avx512.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

namespace dfc {
namespace {

// ---- one row: every weight is read once, so reading is what counts

// int4 codes of 8 values of K for 16 outputs. The high ones stay 16 times what they are, which
// saves a shift each: of at most 65536 products of 240 and 127 the sum is below 2^31.
inline void step4(const uint8_t* codes, const int8_t* q, __m512i& low, __m512i& high) {
  __m512i two = load(codes);
#if !defined(DFC_SIMDE)
  __asm__("" : "+v"(two));  // else it is read twice
#endif
  low = _mm512_dpbusd_epi32(low, _mm512_and_si512(two, _mm512_set1_epi8(15)), four(q));
  high = _mm512_dpbusd_epi32(high, _mm512_and_si512(two, _mm512_set1_epi8(-16)), four(q + 4));
}

inline void step8(const uint8_t* codes, const int8_t* q, __m512i& low, __m512i& high) {
  const __m512i flip = _mm512_set1_epi8(-128);
  low = _mm512_dpbusd_epi32(low, _mm512_xor_si512(load(codes), flip), four(q));
  high = _mm512_dpbusd_epi32(high, _mm512_xor_si512(load(codes + 64), flip), four(q + 4));
}

// What the offset of the codes adds to a sum of products.
template <int BITS, bool ZEROS>
inline __m512i offset(const Layout& w, const uint8_t* panel, int64_t g, const int32_t* xsum) {
  const __m512i sum = _mm512_set1_epi32(*xsum);
  if (ZEROS) return _mm512_mullo_epi32(zeros(w, panel, g), sum);
  return _mm512_slli_epi32(sum, BITS == 4 ? 3 : 7);
}

// PART: values of K that are multiplied without a branch; groups are multiples of it. ONE: one group
// of int8, and so nothing but codes to be read: the CPU then reads ahead by itself, and told to it
// gave a quarter less.
template <int BITS, int PART, bool HALF, bool ZEROS, bool ONE>
void one_row(const Job& job, int64_t panel) {
  constexpr int64_t STEP = BITS * 16;  // bytes for 8 values of K
  const Layout w = job.w;
  const uint8_t* const base = panel_of(job, panel);
  const uint8_t *codes = base + w.codes_at, *ahead = ahead_of(base, w, 0);
  const int8_t* q = job.x.q;
  const float* xs = job.x.scale;
  const int32_t* xsum = job.x.sum;
  __m512 total = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.group; k += PART) {
      UNROLL for (int step = 0; step < PART / 8; ++step, codes += STEP, q += 8) {
        UNROLL for (int64_t line = 0; line < STEP; line += 64, ahead += 64)
          if (!ONE) fetch(ahead);
        BITS == 4 ? step4(codes, q, low, high) : step8(codes, q, low, high);
      }
    }
    if (!ONE) fetch(ahead);
    ahead = ahead_of(base, w, g + 1);
    if (BITS == 4) high = _mm512_srai_epi32(high, 4);
    const __m512i added = offset<BITS, ZEROS>(w, base, g, xsum + g);
    const __m512i dot = _mm512_sub_epi32(_mm512_add_epi32(low, high), added);
    total = add_group(dot, xs[g], scales<HALF>(base, g), total);
  }
  store(job, panel, 0, total);
}

template <int BITS, int PART>
void one_row(const Job& job, int64_t panel) {
  const bool half = job.w.half_scales;
  if (BITS == 4 && job.w.has_zeros)
    return half ? one_row<BITS, PART, true, BITS == 4, false>(job, panel)
                : one_row<BITS, PART, false, BITS == 4, false>(job, panel);
  if (BITS == 8 && job.w.groups == 1)
    return half ? one_row<BITS, PART, true, false, BITS == 8>(job, panel)
                : one_row<BITS, PART, false, false, BITS == 8>(job, panel);
  half ? one_row<BITS, PART, true, false, false>(job, panel)
       : one_row<BITS, PART, false, false, false>(job, panel);
}

void one_row(const Job& job, int64_t panel) {
  const bool wide = job.w.group > 16;
  if (job.w.bits == 4) return wide ? one_row<4, 32>(job, panel) : one_row<4, 16>(job, panel);
  wide ? one_row<8, 32>(job, panel) : one_row<8, 16>(job, panel);
}

// ---- many rows

// 12 rows that lie side by side. Why: three pointers reach them with what an address adds up by
// itself; the compiler would take a register for each row, and there are not so many.
template <class T>
struct Rows12 {
  const T *a, *b, *c;
  int64_t stride;

  Rows12(const T* first, int64_t stride)
      : a(first), b(a + 4 * stride), c(b + 4 * stride), stride(stride) {
#if !defined(DFC_SIMDE)
    __asm__("" : "+r"(b));
    __asm__("" : "+r"(c));
#endif
  }
  const T* at(int i) const { return (i < 4 ? a : i < 8 ? b : c) + i % 4 * stride; }
  void advance(int64_t by) { a += by, b += by, c += by; }
};

// Adds the products of R rows and P panels, for `count` values of K: a multiple of 16.
template <int R, int P>
inline void multiply(Rows12<int8_t>& q, const uint8_t*& codes, int64_t apart, int64_t count,
                     __m512i (&dot)[R][P]) {
  for (const uint8_t* const end = codes + count * PANEL; codes < end; codes += 256, q.advance(16)) {
    UNROLL for (int k = 0; k < 16; k += 4) {
      __m512i weight[P];
      UNROLL for (int p = 0; p < P; ++p) weight[p] = load(codes + k * PANEL + p * apart);
      UNROLL for (int i = 0; i < R; ++i) {
        const __m512i x = four(q.at(i) + k);
        UNROLL for (int p = 0; p < P; ++p) dot[i][p] = _mm512_dpbusd_epi32(dot[i][p], x, weight[p]);
      }
    }
  }
}

template <int R, int P>
__attribute__((noinline)) void rows_of(const Tile& t, const Stretch& s, int64_t r, Codes codes) {
  const int64_t groups = t.job.w.groups, stride = t.job.x.stride, count = s.count;
  Rows12<int8_t> q(t.job.x.q + (t.row + r) * stride + s.begin, stride);
  Rows12<float> xs(t.job.x.scale + (t.row + r) * groups + s.group, groups);
  const float* ws = t.s.scales;
  const int32_t* start = t.s.zeros;
  float* const total = t.s.total + r * WIDE;
  int32_t* const unfinished = t.s.unfinished + r * WIDE;
  for (int64_t g = 0; g < s.groups; ++g, ws += WIDE, start += WIDE, xs.advance(1)) {
    __m512i dot[R][P];
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int p = 0; p < P; ++p)
      dot[i][p] = load(start + p * PANEL);
    if (!s.first)
      UNROLL for (int i = 0; i < R; ++i) UNROLL for (int p = 0; p < P; ++p)
        dot[i][p] = _mm512_add_epi32(dot[i][p], load(unfinished + i * WIDE + p * PANEL));
    multiply<R, P>(q, codes.at, codes.apart, count, dot);
    if (!s.last) {
      UNROLL for (int i = 0; i < R; ++i) UNROLL for (int p = 0; p < P; ++p)
        _mm512_store_si512(unfinished + i * WIDE + p * PANEL, dot[i][p]);
      continue;
    }
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int p = 0; p < P; ++p) {
      float* const sum = total + i * WIDE + p * PANEL;
      const __m512 scale = _mm512_load_ps(ws + p * PANEL);
      _mm512_store_ps(sum, add_group(dot[i][p], *xs.at(i), scale, _mm512_load_ps(sum)));
    }
  }
}

template <int P>
void all_rows(const Tile& t, const Stretch& s, Codes codes) {
  int64_t r = 0;
  for (; r + 12 <= t.rows; r += 12) rows_of<12, P>(t, s, r, codes);
  if (r + 8 <= t.rows) rows_of<8, P>(t, s, r, codes), r += 8;
  if (r + 4 <= t.rows) rows_of<4, P>(t, s, r, codes), r += 4;
  switch (t.rows - r) {
    case 3: return rows_of<3, P>(t, s, r, codes);
    case 2: return rows_of<2, P>(t, s, r, codes);
    case 1: return rows_of<1, P>(t, s, r, codes);
  }
}

// What the sums of each group begin with: -128 times the sum of its codes, to i32 [groups][2][16].
void take_starts(const Tile& t, const Stretch& s, Codes codes) {
  const __m512i one = _mm512_set1_epi8(-128);  // 128 as u8
  for (int64_t p = 0; p < t.panels; ++p) {
    const uint8_t* at = codes.at + p * codes.apart;
    int32_t* to = t.s.zeros + p * PANEL;
    for (int64_t g = 0; g < s.groups; ++g, to += WIDE) {
      __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t k = 0; k < s.count; k += 8, at += 128)
        UNROLL for (int i = 0; i < 2; ++i) {
          if (t.job.w.bits == 8) __builtin_prefetch(at + 64 * i + NEAR_AHEAD);
          sum[i] = _mm512_dpbusd_epi32(sum[i], one, load(at + 64 * i));
        }
      const __m512i both = _mm512_add_epi32(sum[0], sum[1]);
      _mm512_store_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), both));
    }
  }
}

void many_rows(const Job& job, int64_t panel, int64_t panels, int64_t row, int64_t rows,
               Tiling& scratch) {
  const Layout& w = job.w;
  const Tile t = {job, panel, panels, row, rows, scratch};
  begin_totals(t);
  for (int64_t k = 0; k < w.padded_k;) {
    const int64_t count = next_block(w, k);
    const Stretch s = stretch_of(w, k, count);
    const Codes codes = codes_of(t, s);
    take_scales(t, s);
    take_starts(t, s, codes);
    panels == 1 ? all_rows<1>(t, s, codes) : all_rows<2>(t, s, codes);
    k += count;
  }
  store_totals(t);
}

}  // namespace

extern const Path avx512vnni_path = {"avx512vnni", false, true, TILE_PANELS, 0, 0, nullptr, nullptr,
                                     quantize_avx2, one_row, many_rows};

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
