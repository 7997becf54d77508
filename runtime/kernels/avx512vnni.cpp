// The path of CPUs with AVX-512 (F, BW, VL) and VNNI.
//
// dpbusd multiplies u8 by s8, adds four products into int32 and never saturates. Codes are the u8: int4
// as they are, int8 with 128 added, and what that adds is taken away by the sum of the group's x. Of
// many rows of int8 with one scale an output, x + 128 is the u8: what that adds is the same for all
// rows, and sums begin with it.
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

// PART: values of K that are multiplied without a branch; groups are multiples of it. SUMS: that take
// turns: each waits four cycles for the one before. ONE: one group of int8, and so nothing but codes
// to be read: the CPU then reads ahead by itself, and told to it gave a quarter less.
template <int BITS, int PART, int SUMS, bool HALF, bool ZEROS, bool ONE>
void one_row(const Job& job, int64_t panel) {
  constexpr int64_t STEP = BITS * 16;  // bytes for 8 values of K
  const Layout w = job.w;
  const uint8_t* const base = panel_of(job, panel);
  const uint8_t *codes = base + w.codes_at, *group_ahead = ahead_of(base, w, AHEAD);
  const int8_t* q = job.x.q;
  const float* xs = job.x.scale;
  const int32_t* xsum = job.x.sum;
  __m512 total = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i low[SUMS], high[SUMS];
    UNROLL for (int i = 0; i < SUMS; ++i) low[i] = high[i] = _mm512_setzero_si512();
    const uint8_t* ahead = group_ahead;
    group_ahead += w.stride_bytes;
    for (int64_t k = 0; k < w.group; k += PART) {
      UNROLL for (int step = 0; step < PART / 8; ++step, codes += STEP, q += 8) {
        UNROLL for (int64_t line = 0; line < STEP; line += 64, ahead += 64)
          if (!ONE) fetch(ahead);
        const int i = step % SUMS;
        BITS == 4 ? step4(codes, q, low[i], high[i]) : step8(codes, q, low[i], high[i]);
      }
    }
    if (!ONE) fetch(ahead);
    UNROLL for (int i = 1; i < SUMS; ++i) {
      low[0] = _mm512_add_epi32(low[0], low[i]);
      high[0] = _mm512_add_epi32(high[0], high[i]);
    }
    if (BITS == 4) high[0] = _mm512_srai_epi32(high[0], 4);
    const __m512i added = offset<BITS, ZEROS>(w, base, g, xsum + g);
    const __m512i dot = _mm512_sub_epi32(_mm512_add_epi32(low[0], high[0]), added);
    total = add_group(dot, xs[g], scales<HALF>(base, g), total);
  }
  store(job, panel, 0, total);
}

template <int BITS, int PART, int SUMS, bool ONE>
void one_row(const Job& job, int64_t panel) {
  const bool half = job.w.half_scales;
  if (BITS == 4 && job.w.has_zeros)
    return half ? one_row<BITS, PART, SUMS, true, BITS == 4, ONE>(job, panel)
                : one_row<BITS, PART, SUMS, false, BITS == 4, ONE>(job, panel);
  half ? one_row<BITS, PART, SUMS, true, false, ONE>(job, panel)
       : one_row<BITS, PART, SUMS, false, false, ONE>(job, panel);
}

void one_row(const Job& job, int64_t panel) {
  const Layout& w = job.w;
  if (w.bits == 4)
    return w.group == 16   ? one_row<4, 16, 1, false>(job, panel)
           : w.group == 32 ? one_row<4, 32, 1, false>(job, panel)
                           : one_row<4, 32, 2, false>(job, panel);
  w.group == 16   ? one_row<8, 16, 1, false>(job, panel)
  : w.groups == 1 ? one_row<8, 32, 1, true>(job, panel)
                  : one_row<8, 32, 1, false>(job, panel);
}

// Zen reads groups faster with more instructions of half the width: 30 instead of 24 GB/s of int4 in
// groups of 32 by one core, from memory.
void one_row_zen(const Job& job, int64_t panel) {
  job.w.bits == 8 && job.w.groups == 1 ? one_row(job, panel) : groups_zen(job, panel);
}

// ---- many rows

// Adds four products a lane, of bytes without a sign and with one. Why not the compiler's own: it would
// move sums between registers, and keep some in memory, in loops that leave few free.
inline void add_products(__m512i& dot, __m512i without, __m512i with) {
#if defined(DFC_SIMDE)
  dot = _mm512_dpbusd_epi32(dot, without, with);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(without), "v"(with));
#endif
}

// The same of 4 values of x for all lanes, which are read on the way.
inline void add_products(__m512i& dot, __m512i without, const int8_t* q) {
#if defined(DFC_SIMDE)
  dot = _mm512_dpbusd_epi32(dot, without, four(q));
#else
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(dot)
          : "v"(without), "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
#endif
}

// R rows that lie side by side. Why: a pointer for every four (or three) reaches them with what an
// address adds up by itself; the compiler would take a register for each row, and there are not so
// many.
template <class T, int R>
struct Side {
  static constexpr int EACH = R % 4 && R > 4 ? 3 : 4, COUNT = (R + EACH - 1) / EACH;
  const T* of[COUNT];
  int64_t stride;

  Side(const T* first, int64_t stride) : stride(stride) {
    UNROLL for (int i = 0; i < COUNT; ++i) {
      of[i] = first + i * EACH * stride;
#if !defined(DFC_SIMDE)
      __asm__("" : "+r"(of[i]));
#endif
    }
  }
  const T* at(int i) const { return of[i / EACH] + i % EACH * stride; }
  void advance(int64_t by) { UNROLL for (int i = 0; i < COUNT; ++i) of[i] += by; }
};

// ---- 12 rows at a time, codes without a sign, as one row is multiplied
//
// To unpack int4 for all rows of a tile takes 2.5 times as long with two rows, and no less with 128.
// Its low codes are shifted to where high ones are: one sum takes both, and is 16 times what it stands
// for, whose scales are a sixteenth then. So is 128 what the offset of both kinds adds for each x.

constexpr int64_t ROWS = 12;

// Codes of 4 values of K for 16 outputs, and of the next 4.
template <int BITS>
inline void without_sign(const uint8_t* codes, __m512i& first, __m512i& second) {
  if (BITS == 4) {
    const __m512i two = load(codes), high = _mm512_set1_epi8(-16);
    first = _mm512_and_si512(_mm512_slli_epi16(two, 4), high);
    second = _mm512_and_si512(two, high);
  } else {
    const __m512i flip = _mm512_set1_epi8(-128);
    first = _mm512_xor_si512(load(codes), flip);
    second = _mm512_xor_si512(load(codes + 64), flip);
  }
}

// What a sum begins with: what the offset of the codes adds is taken away.
template <bool ZEROS>
inline __m512i beginning(__m512i zeros, int32_t xsum) {
  const __m512i sum = _mm512_set1_epi32(xsum);
  const __m512i added =
      ZEROS ? _mm512_slli_epi32(_mm512_mullo_epi32(zeros, sum), 4) : _mm512_slli_epi32(sum, 7);
  return _mm512_sub_epi32(_mm512_setzero_si512(), added);
}

template <int BITS, int R, bool HALF, bool ZEROS>
__attribute__((noinline)) void some_rows(const Job& job, int64_t panel, int64_t row) {
  constexpr int64_t STEP = BITS * 16;  // bytes for 8 values of K
  constexpr bool TURNS = R < 8;        // of two sums: each waits four cycles for the one before
  const Layout& w = job.w;
  const int64_t stride = job.x.stride;
  const uint8_t* const base = panel_of(job, panel);
  const uint8_t *codes = base + w.codes_at, *group_ahead = ahead_of(base, w, AHEAD);
  Side<int8_t, R> q(job.x.q + row * stride, stride);
  Side<float, R> xs(job.x.scale + row * w.groups, w.groups);
  Side<int32_t, R> xsum(job.x.sum + row * w.groups, w.groups);
  for (int i = 0; i < R; ++i)  // asked for now, they are there to be written to in the end
    __builtin_prefetch(job.y + (row + i) * w.n + panel * PANEL, 1);
  __m512 total[R];
  UNROLL for (int i = 0; i < R; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g, xs.advance(1), xsum.advance(1)) {
    __m512i dot[R], other[R];
    const __m512i offsets = ZEROS ? zeros(w, base, g) : _mm512_setzero_si512();
    UNROLL for (int i = 0; i < R; ++i) {
      dot[i] = beginning<ZEROS>(offsets, *xsum.at(i));
      other[i] = _mm512_setzero_si512();
    }
    const uint8_t* ahead = group_ahead;
    group_ahead += w.stride_bytes;
    for (const uint8_t* const end = codes + w.group_bytes; codes < end; codes += 2 * STEP) {
      UNROLL for (int step = 0; step < 2; ++step) {
        UNROLL for (int64_t line = 0; line < STEP; line += 64, ahead += 64) fetch(ahead);
        __m512i first, second;
        without_sign<BITS>(codes + step * STEP, first, second);
        UNROLL for (int i = 0; i < R; ++i) add_products(dot[i], first, q.at(i) + step * 8);
        UNROLL for (int i = 0; i < R; ++i)
          add_products(TURNS ? other[i] : dot[i], second, q.at(i) + step * 8 + 4);
      }
      q.advance(16);
    }
    fetch(ahead);
    __m512 ws = scales<HALF>(base, g);
    if (BITS == 4) ws = _mm512_mul_ps(ws, _mm512_set1_ps(0.0625f));
    UNROLL for (int i = 0; i < R; ++i) {
      if (TURNS) dot[i] = _mm512_add_epi32(dot[i], other[i]);
      total[i] = add_group(dot[i], *xs.at(i), ws, total[i]);
    }
  }
  UNROLL for (int i = 0; i < R; ++i) store(job, panel, row + i, total[i]);
}

template <int BITS, int R>
int64_t some_rows(const Job& job, int64_t panel, int64_t panels, int64_t row) {
  constexpr bool ZEROS = BITS == 4;
  const bool half = job.w.half_scales;
  auto* const rows = half ? some_rows<BITS, R, true, false> : some_rows<BITS, R, false, false>;
  auto* const offset = half ? some_rows<BITS, R, true, ZEROS> : some_rows<BITS, R, false, ZEROS>;
  for (int64_t p = panel; p < panel + panels; ++p) (job.w.has_zeros ? offset : rows)(job, p, row);
  return R;
}

template <int BITS>
void all_rows(const Job& job, int64_t panel, int64_t panels, int64_t row, int64_t rows) {
  for (const int64_t end = row + rows; row < end;) switch (end - row) {
      case 1: row += some_rows<BITS, 1>(job, panel, panels, row); break;
      case 2: row += some_rows<BITS, 2>(job, panel, panels, row); break;
      case 3: row += some_rows<BITS, 3>(job, panel, panels, row); break;
      case 4: row += some_rows<BITS, 4>(job, panel, panels, row); break;
      case 5: row += some_rows<BITS, 5>(job, panel, panels, row); break;
      case 6: case 7: row += some_rows<BITS, 6>(job, panel, panels, row); break;
      case 8: case 9: case 10: case 11: row += some_rows<BITS, 8>(job, panel, panels, row); break;
      default: row += some_rows<BITS, ROWS>(job, panel, panels, row);
    }
}

// ---- int8 with one scale an output and rows enough: the sums of 12 rows for two panels
//
// Here x + 128 is without a sign. What sums begin with takes the 128 away: -128 times the sum of the
// codes. The first rows of a tile (FIRST) find it beside their own sums; a pass of its own would wait
// for memory.

constexpr int64_t LEAST_WHOLE_ROWS = 24;  // with fewer, the others are 1.1 to 1.7 times as fast

inline __m512i negative(__m512i x) { return _mm512_sub_epi32(_mm512_setzero_si512(), x); }

// Adds the products of 4 values of K, of R rows and P panels, to `dot`, and those of 128 to `sum`.
template <bool FIRST, int R, int P>
inline void step(const Side<int8_t, R>& q, int k, const uint8_t* codes, int64_t apart,
                 __m512i (&dot)[R][P], __m512i (&sum)[P]) {
  __m512i weight[P];
  UNROLL for (int p = 0; p < P; ++p) weight[p] = load(codes + k * PANEL + p * apart);
  if (FIRST)
    UNROLL for (int p = 0; p < P; ++p) add_products(sum[p], _mm512_set1_epi8(-128), weight[p]);
  UNROLL for (int i = 0; i < R; ++i) {
    const __m512i x = four(q.at(i) + k);
    UNROLL for (int p = 0; p < P; ++p) add_products(dot[i][p], x, weight[p]);
  }
}

struct Whole {
  const Job& job;
  int64_t panel, row, rows;
  __m512i start[TILE_PANELS];
  const uint8_t* ahead;  // what is asked for next: the panels that follow
  int64_t lines;         // of it, for every 16 values of K that 12 rows are multiplied by
};

// A row of the last panel, which has fewer outputs.
__attribute__((noinline)) void store_few(const Job& job, int64_t panel, int64_t row, __m512i dot,
                                         __m512 scale) {
  store(job, panel, row, add_group(dot, job.x.scale[row], scale, _mm512_setzero_ps()));
}

template <int R, int P, bool FIRST>
__attribute__((noinline)) void whole(Whole& w, int64_t r) {
  const Job& job = w.job;
  const int64_t stride = job.x.stride, row = w.row + r, apart = job.w.panel_bytes;
  const uint8_t *const base = panel_of(job, w.panel), *ahead = w.ahead;
  const uint8_t* codes = base + job.w.codes_at;
  Side<int8_t, R> q(job.x.q + row * stride, stride);
  for (int i = 0; i < R; ++i)  // asked for now, they are there to be written to in the end
    for (int p = 0; p < P; ++p)
      __builtin_prefetch(job.y + (row + i) * job.w.n + (w.panel + p) * PANEL, 1);
  __m512i dot[R][P], sum[P];
  UNROLL for (int p = 0; p < P; ++p) {
    sum[p] = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < R; ++i) dot[i][p] = FIRST ? sum[p] : w.start[p];
  }
  for (const uint8_t* const end = codes + job.w.padded_k * PANEL; codes < end; codes += 256) {
    for (int64_t i = 0; i < w.lines; ++i, ahead += 64) fetch(ahead);
    UNROLL for (int k = 0; k < 16; k += 4) step<FIRST>(q, k, codes, apart, dot, sum);
    q.advance(16);
  }
  w.ahead = ahead;
  UNROLL for (int p = 0; p < P; ++p) {
    if (FIRST) {
      w.start[p] = negative(sum[p]);
      UNROLL for (int i = 0; i < R; ++i) dot[i][p] = _mm512_add_epi32(dot[i][p], w.start[p]);
    }
    const uint8_t* const panel = base + p * apart;
    const __m512 scale = job.w.half_scales ? scales<true>(panel, 0) : scales<false>(panel, 0);
    const int64_t first = (w.panel + p) * PANEL;
    if (first + PANEL > job.w.n) {
      UNROLL for (int i = 0; i < R; ++i) store_few(job, w.panel + p, row + i, dot[i][p], scale);
      continue;
    }
    const float* const xs = job.x.scale + row;
    float* const y = job.y + row * job.w.n + first;
    const __m512 zero = _mm512_setzero_ps();
    if (job.bias) {  // asked once: what follows has no branches
      const __m512 bias = _mm512_loadu_ps(job.bias + first);
      UNROLL for (int i = 0; i < R; ++i)
        _mm512_storeu_ps(y + i * job.w.n,
                         _mm512_add_ps(add_group(dot[i][p], xs[i], scale, zero), bias));
    } else {
      UNROLL for (int i = 0; i < R; ++i)
        _mm512_storeu_ps(y + i * job.w.n, add_group(dot[i][p], xs[i], scale, zero));
    }
  }
}

template <int R, int P>
int64_t rows_of(Whole& w, int64_t r) {
  r == 0 ? whole<R, P, true>(w, r) : whole<R, P, false>(w, r);
  return R;
}

template <int P>
void all_rows(Whole w) {
  for (int64_t r = 0; r < w.rows;) {
    const int64_t left = w.rows - r;
    r += left >= 12  ? rows_of<12, P>(w, r)
         : left >= 8 ? rows_of<8, P>(w, r)
         : left >= 4 ? rows_of<4, P>(w, r)
         : left >= 2 ? rows_of<2, P>(w, r)
                     : rows_of<1, P>(w, r);
  }
}

void many_rows(const Job& job, int64_t panel, int64_t panels, int64_t row, int64_t rows, Tiling&) {
  if (job.w.bits == 4) return all_rows<4>(job, panel, panels, row, rows);
  if (job.w.groups > 1 || job.rows < LEAST_WHOLE_ROWS)
    return all_rows<8>(job, panel, panels, row, rows);
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  const int64_t lines = (4 * panels + blocks - 1) / blocks;
  const Whole all = {job, panel, row, rows, {}, panel_of(job, panel + panels), lines};
  panels == 1 ? all_rows<1>(all) : all_rows<2>(all);
}

}  // namespace

extern const Path avx512vnni_path = {"avx512vnni", false, LEAST_WHOLE_ROWS, TILE_PANELS, 0, 0, nullptr,
                                     nullptr, quantize_avx512, gelu_avx512, norm_avx2, one_row, many_rows};

extern const Path avx512vnni_zen_path = {"avx512vnni", false, LEAST_WHOLE_ROWS, TILE_PANELS, 0, 0,
                                         nullptr, nullptr, quantize_avx512, gelu_avx512, norm_avx2,
                                         one_row_zen, many_rows};

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
