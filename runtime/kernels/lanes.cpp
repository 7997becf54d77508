// Many rows of int8 on AVX2, where codes fit lanes of int16 (kernels.h, Fix).
//
// maddubs multiplies x + 128 by codes and adds two products, or four in two, into int16 without
// saturating: three instructions for 32 products, or five for 64, where int16 codes take four for 32.
// What codes have too much is multiplied with columns of x, 32 rows at a time.
#include "avx2.h"

#if defined(__x86_64__) || defined(DFC_SIMDE)

namespace dfc {
namespace {

static_assert(sizeof(Tiling::codes) >= LANE_BLOCK * PANEL, "a block fits");
static_assert(sizeof(Tiling::dots) >= TILE_ROWS * PANEL * 4, "sums of fixes fit");

struct Panel {
  const Layout& w;
  const Fixes& fixes;
  const Fix* fix;  // of all outputs
};

Panel panel_at(const Job& job, int64_t panel) {
  const Fixes* head = fixes_of(job, panel);
  return {job.w, *head, reinterpret_cast<const Fix*>(head + 1)};
}

// ---- codes

// The codes of a block, without what they have too much. at: each output's next fix.
void take_codes(const Panel& p, const uint8_t* codes, int64_t begin, int64_t count, int32_t* at,
                uint8_t* to) {
  for (int64_t i = 0; i < count * PANEL; i += 64) {
    __builtin_prefetch(codes + i + NEAR_AHEAD);
    for (int64_t h = 0; h < 64; h += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + i + h), load(codes + i + h));
  }
  for (int64_t o = 0; o < PANEL; ++o) {
    const Fix* fix = p.fix + at[o];
    const Fix* const end = p.fix + p.fixes.begin[o + 1];
    for (; fix < end && fix->k[0] < begin + count; ++fix)
      UNROLL for (int i = 0; i < 4; ++i) {
        const uint32_t k = uint32_t(fix->k[i] - begin);
        to[(k & ~3u) * PANEL + 4 * o + (k & 3)] -= uint8_t(fix->by[i]);
      }
    at[o] = int32_t(fix - p.fix);
  }
}

// Adds the products of R rows to sums i32 [R][16]. codes: i8 [count / 4][16][4], count: of 32s.
template <int R, int LANE>
__attribute__((noinline)) void multiply(const uint8_t* codes, const int8_t* q, int64_t stride,
                                        int64_t count, int32_t* sums) {
  __m256i low[R], high[R];
  ROWS {
    low[i] = load(sums + i * PANEL);
    high[i] = load(sums + i * PANEL + 8);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (const uint8_t* const end = codes + count * PANEL; codes < end; codes += 256, q += 16) {
    UNROLL for (int k = 0; k < 16; k += 2 * LANE) {
      const uint8_t* const here = codes + 16 * k;
      const __m256i w0 = load(here), w1 = load(here + 32);
      ROWS {
        const __m256i x = four(q + i * stride + k);
        __m256i a = _mm256_maddubs_epi16(x, w0), b = _mm256_maddubs_epi16(x, w1);
        if (LANE == 4) {
          const __m256i more = four(q + i * stride + k + 4);
          add16(a, _mm256_maddubs_epi16(more, load(here + 64)));
          add16(b, _mm256_maddubs_epi16(more, load(here + 96)));
        }
        add32(low[i], _mm256_madd_epi16(a, ones));
        add32(high[i], _mm256_madd_epi16(b, ones));
      }
    }
  }
  ROWS {
    keep(sums + i * PANEL, low[i]);
    keep(sums + i * PANEL + 8, high[i]);
  }
}

// What is asked for while a panel is multiplied, for every four rows a part: what the next panel
// has, and the results that will be written.
struct Ahead {
  const uint8_t* at;
  int64_t part;
  const float* y;
  int64_t n;

  void four_rows() {
    for (const uint8_t* const end = at + part; at < end; at += 64) fetch(at);
    for (int i = 0; i < 4; ++i, y += n) __builtin_prefetch(y, 1, 2);
  }
};

template <int LANE>
void all_rows(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t count, int64_t rows,
              int32_t* sums, Ahead& ahead) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    ahead.four_rows();
    multiply<4, LANE>(codes, q + r * stride, stride, count, sums + r * PANEL);
  }
  q += r * stride;
  sums += r * PANEL;
  switch (rows - r) {
    case 3: return multiply<3, LANE>(codes, q, stride, count, sums);
    case 2: return multiply<2, LANE>(codes, q, stride, count, sums);
    case 1: return multiply<1, LANE>(codes, q, stride, count, sums);
  }
}

// ---- fixes

// A fix for 32 rows. Unpacking puts rows 0 to 7 and 16 to 23 into one register.
inline void add_fix(const Fix& fix, const uint8_t* const (&x)[4], int64_t r, __m256i* sum) {
  __m256i low = _mm256_setzero_si256(), high = low;
  UNROLL for (int i = 0; i < 4; i += 2) {
    int16_t two;
    __builtin_memcpy(&two, fix.by + i, 2);
    const __m256i by = _mm256_set1_epi16(two), a = load(x[i] + r), b = load(x[i + 1] + r);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a, b), by));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a, b), by));
  }
  sum[0] = _mm256_add_epi32(sum[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(low)));
  sum[1] = _mm256_add_epi32(sum[1], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(high)));
  sum[2] = _mm256_add_epi32(sum[2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(low, 1)));
  sum[3] = _mm256_add_epi32(sum[3], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(high, 1)));
}

// The sums of an output's fixes for 64 rows.
void multiply_fixes(const Fix* fix, const Fix* end, const uint8_t* columns, int32_t* sums) {
  __m256i sum[8];
  UNROLL for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
  for (; fix < end; ++fix) {
    const uint8_t* x[4];
    UNROLL for (int i = 0; i < 4; ++i) x[i] = columns + fix->k[i] * TILE_ROWS;
    add_fix(*fix, x, 0, sum);
    add_fix(*fix, x, 32, sum + 4);
  }
  UNROLL for (int i = 0; i < 8; ++i) keep(sums + 8 * i, sum[i]);
}

// Eight outputs of eight rows as eight rows of eight outputs.
inline void turn8(const int32_t* from, __m256i (&row)[8]) {
  __m256i a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = load(from + i * TILE_ROWS);
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; ++j) {
    a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + 2 + j]);
    a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + 2 + j]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    row[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

// Adds sums [16][TILE_ROWS] to those [rows][16].
void add_turned(const int32_t* fixes, int64_t rows, int32_t* sums) {
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t h = 0; h < PANEL; h += 8) {
      __m256i row[8];
      turn8(fixes + h * TILE_ROWS + r, row);
      UNROLL for (int i = 0; i < 8; ++i) {
        int32_t* const to = sums + (r + i) * PANEL + h;
        keep(to, _mm256_add_epi32(load(to), row[i]));
      }
    }
}

// ---- results

void finish(const Job& job, int64_t panel, int64_t row, int64_t rows, const int32_t* sums) {
  const uint8_t* const base = panel_of(job, panel);
  const Panel p = panel_at(job, panel);
  const __m256i off[2] = {load(p.fixes.offset), load(p.fixes.offset + 8)};
  const __m256 ws[2] = {scales(job.w, base, 0, 0), scales(job.w, base, 0, 1)};
  for (int64_t r = 0; r < rows; ++r) {
    __m256 y[2];
    HALVES {
      const __m256i dot = _mm256_sub_epi32(load(sums + r * PANEL + 8 * h), off[h]);
      y[h] = add_group(dot, job.x.scale[row + r], ws[h], _mm256_setzero_ps());
    }
    store(job, panel, row + r, y[0], y[1]);
  }
}

// ---- columns

// 16 values of 16 rows as 16 rows of 16 values.
inline void turn16(const uint8_t* const (&from)[TURNED_ROWS], int64_t k, uint8_t* to) {
  __m128i a[16], b[16];
  UNROLL for (int i = 0; i < 16; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i] + k));
  // Four times: neighbours are the first and the second half. Each time a bit of the row's number
  // changes its place with one of the value's.
  for (int step = 0; step < 4; ++step) {
    UNROLL for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    UNROLL for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  UNROLL for (int i = 0; i < 16; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * TILE_ROWS), a[i]);
}

}  // namespace

void turn_avx2(const Job& job, int64_t row, int64_t rows, uint8_t* columns) {
  const uint8_t* from[TURNED_ROWS];
  for (int64_t i = 0; i < TURNED_ROWS; ++i)  // what is beyond the rows is not used: any will do
    from[i] = reinterpret_cast<const uint8_t*>(job.x.q + (row + least(i, rows - 1)) * job.x.stride);
  columns += row / job.tile_rows * job.w.padded_k * TILE_ROWS + row % job.tile_rows;
  for (int64_t k = 0; k < job.w.padded_k; k += 16) turn16(from, k, columns + k * TILE_ROWS);
}

void lanes_avx2(const Job& job, int64_t panel, int64_t row, int64_t rows, Tiling& scratch) {
  const Layout& w = job.w;
  const Panel p = panel_at(job, panel);
  const uint8_t* const codes = panel_of(job, panel) + w.codes_at;
  int32_t* const sums = scratch.unfinished;
  for (int64_t i = 0; i < rows * PANEL; i += 8) keep(sums + i, _mm256_setzero_si256());
  int32_t at[PANEL];
  for (int64_t o = 0; o < PANEL; ++o) at[o] = p.fixes.begin[o];
  const int64_t blocks = (w.padded_k + LANE_BLOCK - 1) / LANE_BLOCK, parts = blocks * (rows / 4);
  Ahead ahead = {panel_of(job, panel + 1), up(w.panel_bytes / parts, 64), nullptr, w.n};
  for (int64_t k = 0; k < w.padded_k; k += LANE_BLOCK) {
    const int64_t count = least(LANE_BLOCK, w.padded_k - k);
    const int8_t* const q = job.x.q + row * job.x.stride + k;
    ahead.y = job.y + row * w.n + panel * PANEL;
    take_codes(p, codes + k * PANEL, k, count, at, scratch.codes);
    w.lane == 4 ? all_rows<4>(scratch.codes, q, job.x.stride, count, rows, sums, ahead)
                : all_rows<2>(scratch.codes, q, job.x.stride, count, rows, sums, ahead);
  }
  if (p.fixes.begin[PANEL]) {
    const int64_t tile = row / job.tile_rows;
    const uint8_t* const columns = job.x.columns + tile * w.padded_k * TILE_ROWS;
    for (int64_t o = 0; o < PANEL; ++o)
      for (int64_t r = 0; r < rows; r += 64)
        multiply_fixes(p.fix + p.fixes.begin[o], p.fix + p.fixes.begin[o + 1], columns + r,
                       scratch.dots + o * TILE_ROWS + r);
    add_turned(scratch.dots, rows, sums);
  }
  finish(job, panel, row, rows, sums);
}

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
