// The path of CPUs with AMX, for many rows: tiles of 16 rows of x times 64 values of K are multiplied
// by tiles of as many codes for 16 outputs, s8 by s8 into int32, in one instruction.
//
// A panel's int8 codes are such tiles as they lie; int4 codes are unpacked to them. Four tiles of sums
// (32 rows, two panels) take two tiles of x and two of codes. Sums of a group go through memory to
// the registers that scale them: while those of a group are added up, the next is multiplied. For
// groups of 32 that way took longer than all else, even with totals held in registers.
#include "kernels.h"

#if defined(DFC_AMX)  // else the compiler does not know what follows
#define DFC_TILES
#include "avx512.h"

namespace dfc {
namespace {

constexpr int64_t TILE = 16;  // rows of a tile
// Fewer rows and shorter groups are multiplied faster without tiles: measured on a Xeon of 2023,
// where groups of 128 took 0.6 of the time without, groups of 32 1.8 times as long.
constexpr int64_t LEAST_ROWS = 8, LEAST_GROUP = 128;
constexpr int64_t UNIT = 128;  // values of K between two times that memory is asked for
constexpr int64_t WIDE = PANEL * TILE_PANELS;  // from row to row of totals and dot products
constexpr int64_t BUFFER = 2 * TILE * WIDE;  // sums of a group
static_assert(sizeof(Tiling::dots) >= 2 * BUFFER * sizeof(int32_t), "two groups fit");

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

// Before tiles read `what`: to the compiler, their instructions do not say all that they read.
inline void settle(const void* what) { __asm__ volatile("" ::"r"(what) : "memory"); }

// The sizes of this thread's tiles: sums 0 to 3, x 4 and 5, codes 6 and 7.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  // Rows of the two tiles of x, and how many values of K they have.
  void shape(int64_t first, int64_t second, int64_t k) {
    if (first == first_ && second == second_ && k == k_) return;
    first_ = first, second_ = second, k_ = k;
    alignas(64) Config c = {};
    c.palette = 1;
    c.set(0, first, 64), c.set(1, first, 64), c.set(2, second, 64), c.set(3, second, 64);
    c.set(4, first, k), c.set(5, second, k);
    c.set(6, k / 4, 64), c.set(7, k / 4, 64);
    settle(&c);
    _tile_loadconfig(&c);
  }

 private:
  struct Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];  // of a row of each tile
    uint8_t rows[16];

    void set(int tile, int64_t count, int64_t width) {  // a tile without rows has no width either
      rows[tile] = uint8_t(count);
      bytes[tile] = uint16_t(count ? width : 0);
    }
  };
  static_assert(sizeof(Config) == 64, "the CPU reads it");

  int64_t first_ = 0, second_ = 0, k_ = 0;
};

// The next panels, asked for bit by bit while these are multiplied.
struct Ahead {
  const uint8_t* at;
  int64_t part;

  void some() {
    for (const uint8_t* const end = at + part; at < end; at += 64) fetch(at);
  }
};

struct Block {
  const Tile& t;
  const Stretch& s;
  Codes codes;
  int64_t k;  // values of a tile
  Ahead& ahead;
};

// Sums of M tiles of rows and P panels, from and to i32 [rows][2][16].
template <int M, int P>
inline void load_sums(const int32_t* from) {
  constexpr int64_t pitch = WIDE * 4;
  _tile_loadd(0, from, pitch);
  if (P == 2) _tile_loadd(1, from + PANEL, pitch);
  if (M == 2) _tile_loadd(2, from + TILE * WIDE, pitch);
  if (M == 2 && P == 2) _tile_loadd(3, from + TILE * WIDE + PANEL, pitch);
}

template <int M, int P>
inline void store_sums(int32_t* to) {
  constexpr int64_t pitch = WIDE * 4;
  _tile_stored(0, to, pitch);
  if (P == 2) _tile_stored(1, to + PANEL, pitch);
  if (M == 2) _tile_stored(2, to + TILE * WIDE, pitch);
  if (M == 2 && P == 2) _tile_stored(3, to + TILE * WIDE + PANEL, pitch);
}

template <int M, int P>
inline void zero_sums() {
  _tile_zero(0);
  if (P == 2) _tile_zero(1);
  if (M == 2) _tile_zero(2);
  if (M == 2 && P == 2) _tile_zero(3);
}

// Adds the products for `count` values of K, in tiles of `width`.
template <int M, int P>
inline void multiply(const int8_t* q, int64_t stride, Codes codes, int64_t count, int64_t width) {
  for (const int8_t* const end = q + count; q < end; q += width, codes.at += width * PANEL) {
    _tile_loadd(6, codes.at, 64);
    _tile_loadd(4, q, stride);
    _tile_dpbssd(0, 4, 6);
    if (P == 2) {
      _tile_loadd(7, codes.at + codes.apart, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if (M == 2) {
      _tile_loadd(5, q + TILE * stride, stride);
      _tile_dpbssd(2, 5, 6);
      if (P == 2) _tile_dpbssd(3, 5, 7);
    }
  }
}

// Adds the sums of a group to the totals.
template <int P>
inline void add_up(const Block& b, int64_t r, int64_t rows, int64_t g, const int32_t* dots) {
  const int64_t groups = b.t.job.w.groups;
  const float* xs = b.t.job.x.scale + (b.t.row + r) * groups + b.s.group + g;
  float* total = b.t.s.total + r * WIDE;
  __m512 ws[P];
  UNROLL for (int p = 0; p < P; ++p) ws[p] = _mm512_load_ps(b.t.s.scales + g * WIDE + p * PANEL);
  for (int64_t i = 0; i < rows; ++i, dots += WIDE, total += WIDE, xs += groups)
    UNROLL for (int p = 0; p < P; ++p) {
      const __m512 sum = _mm512_load_ps(total + p * PANEL);
      _mm512_store_ps(total + p * PANEL, add_group(load(dots + p * PANEL), *xs, ws[p], sum));
    }
}

// A stretch for up to 32 rows. The sums of a group are added up when the next is multiplied.
template <int M, int P>
__attribute__((noinline)) void some_rows(const Block& b, int64_t r, int64_t rows) {
  const int64_t stride = b.t.job.x.stride;
  const int8_t* q = b.t.job.x.q + (b.t.row + r) * stride + b.s.begin;
  int32_t* const unfinished = b.t.s.unfinished + r * WIDE;
  Codes codes = b.codes;
  for (int64_t g = 0; g < b.s.groups; ++g) {
    b.s.first ? zero_sums<M, P>() : load_sums<M, P>(unfinished);
    for (int64_t left = b.s.count; left > 0;) {
      const int64_t count = least(left, UNIT);
      b.ahead.some();
      multiply<M, P>(q, stride, codes, count, b.k);
      q += count, codes.at += count * PANEL, left -= count;
    }
    store_sums<M, P>(b.s.last ? b.t.s.dots + g % 2 * BUFFER : unfinished);
    if (g > 0) add_up<P>(b, r, rows, g - 1, b.t.s.dots + (g - 1) % 2 * BUFFER);
  }
  const int64_t last = b.s.groups - 1;
  if (b.s.last) add_up<P>(b, r, rows, last, b.t.s.dots + last % 2 * BUFFER);
}

template <int P>
void all_rows(const Block& b, Tiles& tiles) {
  for (int64_t r = 0; r < b.t.rows; r += 2 * TILE) {
    const int64_t rows = least(2 * TILE, b.t.rows - r), first = least(TILE, rows);
    tiles.shape(first, rows - first, b.k);
    rows > TILE ? some_rows<2, P>(b, r, rows) : some_rows<1, P>(b, r, rows);
  }
}

// int8 codes are not unpacked: of a long group, all are multiplied before its sums leave the tiles.
int64_t values_at(const Layout& w, int64_t k) {
  return w.bits == 8 && w.group > TILE_K ? w.group : next_block(w, k);
}

Ahead ahead_of(const Tile& t) {
  const Layout& w = t.job.w;
  const uint8_t* const next = panel_of(t.job, t.panel + t.panels);
  if (t.row + t.rows < t.job.rows) return {next, 0};  // the same panels come again
  const int64_t units = w.groups * ((w.group + UNIT - 1) / UNIT);
  const int64_t parts = units * ((t.rows + 2 * TILE - 1) / (2 * TILE));
  return {next, up(t.panels * w.panel_bytes / parts, 64)};
}

void begin_totals(const Tile& t) {
  for (int64_t i = 0; i < t.rows * WIDE; i += 16) _mm512_store_ps(t.s.total + i, _mm512_setzero_ps());
}

void many_rows(const Job& job, int64_t panel, int64_t panels, int64_t row, int64_t rows,
               Tiling& scratch) {
  const Layout& w = job.w;
  const Tile t = {job, panel, panels, row, rows, scratch};
  const int64_t width = w.group % 64 == 0 ? 64 : 32;
  Tiles tiles;
  Ahead ahead = ahead_of(t);
  begin_totals(t);
  for (int64_t k = 0; k < w.padded_k;) {
    const int64_t count = values_at(w, k);
    const Stretch s = stretch_of(w, k, count);
    const Block b = {t, s, codes_of(t, s), width, ahead};
    take_scales(t, s);
    settle(&scratch);
    panels == 1 ? all_rows<1>(b, tiles) : all_rows<2>(b, tiles);
    k += count;
  }
  store_totals(t);
}

void no_row(const Job&, int64_t) {}  // few rows are another path's

}  // namespace

extern const Path amx_path = {"amx", false, 0, TILE_PANELS, LEAST_ROWS, LEAST_GROUP,
                              &avx512vnni_path, nullptr, quantize_avx512, gelu_avx512, norm_avx2, no_row, many_rows};

}  // namespace dfc

#if defined(__clang__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
#endif
